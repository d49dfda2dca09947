"""Layers slice by slice, with the real trainer: earlier blocks stay unchanged and take part.

The code published with S3T sets earlier blocks to zero while it trains a later one. These tests fail in
that case: the earlier adapters are in the later checkpoint to the byte, they change its forward pass,
and what a later block learns depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import RunConfig
from sisa.config.sources import DatasetSource
from sisa.core.checkpoint_files import ADAPTER_FILE, OPTIMIZER_FILE
from sisa.core.domain import BaseFiles, SliceJob
from sisa.core.errors import InvalidInput
from sisa.flows.wiring.resources import Resources
from sisa.lm.base.weights import resolve_base
from sisa.planning.plan import LAYERWISE
from tests.models.stages import RECORDS, TRAINING, Files, train
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch

NUM_LAYERS, NUM_SLICES = 3, 2  # the topmost layer first, then the two below


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"), layers=NUM_LAYERS)))


def job_of(base: BaseFiles, *prefix: int, blocks: int = NUM_SLICES) -> SliceJob:
    training: dict[str, Any] = {**TRAINING, "lora_dropout": 0.0, LAYERWISE: blocks}
    *before, slice_ = prefix
    slices = tuple((each, "root") for each in prefix)
    parent = "0" * 64 if before else None
    job = SliceJob(0, slice_, parent, slices, 4 * len(prefix), (6, 1), training, base.digest, "fp")
    return replace(job, before=tuple(before))


@pytest.fixture(scope="module")
def chain(base: BaseFiles) -> tuple[Files, Files]:
    """Return the checkpoints of the order (1, 0): slice 1 trains the topmost block."""
    first = train(base, job_of(base, 1), None, RECORDS[:4])
    return first, train(base, job_of(base, 1, 0), first, RECORDS[:8])


def tensors(files: Mapping[str, bytes], name: str = ADAPTER_FILE) -> dict[str, Any]:
    from safetensors.torch import load

    return dict(load(files[name]))


def layers(names: Any) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def without_top(files: Mapping[str, bytes]) -> Files:
    """Return the same checkpoint without the adapters of the topmost layer."""
    from sisa.lm.base.low_rank import tensor_bytes

    top = f".layers.{NUM_LAYERS - 1}."
    left = {name: each * 0 if top in name else each for name, each in tensors(files).items()}
    return {**files, ADAPTER_FILE: tensor_bytes(left)}


def logits(base: BaseFiles, files: Mapping[str, bytes]) -> Any:
    import torch

    from sisa.lm.base.adapter import attach, read_config
    from sisa.lm.base.weights import load_base

    plain = load_base(base)[0]
    model = attach(plain, read_config(files), tensors(files), init_seed=0)
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def test_each_stage_trains_its_own_block_from_the_top_down(chain: tuple[Files, Files]) -> None:
    first, second = map(tensors, chain)
    assert {name for name in second if not second[name].equal(first[name])} == {
        name for name in second if f".layers.{NUM_LAYERS - 1}." not in name
    }
    assert layers(n for n, each in first.items() if "lora_B" in n and each.any()) == {2}
    assert layers(n for n, each in second.items() if "lora_B" in n and each.any()) == {0, 1, 2}
    assert [layers(tensors(files, OPTIMIZER_FILE)) for files in chain] == [{2}, {0, 1}]


def test_earlier_blocks_are_present_to_the_byte_and_affect_the_output(
    base: BaseFiles, chain: tuple[Files, Files]
) -> None:
    first, second = chain
    top = {n: each for n, each in tensors(first).items() if f".layers.{NUM_LAYERS - 1}." in n}
    assert all(tensors(second)[name].equal(each) for name, each in top.items())
    assert not logits(base, second).equal(logits(base, without_top(second)))
    assert not logits(base, first).equal(logits(base, without_top(first)))
    untold = train(base, job_of(base, 1, 0), without_top(first), RECORDS[:8])
    lower = [n for n in tensors(second) if n not in top and "lora_B" in n]
    assert not any(tensors(untold)[n].equal(tensors(second)[n]) for n in lower)


def test_the_last_stage_taken_out_costs_its_block_alone(
    base: BaseFiles, chain: tuple[Files, Files]
) -> None:
    """What serves without the last slice is the checkpoint before it: later blocks change nothing
    there."""
    first, _ = chain
    noise = {
        name: each + 1 if f".layers.{NUM_LAYERS - 1}." not in name and "lora_A" in name else each
        for name, each in tensors(first).items()
    }
    from sisa.lm.base.low_rank import tensor_bytes

    changed = {**first, ADAPTER_FILE: tensor_bytes(noise)}
    assert logits(base, first).equal(logits(base, changed))


def test_fewer_layers_than_slices_are_refused_before_anything_is_trained(
    base: BaseFiles, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="fewer adapted layers"):
        train(base, job_of(base, 0, blocks=NUM_LAYERS + 1), None, RECORDS[:4])
    with pytest.raises(InvalidInput, match="no block of layers left"):
        train(base, job_of(base, 0, 1, 2), None, RECORDS[:9] + RECORDS[:3])
    for slices, refused in ((NUM_LAYERS, False), (NUM_LAYERS + 1, True)):
        source = DatasetSource(path="a.jsonl")
        plain = RunConfig(datasets=(source,), output_dir=tmp_path, base_model=str(base.directory))
        block = plain.sisa.model_copy(update={"slices": slices, "layerwise": True})
        resources = Resources(plain.model_copy(update={"sisa": block}), None, None)
        if refused:
            with pytest.raises(InvalidInput, match="fewer adapted layers"):
                resources.check_base()
        else:
            resources.check_base()
