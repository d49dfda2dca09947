"""How far a stage is after each of its steps, and the mean loss of each of its passes.

Rules: a step is of the pass that its last record is of; a pass ends with its last step. Losses are told
as means over a whole pass, never of a step or of a record. Nothing here reaches the bits.

Not covered: time, and who listens (`sisa/flows/serial.py`).

>>> ticks = Ticks([(2, 10), (1, 5), (2, 8)], num_records=3)
>>> ticks.before()
Tick(tokens=0, total_tokens=23, step=0, num_steps=3, epoch=1, num_epochs=2, num_records=0, loss=None)
>>> ticks.after(6.0, 3)
Tick(tokens=10, total_tokens=23, step=1, num_steps=3, epoch=1, num_epochs=2, num_records=0, loss=None)
>>> ticks.after(6.0, 1)
Tick(tokens=15, total_tokens=23, step=2, num_steps=3, epoch=1, num_epochs=2, num_records=3, loss=3.0)
>>> ticks.after(1.0, 2)
Tick(tokens=23, total_tokens=23, step=3, num_steps=3, epoch=2, num_epochs=2, num_records=2, loss=0.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from sisa.core.ports import Tick


class Ticks:
    """The ticks of a stage whose steps present so many (records, tokens) each."""

    def __init__(self, steps: Sequence[tuple[int, int]], num_records: int) -> None:
        ends = accumulate(records for records, _ in steps)
        self._steps = steps
        self._epochs = [(end - 1) // num_records + 1 for end in ends]
        self._total = sum(tokens for _, tokens in steps)
        self._step = self._tokens = self._records = self._labels = 0
        self._loss = 0.0

    def before(self) -> Tick:
        """Before the first step."""
        return self._tick()

    def after(self, loss: float, num_labels: int) -> Tick:
        """After the next step, whose loss is summed over so many label tokens."""
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
