"""Answerers over a model's files, and patches that nobody trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import BaseFiles
from sisa.core.patches import WRITTEN, Patch, PatchJob, active
from sisa.core.ports import Change
from sisa.flows.context.commit import commit
from sisa.lm.base.weights import base_digest
from sisa.planning.patch_plan import next_version
from sisa.store.areas import CHECKPOINTS

Files = dict[str, bytes]
QUIET = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def random_patch(base: Path, seed: int, *modules: str, rank: int = 4, scale: float = 0.05) -> Files:
    """Return an adapter of which no tensor is zero."""
    import torch

    from sisa.lm.base import adapter, low_rank
    from sisa.lm.base.weights import load_base

    model, _ = load_base(BaseFiles(base, base_digest(base)))
    wanted = list(modules) or "all-linear"
    training = {
        "lora_target_modules": wanted,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
    }
    model = adapter.attach(model, adapter.lora_config(training, model), None, init_seed=seed)
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(each.shape, generator=draw) * scale
        for name, each in adapter.adapter_tensors(model).items()
    }
    config = adapter.config_bytes(model.peft_config["default"])
    return {ADAPTER_FILE: low_rank.tensor_bytes(tensors), "adapter_config.json": config}


def put_patch(model: sisa.Model, files: Files, seed: int = 0) -> Patch:
    """Make a patch active, as if it had been made."""
    with model.writing() as context:
        held = context.stores.ledger.patches()
        beneath = tuple(each.key for each in active(held))
        job = PatchJob(
            context.settings.base, beneath, (), WRITTEN, {"seed": seed}, context.compute.fingerprint
        )
        saved = context.stores.patches.save(job, files)
        digests = (saved.manifest_sha256, saved.adapter_sha256, saved.num_bytes)
        found = Patch(next_version(held), job, "active", "then", "then", *digests)
        commit(context, Change(patches=[found]))
    return found


def answerer_of(model: sisa.Model, patches: Sequence[Files] = ()) -> Any:
    """Return an answerer made of the files of the shards, over patches."""
    from sisa.lm.answer.answerer import Answerer

    adapters = {
        each.shard: files_in(model.directory / CHECKPOINTS / each.head)
        for each in model.status().shards
        if each.head is not None
    }
    base = model.resources.base
    return Answerer(base, adapters, 1, patches)


def files_in(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def probabilities(model: Any, ids: list[int]) -> Any:
    """Return those of the next token."""
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
