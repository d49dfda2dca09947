"""The frozen base of TOFU in full, in memory: bare, under an adapter, or with adapters merged into it.

Where the design adapts the upper layers alone, the base is split below them (`split_model.py`), so that
the lower layers are computed once a text. All models of a process share the one base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from approx.evaluation.asking import EvaluatedModel
from approx.evaluation.evaluated_models import DeletionReadyModel, HuggingFaceModel, tokens_of
from approx.evaluation.questions import Question
from approx.methods.method import Method
from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
from sisa.core.domain import BaseFiles
from sisa.lm.base.adapter import attach, lora_config, read_config
from sisa.lm.base.low_rank import read_tensors
from sisa.lm.base.tokens import Tokens
from sisa.lm.base.weights import load_frozen, load_tokenizer, own_modules
from sisa.store.blobs.files import read_whole
from tests.bench.tofu_full.design import FORM, Design
from tests.bench.tofu_full.split_model import Halves, SplitModel, load_split, split

Files = Mapping[str, bytes]


def read_adapter(folder: Path) -> Files:
    """Return the files of an adapter. Raise IntegrityError if one is missing."""
    return {name: read_whole(folder / name, "adapter") for name in (ADAPTER_FILE, CONFIG_FILE)}


def _attached(model: Any, files: Files) -> Any:
    return attach(model, read_config(files), read_tensors(files, ADAPTER_FILE), init_seed=0)


class FrozenBase:
    """One base; `states` is the directory of lower hidden states that all processes share."""

    def __init__(self, base: BaseFiles, design: Design, states: Path, device: str) -> None:
        self.digest, self.device = base.digest, device
        self._directory, self._design, self._states = base.directory, design, states

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._directory)

    @property
    def _upper_layers(self) -> int:
        """The number of layers with adapters, where those below are computed once a text; else 0."""
        top = self._design.lora_layers.partition(":")[2]
        return int(top) if self.device == "cpu" and top else 0

    @cached_property
    def split(self) -> SplitModel:
        """The base, split below the adapters; whole where it can't be split."""
        if self._upper_layers:
            return load_split(self._directory, self._upper_layers, self._states)
        from transformers import AutoModelForCausalLM

        whole = load_frozen(AutoModelForCausalLM, self._directory).to(self.device)
        return SplitModel(whole, whole)

    @property
    def whole(self) -> Any:
        return self.split.whole

    def copied(self, *, whole: bool) -> Any:
        """Return a copy of the base with modules of its own: whole, or its upper layers."""
        own = own_modules(self.whole)
        if whole or not self._upper_layers:
            return own
        return split(own, self._upper_layers, self._states).upper

    @contextmanager
    def merged(self, files: Files) -> Iterator[None]:
        """Merge an adapter into the base, and restore it."""
        held = [(each, each.detach().clone()) for each in self.whole.model.layers.parameters()]
        try:
            _attached(self.whole, files).merge_and_unload()
            yield
        finally:
            with torch.no_grad():
                for parameter, before in held:
                    parameter.copy_(before)

    @contextmanager
    def wearing(self, files: Files | None, model: Any = None) -> Iterator[Any]:
        """Put an adapter on the base as a PEFT model; None stands for one that changes nothing.

        `model` is the whole base, or its upper layers.
        """
        model = model or self.whole
        if files is None:
            patched = attach(model, self.lora_config(), None, init_seed=0)
        else:
            patched = _attached(model, files)
        yield patched.eval()
        patched.unload()

    def lora_config(self, method: Method | None = None, num_facts: int = 0) -> Any:
        """Return the ordinary adapter's configuration, or what a method needs that acts at a layer."""
        wanted = {
            "lora_target_modules": "all-linear",
            "lora_layers": "all" if method and method.layer is not None else self._design.lora_layers,
            "lora_r": self._design.lora_r,
            "lora_alpha": self._design.lora_alpha,
            "lora_dropout": 0.0,
        }
        if method:
            wanted |= method.adapter_values(self.whole, num_facts)
        return lora_config(wanted, self.whole)

    def tokens(self, questions: Sequence[Question]) -> list[Tokens]:
        """Return questions with their answers as they are trained on."""
        return tokens_of([(each.question, each.answer) for each in questions], FORM, self.tokenizer)

    def evaluated(self, upper: Any, name: str, digest: str) -> EvaluatedModel:
        """Return the base, as it is now, as a model to ask, which scores by `upper`."""
        given = self.tokenizer, self.device
        return Halves(
            HuggingFaceModel("upper", digest, upper, *given),
            HuggingFaceModel("whole", digest, self.whole, *given),
            digest,
            name,
        )

    def over_states(self, model: DeletionReadyModel) -> EvaluatedModel:
        """Return a model that scores over the lower states that all models of the base share."""
        if not self._upper_layers:
            return model
        upper = copy(model)
        upper.answerer = copy(model.answerer)
        upper.answerer.model = split(model.answerer.model, self._upper_layers, self._states).upper
        return Halves(upper, model, model.digest, model.name)
