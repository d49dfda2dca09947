"""The optimizer steps of one stage: which records each of them trains on, and how far the stage is.

Steps are a pure function of the stage's records, its passes and its seed. Each pass has its own order,
by the hash of seed, shard, slice, pass and the record's keyed digest, so neither the order of arrival
nor another shard matters. A fractional last pass is a prefix of its order, so a stage presents exactly
`record_epochs(job)` records. A pass is cut into optimizer steps; only its last step may be smaller.

The steps do not group records by length: steps of long records alone give each of their tokens less
weight and ended at a higher loss. Within a step, records are sorted by length and cut into
micro-batches; this saves padding and does not change the sum.

>>> stage_steps(["a", "b", "c"], [5, 2, 2], (3, 2), micro_batch_size=2, per_step=1, seed=0, shard=0,
...             slice_=0)
[[[1, 0]], [[2]], [[2, 0]]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from sisa.core.domain import presentations
from sisa.core.ports import Tick


def stage_steps(
    id_digests: Sequence[str],
    lengths: Sequence[int],
    passes: tuple[int, int],
    *,
    micro_batch_size: int,
    per_step: int,
    seed: int,
    shard: int,
    slice_: int,
) -> list[list[list[int]]]:
    """Return the record indices of each step: up to `per_step` micro-batches a step, pass after pass.

    `passes` is an exact fraction; `lengths` are in tokens.
    """
    steps: list[list[list[int]]] = []
    remaining = presentations(passes, len(id_digests))
    number = 0
    while remaining > 0:
        salt = f"{seed}|{shard}|{slice_}|{number}"
        order = sorted(range(len(id_digests)), key=lambda i: _hash(salt, id_digests[i]))
        order = order[:remaining]
        for step in _cut(order, micro_batch_size * per_step):
            step.sort(key=lambda i: (lengths[i], id_digests[i]))
            steps.append(_cut(step, micro_batch_size))
        remaining -= len(order)
        number += 1
    return steps


def _cut(whole: list[int], size: int) -> list[list[int]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _hash(salt: str, name: str) -> bytes:
    return hashlib.sha256(f"{salt}|{name}".encode()).digest()


class Ticks:
    """The progress of a stage: a `Tick` before its first step and after each one.

    A step belongs to the pass of its last record. The tick that ends a pass carries the mean loss of the
    whole pass; losses of single steps or records are not reported.

    >>> ticks = Ticks([(2, 10), (1, 5), (2, 8)], num_records=3)
    >>> first, second = ticks.before(), ticks.after(6.0, 3)
    >>> second.step, second.tokens, second.total_tokens, second.epoch, second.loss
    (1, 10, 23, 1, None)
    >>> third = ticks.after(6.0, 1)
    >>> third.epoch, third.num_records, third.loss
    (1, 3, 3.0)
    >>> last = ticks.after(1.0, 2)
    >>> last.epoch, last.num_epochs, last.num_records, last.loss
    (2, 2, 2, 0.5)
    """

    def __init__(self, steps: Sequence[tuple[int, int]], num_records: int) -> None:
        """`steps` are the numbers of (records, tokens) that each step trains on."""
        ends = accumulate(records for records, _ in steps)
        self._steps = steps
        self._epochs = [(end - 1) // num_records + 1 for end in ends]
        self._total = sum(tokens for _, tokens in steps)
        self._step = self._tokens = self._records = self._labels = 0
        self._loss = 0.0

    def before(self) -> Tick:
        """Return the tick before the first step."""
        return self._tick()

    def after(self, loss: float, num_labels: int) -> Tick:
        """Return the tick after the next step, given its loss summed over `num_labels` label tokens."""
        records, tokens = self._steps[self._step]
        self._step += 1
        self._tokens += tokens
        self._records += records
        self._labels += num_labels
        self._loss += loss
        if self._epochs[self._step : self._step + 1] == [self._epochs[self._step - 1]]:
            return self._tick()
        tick = self._tick(self._records, self._loss / max(1, self._labels))
        self._records = self._labels = 0
        self._loss = 0.0
        return tick

    def _tick(self, num_records: int = 0, loss: float | None = None) -> Tick:
        at = max(0, self._step - 1)
        epoch, last = (self._epochs[at], self._epochs[-1]) if self._epochs else (0, 0)
        return Tick(
            self._tokens, self._total, self._step, len(self._steps), epoch, last, num_records, loss
        )
