"""The steps of a stage: the records of each micro-batch, and the progress over them.

Steps are a pure function of the job and the stage's records. Each pass has its own order, by the hash of
seed, shard, slice, pass and the record's keyed digest, so neither the order of arrival nor another shard
matters. A fractional last pass is a prefix of its order, so a stage presents exactly
`record_epochs(job)` records. A pass is cut into optimizer steps; only its last step may be smaller.

The steps do not group records by length: steps of long records alone give each of their tokens less
weight and ended at a higher loss. Within a step, records are sorted by length and cut into
micro-batches; this saves padding and does not change the sum.

>>> training = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "seed": 0}
>>> job = SliceJob(0, 0, None, (), 3, (3, 2), training, "base", "fingerprint")
>>> stage_steps(job, ["a", "b", "c"], [5, 2, 2])
[[[1, 0]], [[2]], [[2, 0]]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from sisa.core.domain import SliceJob, record_epochs
from sisa.core.ports import Tick


def stage_steps(
    job: SliceJob, id_digests: Sequence[str], lengths: Sequence[int]
) -> list[list[list[int]]]:
    """Return the record indices of each micro-batch of each step, pass after pass.

    `id_digests` and `lengths`, in tokens, are those of the stage's records.
    """
    steps: list[list[list[int]]] = []
    size = job.training["micro_batch_size"]
    remaining, number = record_epochs(job), 0
    while remaining > 0:
        salt = f"{job.training['seed']}|{job.shard}|{job.slice}|{number}"
        hashes = [hashlib.sha256(f"{salt}|{each}".encode()).digest() for each in id_digests]
        order = sorted(range(len(hashes)), key=hashes.__getitem__)[:remaining]
        for step in _cut(order, size * job.training["gradient_accumulation_steps"]):
            step.sort(key=lambda i: (lengths[i], id_digests[i]))
            steps.append(_cut(step, size))
        remaining -= len(order)
        number += 1
    return steps


def _cut(whole: list[int], size: int) -> list[list[int]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class Ticks:
    """The progress of a stage: a `Tick` before its first step and after each one.

    A step belongs to the pass of its last record. The tick that ends a pass carries the mean loss of the
    whole pass; losses of single steps or records are not reported.

    >>> ticks = Ticks([[5, 5], [5], [4, 4]], num_records=3)
    >>> first, second = ticks.after(6.0, 3), ticks.after(6.0, 1)
    >>> first.step, first.tokens, first.total_tokens, first.epoch, first.loss
    (1, 10, 23, 1, None)
    >>> second.epoch, second.num_epochs, second.num_records, second.loss
    (1, 2, 3, 3.0)
    """

    def __init__(self, steps: Sequence[Sequence[int]], num_records: int) -> None:
        """Count from the start. `steps` are the lengths in tokens of each step's records."""
        self._steps = steps
        self._epochs = [(end - 1) // num_records + 1 for end in accumulate(map(len, steps))]
        self._total = sum(map(sum, steps))
        self._step = self._tokens = self._records = self._labels = 0
        self._loss = 0.0

    def after(self, loss: float, num_labels: int) -> Tick:
        """Return the tick after the next step, given its loss summed over `num_labels` label tokens."""
        lengths = self._steps[self._step]
        self._step += 1
        self._tokens += sum(lengths)
        self._records += len(lengths)
        self._labels += num_labels
        self._loss += loss
        if self._epochs[self._step : self._step + 1] == [self._epochs[self._step - 1]]:
            return self.now()
        tick = self.now(self._records, self._loss / max(1, self._labels))
        self._records = self._labels = 0
        self._loss = 0.0
        return tick

    def now(self, num_records: int = 0, loss: float | None = None) -> Tick:
        """Return the tick after the steps so far."""
        at = max(0, self._step - 1)
        epoch, last = (self._epochs[at], self._epochs[-1]) if self._epochs else (0, 0)
        return Tick(
            self._tokens, self._total, self._step, len(self._steps), epoch, last, num_records, loss
        )
