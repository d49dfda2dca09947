"""A base with the adapter to train: a pattern from which each stage gets modules of its own.

Wrapping a base and finding out how it can be run costs as much as some training steps, and nearly all
stages of a process wrap it alike. So the pattern is kept but never run: a stage trains a copy that
shares only the frozen tensors. Whatever a stage leaves behind (the memory layout of trained tensors,
rotary frequencies that grew with a long text, running statistics, gradients) disappears with its copy,
so no bit of a stage depends on what the process trained before.

    wrapped = Trainable(base, training)
    trained = wrapped.begin(parent_tensors, init_seed=7)    # name -> parameter

Adapted linear modules run as one autograd function with a backward of its own:

    y = x W + bias + s (x A) B        gradients: of A and B, and of x if the layer below needs it

The modules, their names and their tensors remain peft's; only `forward` is replaced. Nothing is saved
for the gradient of W, which is frozen. The function computes what peft's forward and autograd compute,
with sums in another order: thin products have the rank on the left, and what is added to y and to the
gradient of x is added in place. The adapter's part is in float32 whatever the base's dtype. Modules
other than Linear and Conv1D keep peft's forward.

Legend: N rows (batch times positions), I and O features, R rank. Source: LoRA, Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sisa.core.digest import canonical_json
from sisa.lm.base.adapter import (
    DEFAULT_NAME,
    attach,
    draw,
    first_adapted,
    lora_config,
    put_tensors,
    train_block,
)
from sisa.lm.base.weights import own_modules
from sisa.lm.train.frozen_prefix import FrozenLayers
from sisa.lm.train.losses import loss_form


class _Adapted(torch.autograd.Function):
    """The function of a linear module with an adapter.

    x [N, I], dropped x or None without dropout, weight [O, I], bias [O] or None, A [R, I], B [O, R],
    scale -> y [N, O].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        dropped_NI: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        y_NO = torch.nn.functional.linear(x_NI, weight_OI, bias_O)
        low_NI = x_NI if dropped_NI is None else dropped_NI
        low_RN = (a_RI @ low_NI.t().to(a_RI.dtype)).mul_(scale)
        ctx.save_for_backward(low_NI, weight_OI, a_RI, b_OR, low_RN)
        ctx.scale, ctx.dropped = scale, dropped_NI is not None
        return _added(y_NO, low_RN.t(), b_OR.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NO,) = gradients
        low_NI, weight_OI, a_RI, b_OR, low_RN = ctx.saved_tensors
        of_x, of_dropped, _, _, of_a, of_b, _ = ctx.needs_input_grad
        wide_NO = gradient_NO.to(b_OR.dtype)
        x_NI = dropped_NI = of_a_RI = of_b_OR = None
        if of_b:
            of_b_OR = (low_RN @ wide_NO).t()
        if of_a or of_x or of_dropped:
            up_NR = (wide_NO @ b_OR).mul_(ctx.scale)
            if of_a:
                of_a_RI = up_NR.t() @ low_NI.to(a_RI.dtype)
        if of_x:
            x_NI = gradient_NO @ weight_OI
            if not ctx.dropped:
                x_NI = _added(x_NI, up_NR, a_RI)
        if of_dropped:
            dropped_NI = (up_NR @ a_RI).to(low_NI.dtype)
        return x_NI, dropped_NI, None, None, of_a_RI, of_b_OR, None


def _added(to: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `to` with a product added to it: in place, unless `to` is in another dtype."""
    if to.dtype == right.dtype:
        return to.addmm_(left, right)
    return torch.addmm(to.to(right.dtype), left, right).to(to.dtype)


class TrainedLinear(lora_layer.Linear):  # type: ignore[misc]
    """peft's module with the forward above."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., I] to y [..., O]."""
        base, dropout = self.base_layer, self.lora_dropout[DEFAULT_NAME]
        weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
        a, b = self.lora_A[DEFAULT_NAME].weight, self.lora_B[DEFAULT_NAME].weight
        x_NI = x.reshape(-1, x.shape[-1])
        drops = isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and dropout.training
        dropped_NI = dropout(x_NI) if drops else None
        y_NO = _Adapted.apply(  # type: ignore[no-untyped-call]
            x_NI, dropped_NI, weight_OI, base.bias, a, b, self.scaling[DEFAULT_NAME]
        )
        y: Tensor = y_NO.view(*x.shape[:-1], -1)
        return y


def use_fused_linear(model: Any) -> None:
    """Turn the adapted linear modules of a wrapped base into `TrainedLinear`s."""
    for module in model.modules():
        if type(module) is lora_layer.Linear and type(module.base_layer) in (torch.nn.Linear, Conv1D):
            module.__class__ = TrainedLinear


KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "sequence_len")


def pattern_key(training: Mapping[str, Any]) -> bytes:
    """Return the key of a pattern: stages with equal keys share it."""
    return canonical_json({name: training.get(name) for name in KEYS})


class Trainable:
    """A wrapped base, ready for training. The base's modules must be the caller's own."""

    def __init__(self, base: Any, training: Mapping[str, Any]) -> None:
        """Wrap a base. Raise InvalidInput if it lacks modules or layers, or they can't be run apart."""
        self.dtype, self.first = base.dtype, first_adapted(training, base)
        self._pattern = attach(base, lora_config(training, base), None, init_seed=0)
        use_fused_linear(self._pattern)
        self._pattern.eval()
        probed = own_modules(self._pattern).get_base_model()
        self.form = loss_form(probed, training["sequence_len"])
        if self.first:
            FrozenLayers(probed, self.first).check(training["sequence_len"])
        self.model: Any = None
        self.lower: FrozenLayers | None = None

    def begin(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        init_seed: int,
        block: tuple[int, int] | None = None,
    ) -> dict[str, torch.nn.Parameter]:
        """Return the parameters to train, by name, with the values of `tensors` or drawn from the seed.

        They belong to a new copy, which replaces `model` and `lower`. `block` is (number of blocks of
        layers, block to train); the other blocks are frozen. Raise IntegrityError unless the tensors
        are exactly the adapter's.
        """
        self.model = self.lower = None  # one copy at a time is in memory
        self.model = own_modules(self._pattern).train()
        if self.first:
            self.lower = FrozenLayers(self.model.get_base_model(), self.first)
        if tensors is None:
            draw(self.model, init_seed)
        else:
            put_tensors(self.model, tensors)
        if block is not None:
            train_block(self.model, *block)
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}


def file_name(parameter: str) -> str:
    """Return a parameter's name in the adapter's file, which leaves the adapter's own name out."""
    return parameter.replace(f".{DEFAULT_NAME}.", ".")
