"""Lanes: micro-batches of several stages in one forward and backward through the frozen base.

A small batch wastes a processor, which reads all of the base's weights for a few rows. So the stages of
several shards may wait with a micro-batch each, and these are computed together. All of their records
lie end to end in one row, as those of a single micro-batch do:

    frozen linear maps, the head's too    over all rows at once
    attention                             record by record
    norms, activations, rotary positions  row by row
    adapters' products, dropout, losses   lane by lane, with the shapes that a lane has alone

No sum runs across lanes, so a stage has the bits of training alone if no bit of a row depends on the
rows beside it, or on how many there are. Not every kernel guarantees that: MKL multiplies fewer than 16
rows in another way than more, and for some shapes also more than 200. So two tests run on this machine,
with the base's own shapes and dtype, before anything is computed together (`lane_trial.py`). Rows that
are computed together are padded to a multiple of 32, so that few numbers occur. Lanes therefore only
change the schedule, and no bit.

    compute([each])                       # a micro-batch alone

Source: several adapters on one base, mLoRA (Ye et al. 2023) and Punica (Chen et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sisa.core.domain import SliceJob
from sisa.core.errors import InvalidInput
from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.frozen_layers import HiddenStateCache
from sisa.lm.train.lora_linear import Lane, side_by_side
from sisa.lm.train.losses import Batch, grouped, padded_rows, summed_losses
from sisa.lm.train.trainable import StageModel, Trainable

_T = TypeVar("_T")

# More rows gain nothing on a core, whose products are fast from about 200 rows on.
LANE_ROWS = {"cpu": 512, "cuda": 8192}


@dataclass
class MicroBatch:
    """A micro-batch whose loss and gradients a stage waits for."""

    job: SliceJob
    wrapped: Trainable
    own: StageModel
    hidden_states: HiddenStateCache
    batch: Batch
    num_labels: int  # of the whole optimizer step
    seed: int  # of dropout
    loss: float = field(default=math.nan)  # divided by `num_labels`, once it is computed

    @property
    def rows(self) -> int:
        return sum(len(each.input_ids) for each in self.batch)


def compute(waiting: Sequence[MicroBatch]) -> None:
    """Set each loss and add to the gradients; compute together what keeps its bits.

    Raise InvalidInput for a loss that is not finite.
    """
    first = waiting[0]
    if first.wrapped.row_tests is None or any(each.wrapped is not first.wrapped for each in waiting):
        groups = [[number] for number in range(len(waiting))]
    else:
        most = LANE_ROWS[first.own.model.device.type]
        groups = grouped([each.rows for each in waiting], most, first.wrapped.row_tests.layers)
    for group in groups:
        _compute([waiting[number] for number in group])


def _compute(group: Sequence[MicroBatch]) -> None:
    first, rows = group[0], sum(each.rows for each in group)
    spare = padded_rows(rows) - rows if len(group) > 1 else 0
    batches = [each.batch for each in group]
    if spare:
        batches.append([Tokens([0] * spare, [NO_LOSS] * spare)])
    skipped: AbstractContextManager[None] = nullcontext()
    if first.own.frozen is not None:
        states = [states_TH for each in group for states_TH in _entering_states(each)]
        if spare:
            states.append(torch.zeros(spare, states[0].shape[1], dtype=states[0].dtype))
        skipped = first.own.frozen.skipped(states, packed=first.wrapped.form.packed)
    head_test = first.wrapped.row_tests.head if first.wrapped.row_tests else None
    with skipped, side_by_side(_seed_dropout(group)):
        losses = summed_losses(first.own.model, batches, first.wrapped.form, head_test)
    means = [loss / each.num_labels for each, loss in zip(group, losses, strict=False)]
    for each, mean in zip(group, means, strict=True):
        each.loss = _finite(mean, each.job)
    torch.autograd.backward(means)


def finish(stage: Generator[MicroBatch, None, _T]) -> _T:
    """Compute each micro-batch of a stage alone; return what the stage returns."""
    while True:
        try:
            compute([next(stage)])
        except StopIteration as end:
            found: _T = end.value
            return found


def _entering_states(each: MicroBatch) -> list[Tensor]:
    """Return the states [T, H] of each record that enter the lowest adapted layer, if any is frozen."""
    if each.own.frozen is None:
        return []
    return [each.hidden_states.states(each.own.frozen, record.input_ids) for record in each.batch]


def _seed_dropout(group: Sequence[MicroBatch]) -> list[Lane]:
    """Return lanes, each with its own dropout; for a micro-batch alone, seed torch and return none."""
    if len(group) == 1:
        torch.manual_seed(group[0].seed)
        return []
    device = group[0].own.model.device
    states = [torch.Generator(device).manual_seed(each.seed).get_state() for each in group]
    return [Lane(each.rows, each.own.linears, at) for each, at in zip(group, states, strict=True)]


def _finite(loss: Tensor, job: SliceJob) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise InvalidInput(
            "training diverged: the loss is not a finite number",
            where=f"shard {job.shard}, slice {job.slice}",
            got=str(value),
            next_step="lower learning_rate in the run file",
        )
    return value
