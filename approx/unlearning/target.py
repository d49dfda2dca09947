"""The model that is changed: a LoRA patch over frozen weights.

Shapes: B examples, T positions, V words or a layer's units; K positions where the next token of some
row belongs to an answer.

The LoRA tensors that require a gradient are trained, and no other may require one. They must be in
float32, because in half precision updates of this size round away. The reference is the model before the
run: the patch disabled, so that one copy of the base serves both. Dropout is off in both, so that they
differ in their weights only. Logits are computed at the K positions only.

A patch over other active adapters is not supported (disabling it disables them all).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import AnswerBatch, logits_at, sum_logprobs_B
from approx.unlearning.compute import Compute, peak_memory_bytes
from approx.unlearning.hidden_states import hidden_at
from sisa.core.errors import IntegrityError, InvalidInput, Problem

SECOND_FACTORS = ("lora_B.", "lora_embedding_B.")


@dataclass(frozen=True)
class Rows:
    """Examples of one role with their current logits, and the reference's where the method compares.

    For a method that acts at a layer, the layer's hidden states are in place of logits: V units.
    """

    batch: AnswerBatch
    current_BTV: Tensor
    reference_BTV: Tensor | None = None
    reference_answers_B: Tensor | None = None

    @property
    def compared_BTV(self) -> Tensor:
        """Return the reference's logits. Raise ValueError if the caller left them out."""
        if self.reference_BTV is None:
            raise ValueError("this loss compares with a reference, whose logits were not given")
        return self.reference_BTV

    @property
    def log_ratios_B(self) -> Tensor:
        """Return log(p_current(answer) / p_reference(answer)) of each whole answer."""
        reference_B = self.reference_answers_B
        if reference_B is None:
            reference_B = sum_logprobs_B(self.compared_BTV, self.batch)
        return sum_logprobs_B(self.current_BTV, self.batch) - reference_B


class Target:
    """A PEFT model and its trained parameters by name."""

    def __init__(self, model: Any) -> None:
        """Wrap a model. Raise InvalidInput if nothing trains, or more than a patch in float32."""
        self.model = model.eval()
        named = model.named_parameters()
        self.trained: dict[str, torch.nn.Parameter] = {n: p for n, p in named if p.requires_grad}
        _check_trainable(self.trained)

    def reference_answers_B(self, batch: AnswerBatch) -> Tensor:
        """Return the reference's log-probability of each whole answer."""
        cut, columns_K = batch.to(self.model.device).at_answers()
        return sum_logprobs_B(self._reference(cut.ids_BT1, columns_K), cut)

    def rows(
        self,
        batch: AnswerBatch,
        *,
        compare: bool,
        reference_answers_B: Tensor | None = None,
        layer: int | None = None,
    ) -> Rows:
        """Return a batch, cut to its answer positions, with logits or a layer's hidden states."""
        cut, columns_K = batch.to(self.model.device).at_answers()
        reference_BKV = self._reference(cut.ids_BT1, columns_K, layer) if compare else None
        current_BKV = self._values(cut.ids_BT1, columns_K, layer)
        return Rows(cut, current_BKV, reference_BKV, reference_answers_B)

    def _reference(self, ids_BT1: Tensor, columns_K: Tensor, layer: int | None = None) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            return self._values(ids_BT1, columns_K, layer)

    def _values(self, ids_BT1: Tensor, columns_K: Tensor, layer: int | None) -> Tensor:
        if layer is None:
            return logits_at(self.model, ids_BT1, columns_K)
        return hidden_at(self.model, layer, ids_BT1, columns_K)

    def compute(self, *, tokens_trained: int, tokens_forward: int, seconds: float) -> Compute:
        """Return the cost of a run on this model."""
        return Compute(
            num_parameters=sum(each.numel() for each in self.model.parameters()),
            num_trained=sum(each.numel() for each in self.trained.values()),
            tokens_trained=tokens_trained,
            tokens_forward=tokens_forward,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters."""
        return {name: each.detach().clone() for name, each in self.trained.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the trained parameters. Raise IntegrityError for tensors that do not fit."""
        expected = {name: each.shape for name, each in self.trained.items()}
        if expected != {name: each.shape for name, each in tensors.items()}:
            raise IntegrityError(
                "saved weights do not have this model's names and shapes",
                expected=f"{len(expected)} tensors",
                got=f"{len(tensors)} tensors",
                next_step="give the model that the run was started with",
            )
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(tensors[name])


def _check_trainable(trained: Mapping[str, torch.nn.Parameter]) -> None:
    problems = [] if trained else [Problem("model", "no parameter requires a gradient")]
    for name, each in trained.items():
        if each.dtype != torch.float32:
            problems.append(Problem(name, f"is in {each.dtype}, where small updates round away"))
        if "lora_" not in name:
            problems.append(Problem(name, "would be trained and is not part of a LoRA patch"))
    if problems:
        raise InvalidInput(
            "nothing can be unlearned in this model as it is",
            where="patch",
            expected="a LoRA patch in float32 that requires a gradient, over a frozen base",
            next_step="freeze the base under a patch, or load the patch in float32",
            problems=problems,
        )


def check_fresh_patch(patch: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput for a patch that already changes the weights."""
    used = [name for name, each in patch.items() if is_second_factor(name) and bool(each.any())]
    if used:
        raise InvalidInput(
            "the method needs a fresh patch, and this one already changes the model",
            where="patch",
            expected="second factors (lora_B) of 0",
            got=f"{len(used)} of them are not 0",
            next_step="start from a new patch",
        )


def is_second_factor(name: str) -> bool:
    return any(part in name for part in SECOND_FACTORS)
