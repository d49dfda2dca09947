"""The model that is changed: a LoRA patch over frozen weights, or a model's own weights.

Shapes: B examples, T positions, V words; K positions where the next token of some row belongs to an
answer.

The parameters that require a gradient are trained. They must be in float32, because in half precision
updates of this size round away; in a patched model only LoRA tensors may train. The reference is the
model before the run: a patched model with its patch disabled, so that one copy of the base serves both,
or a frozen copy, made only if the method compares with it. Dropout is off in both, so that they differ
in their weights only. Logits are computed at the K positions only.

A patch over other active adapters is not supported (disabling it disables them all), nor is a model
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
    """A model and its trained parameters by name."""

    def __init__(self, model: Any, *, with_reference: bool) -> None:
        """Wrap a model; with `with_reference`, keep it as it is now for comparison.

        Raise InvalidInput if nothing trains, or if a trained parameter is not in float32 or not the
        patch's.
        """
        self.model = model.eval()
        self.kind: TargetKind = "patch" if isinstance(model, PeftModel) else "full weights"
        named = model.named_parameters()
        self.trained: dict[str, torch.nn.Parameter] = {n: p for n, p in named if p.requires_grad}
        _check_trainable(self.trained, self.kind)
        self._frozen = None
        if with_reference and self.kind == "full weights":
            self._frozen = copy.deepcopy(model).requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model with its patch; tied ones count once."""
        return sum(each.numel() for each in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """Return the number of parameters that train."""
        return sum(each.numel() for each in self.trained.values())

    def reference_answers_B(self, batch: AnswerBatch) -> Tensor:
        """Return the reference's log-probability of each whole answer."""
        cut, columns_K = batch.to(self.model.device).at_answers()
        return sum_logprobs_B(self._reference(cut.ids_BT1, columns_K), cut)

    def rows(
        self, batch: AnswerBatch, *, compare: bool, reference_answers_B: Tensor | None = None
    ) -> Rows:
        """Return a batch, cut to its answer positions, with logits."""
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


def _logits(model: Any, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT1, logits_to_keep=columns_K, use_cache=False).logits
    return logits


def _check_trainable(trained: Mapping[str, torch.nn.Parameter], kind: TargetKind) -> None:
    problems = [Problem("model", "no parameter requires a gradient")] if not trained else []
    for name, each in trained.items():
        if each.dtype != torch.float32:
            problems.append(Problem(name, f"is in {each.dtype}, where small updates round away"))
        if kind == "patch" and "lora_" not in name:
            problems.append(Problem(name, "would be trained and is not part of a LoRA patch"))
    if problems:
        raise InvalidInput(
            "nothing can be unlearned in this model as it is",
            where=kind,
            expected="float32 parameters that require a gradient; in a patched model the patch's alone",
            next_step="freeze the base under a patch, or load the weights in float32",
            problems=problems,
        )
