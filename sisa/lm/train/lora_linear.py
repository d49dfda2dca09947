"""Adapted linear modules, each run as one autograd function with a backward of its own.

    y = x W + bias + s (x A) B        gradients: of A and B, and of x if the layer below needs it

The modules, their names and their tensors remain peft's; only `forward` is replaced. Nothing is saved
for the gradient of W, which is frozen. The function computes what peft's forward and autograd compute,
with sums in another order: thin products have the rank on the left, and what is added to y and to the
gradient of x is added in place. The adapter's part is in float32 whatever the base's dtype. Modules
other than Linear and Conv1D keep peft's forward.

A forward may compute several adapters side by side (`lanes.py`): their rows lie end to end, x W runs
over all of them, and everything of an adapter over its own rows, with the shapes it has alone.

Legend: N rows (batch times positions), M of them of one lane, I and O features, R rank. Source: LoRA,
Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sisa.lm.base.adapter import DEFAULT_NAME


class _Adapted(torch.autograd.Function):
    """The function of a linear module with an adapter for each lane, whose rows lie end to end.

    x [N, I], dropped x (without padding) or None without dropout, weight [O, I], bias [O] or None,
    scale, rows of each lane, then A [R, I] and B [O, R] of each lane -> y [N, O].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        dropped_NI: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scale: float,
        rows: list[int],
        *adapters: Tensor,
    ) -> Tensor:
        y_NO = torch.nn.functional.linear(x_NI, weight_OI, bias_O)
        low_NI = x_NI if dropped_NI is None else dropped_NI
        lows = []
        each_lane = zip(*(_parts(each, rows) for each in (y_NO, low_NI)), _pairs(adapters), strict=True)
        for y_MO, low_MI, (a_RI, b_OR) in each_lane:
            lows.append((a_RI @ low_MI.t().to(a_RI.dtype)).mul_(scale))
            _add(y_MO, lows[-1].t(), b_OR.t())
        ctx.save_for_backward(low_NI, weight_OI, *lows, *adapters)
        ctx.scale, ctx.rows, ctx.dropped = scale, rows, dropped_NI is not None
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NO,) = gradients
        low_NI, weight_OI, *saved = ctx.saved_tensors
        rows, lows = ctx.rows, saved[: len(ctx.rows)]
        of_x, of_dropped, _, _, _, _, *of_adapters = ctx.needs_input_grad
        x_NI = gradient_NO @ weight_OI if of_x else gradient_NO
        of_lanes, dropped = list[Tensor | None](), list[Tensor]()
        each_lane = zip(
            *(_parts(each, rows) for each in (gradient_NO, x_NI, low_NI)),
            *(lows, _pairs(saved[len(rows) :]), _pairs(of_adapters)),
            strict=True,
        )
        for gradient_MO, x_MI, low_MI, low_RM, (a_RI, b_OR), (of_a, of_b) in each_lane:
            wide_MO = gradient_MO.to(b_OR.dtype)
            of_a_RI = None
            if of_a or of_x or of_dropped:
                up_MR = (wide_MO @ b_OR).mul_(ctx.scale)
                if of_a:
                    of_a_RI = up_MR.t() @ low_MI.to(a_RI.dtype)
                if of_x and not ctx.dropped:
                    _add(x_MI, up_MR, a_RI)
                if of_dropped:
                    dropped.append((up_MR @ a_RI).to(low_MI.dtype))
            of_lanes += [of_a_RI, (low_RM @ wide_MO).t() if of_b else None]
        dropped_NI = torch.cat(dropped) if len(dropped) > 1 else next(iter(dropped), None)
        return x_NI if of_x else None, dropped_NI, None, None, None, None, *of_lanes


def _parts(each_NI: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """Return the rows of each lane, without those of padding behind them."""
    if len(rows) == 1 and rows[0] == each_NI.shape[0]:
        return [each_NI]  # views cost 60 microseconds a module and step
    return torch.split(each_NI[: sum(rows)], list(rows))


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _add(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to `to`, in the product's dtype."""
    if to.dtype == right.dtype:
        to.addmm_(left, right)
    else:
        to.copy_(torch.addmm(to.to(right.dtype), left, right))


@dataclass
class Lane:
    """One adapter's part of a forward: its rows, its adapted modules, and the state of its dropout."""

    rows: int
    linears: Sequence[TrainedLinear]
    rng_state: Tensor

    def dropped(self, dropout: Any, x_MI: Tensor) -> Tensor:
        """Return rows after dropout, drawn after what this lane drew before."""
        cuda = x_MI.device.type == "cuda"
        generator = torch.cuda.default_generators[x_MI.device.index] if cuda else torch.default_generator
        generator.set_state(self.rng_state)
        found: Tensor = dropout(x_MI)
        self.rng_state = generator.get_state()
        return found


_lanes: ContextVar[Sequence[Lane]] = ContextVar("lanes", default=())


@contextmanager
def side_by_side(lanes: Sequence[Lane]) -> Iterator[None]:
    """Make forwards of one lane's model compute all lanes, whose rows lie end to end."""
    token = _lanes.set(lanes)
    try:
        yield
    finally:
        _lanes.reset(token)


class TrainedLinear(lora_layer.Linear):  # type: ignore[misc]
    """peft's module with the forward above."""

    number: int  # among the adapted modules of its model

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., I] to y [..., O]."""
        base, dropout = self.base_layer, self.lora_dropout[DEFAULT_NAME]
        weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
        x_NI = x.reshape(-1, x.shape[-1])
        lanes = _lanes.get()
        rows = [each.rows for each in lanes] or [len(x_NI)]
        dropped_NI = None
        if isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and dropout.training:
            parts = zip(lanes, _parts(x_NI, rows), strict=False)
            dropped = [lane.dropped(dropout, part_MI) for lane, part_MI in parts]
            dropped_NI = torch.cat(dropped) if lanes else dropout(x_NI)
        modules = [each.linears[self.number] for each in lanes] or [self]
        adapters = [side[DEFAULT_NAME].weight for each in modules for side in (each.lora_A, each.lora_B)]
        y_NO = _Adapted.apply(  # type: ignore[no-untyped-call]
            x_NI, dropped_NI, weight_OI, base.bias, self.scaling[DEFAULT_NAME], rows, *adapters
        )
        y: Tensor = y_NO.view(*x.shape[:-1], -1)
        return y


def use_fused_linear(model: Any) -> None:
    """Make the adapted linear modules of a wrapped base `TrainedLinear`s."""
    for module in model.modules():
        if type(module) is lora_layer.Linear and type(module.base_layer) in (torch.nn.Linear, Conv1D):
            module.__class__ = TrainedLinear
    for number, module in enumerate(trained_linears(model)):
        module.number = number


def trained_linears(model: Any) -> list[TrainedLinear]:
    """Return the adapted linear modules of a model with the forward above."""
    return [each for each in model.modules() if isinstance(each, TrainedLinear)]
