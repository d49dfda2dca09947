"""Progress of long work on standard error: a live bar on a terminal, plain lines elsewhere.

Rules: shards, slices, tokens, steps and time only; never an id or a text. Standard output stays free for
the result. Progress is measured in record-epochs, whose total is known before the first one is trained;
that of a patch in steps.

Not covered: metrics for machines.

>>> meter = Meter()
>>> meter.take(TrainingStarted(((0, 0, 10), (1, 0, 30))), now=0.0)
>>> meter.take(SliceStarted(0, 0, 100), now=1.0)
>>> meter.take(SliceProgress(0, 0, 50, 100), now=2.0)
>>> meter.line(now=2.0)
'shards 0/2, slices 0/2, 12% of record-epochs, 25 tok/s, 0:14 left'
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from sisa.events import (
    Event,
    Notice,
    PatchProgress,
    Report,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)

LINE_EVERY_S = 10.0
Place = tuple[int, int]


class Meter:
    """The state of a training, event by event."""

    def __init__(self) -> None:
        self._stages: dict[Place, int] = {}
        self._fraction: dict[Place, float] = {}
        self._tokens: dict[Place, int] = {}
        self._done: set[Place] = set()
        self._patch: PatchProgress | None = None
        self._first = 0  # the step of a patch at which its clock started
        self._started = 0.0

    def take(self, event: Event, now: float) -> None:
        if isinstance(event, TrainingStarted):
            self.__init__()  # type: ignore[misc]
            self._stages = {(shard, slice_): epochs for shard, slice_, epochs in event.stages}
            self._started = now
        elif isinstance(event, SliceStarted):
            self._fraction[event.shard, event.slice] = 0.0
        elif isinstance(event, SliceProgress):
            self._fraction[event.shard, event.slice] = event.tokens / max(1, event.total_tokens)
            self._tokens[event.shard, event.slice] = event.tokens
        elif isinstance(event, SliceTrained):
            place = (event.job.shard, event.job.slice)
            self._done.add(place)
            self._fraction[place] = 1.0
        elif isinstance(event, PatchProgress):
            if self._patch is None or event.step <= self._patch.step:
                self._started, self._first = now, event.step
            self._patch = event

    @property
    def total(self) -> int:
        if self._patch is not None:
            return self._patch.num_steps
        return sum(self._stages.values())

    @property
    def done(self) -> float:
        if self._patch is not None:
            return self._patch.step
        return sum(self._stages.get(place, 0) * part for place, part in self._fraction.items())

    def line(self, now: float) -> str:
        """One line for a person: shards, slices, share, tokens/s, time left; or steps of a patch."""
        if self._patch is not None:
            return self._patch_line(self._patch, now)
        waiting = {shard for shard, slice_ in self._stages if (shard, slice_) not in self._done}
        shards = {shard for shard, _ in self._stages}
        passed = max(1e-9, now - self._started)
        share = self.done / self.total if self.total else 1.0
        left = "unknown time"
        if self.done:
            seconds = round(passed * (self.total - self.done) / self.done)
            left = f"{seconds // 60}:{seconds % 60:02d}"
        return (
            f"shards {len(shards - waiting)}/{len(shards)}, "
            f"slices {len(self._done)}/{len(self._stages)}, {int(100 * share)}% of record-epochs, "
            f"{sum(self._tokens.values()) / passed:.0f} tok/s, {left} left"
        )

    def _patch_line(self, at: PatchProgress, now: float) -> str:
        left = "unknown time"
        if at.step > self._first:
            seconds = round((now - self._started) * (at.num_steps - at.step) / (at.step - self._first))
            left = f"{seconds // 60}:{seconds % 60:02d}"
        return f"patch (approximate): step {at.step}/{at.num_steps}, loss {at.loss:.4f}, {left} left"


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Report]:
    """A report that shows what it is told on a stream (standard error by default)."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bar(stream) as report:
            yield report
    else:
        yield _lines(stream)


def _lines(stream: TextIO) -> Report:
    meter = Meter()
    last = time.monotonic()

    def report(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        meter.take(event, now)
        if isinstance(event, Notice):
            print(event.text, file=stream, flush=True)
        elif isinstance(event, SliceTrained) or (
            isinstance(event, SliceProgress | PatchProgress) and now - last >= LINE_EVERY_S
        ):
            last = now
            print(meter.line(now), file=stream, flush=True)

    return report


@contextmanager
def _bar(stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    meter = Meter()
    console = Console(file=stream)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(event: Event) -> None:
            now = time.monotonic()
            meter.take(event, now)
            if isinstance(event, Notice):
                console.print(event.text, markup=False)
            else:
                bar.update(task, total=meter.total, completed=meter.done, description=meter.line(now))

        yield report
