"""What is changed: a LoRA patch over a frozen model, or a model's own weights.

Shapes: B examples, T positions, V words; K positions, those where any row's next token is an answer's.

Rules: what trains is what requires a gradient, and it must be in float32: in half precision an update of
an unlearning's size rounds away. Of a patched model only LoRA tensors may train. The reference is the
model as it was: the patched model with its patch disabled, so that one copy of the base serves both;
else a frozen copy, made only if a method asks for it. Dropout is off, in the current model as in the
reference: a comparison must see two models, not noise. Logits are computed at the K positions alone.

Not covered: a patch on top of other active adapters (disabling the patch disables them all); models
over several devices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from approx.evaluation.answers import AnswerBatch, sum_logprobs_B
from approx.methods.method import Rows
from sisa.core.errors import IntegrityError, InvalidInput, Problem

TargetKind = Literal["patch", "full weights"]


class Target:
    """A model with what trains in it, by name."""

    def __init__(self, model: Any, *, with_reference: bool) -> None:
        """Raises InvalidInput when nothing trains, or what trains is not in float32 or not the patch's.

        `with_reference`: whether the reference will be asked; it is the model as it is now.
        """
        self.model = model.eval()
        self.kind: TargetKind = "patch" if isinstance(model, PeftModel) else "full weights"
        named = model.named_parameters()
        self.trained: dict[str, torch.nn.Parameter] = {n: p for n, p in named if p.requires_grad}
        _refuse_untrainable(self.trained, self.kind)
        self._frozen = None
        if with_reference and self.kind == "full weights":
            self._frozen = copy.deepcopy(model).requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, the patch among them; tied ones once."""
        return sum(each.numel() for each in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """Parameters that train."""
        return sum(each.numel() for each in self.trained.values())

    def reference_answers_B(self, batch: AnswerBatch) -> Tensor:
        """The reference's log-probability of each whole answer."""
        cut, columns_K = batch.to(self.model.device).at_answers()
        return sum_logprobs_B(self._reference(cut.ids_BT1, columns_K), cut)

    def rows(
        self, batch: AnswerBatch, *, compare: bool, reference_answers_B: Tensor | None = None
    ) -> Rows:
        """A batch, cut to its answer positions, with logits."""
        cut, columns_K = batch.to(self.model.device).at_answers()
        reference_BKV = self._reference(cut.ids_BT1, columns_K) if compare else None
        return Rows(cut, _logits(self.model, cut.ids_BT1, columns_K), reference_BKV, reference_answers_B)

    def _reference(self, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
        with torch.no_grad():
            if self._frozen is not None:
                return _logits(self._frozen, ids_BT1, columns_K)
            with self.model.disable_adapter():
                return _logits(self.model, ids_BT1, columns_K)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of what trains."""
        return {name: each.detach().clone() for name, each in self.trained.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place of what trains. Raises IntegrityError when they do not fit."""
        expected = {name: each.shape for name, each in self.trained.items()}
        if expected != {name: each.shape for name, each in tensors.items()}:
            raise IntegrityError(
                "held weights are not of this model's names and shapes",
                expected=f"{len(expected)} tensors",
                got=f"{len(tensors)} tensors",
                next_step="give the model that the run was started with",
            )
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(tensors[name])


def _logits(model: Any, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT1, logits_to_keep=columns_K, use_cache=False).logits
    return logits


def _refuse_untrainable(trained: Mapping[str, torch.nn.Parameter], kind: TargetKind) -> None:
    problems = [Problem("model", "no parameter requires a gradient")] if not trained else []
    for name, each in trained.items():
        if each.dtype != torch.float32:
            problems.append(Problem(name, f"is in {each.dtype}, where small updates round away"))
        if kind == "patch" and "lora_" not in name:
            problems.append(Problem(name, "would train, and is no part of a LoRA patch"))
    if problems:
        raise InvalidInput(
            "nothing can be unlearned in this model as it is",
            where=kind,
            expected="float32 parameters that require a gradient; in a patched model the patch's alone",
            next_step="freeze the base under a patch, or load the weights in float32",
            problems=problems,
        )
