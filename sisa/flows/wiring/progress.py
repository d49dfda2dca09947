"""Show the progress of the current run on standard error.

Progress is shown as live bars on a terminal, as plain lines elsewhere; never an id or a text. Training
is measured in record-epochs, whose total is known before training starts, a patch in steps, and the
embedding of records in texts. On a terminal each active shard has its own bar, up to MOST_ROWS of them.

    >>> meter = Meter()
    >>> meter.take(TrainingStarted(((0, 0, 10), (1, 0, 30))), now=0.0)
    >>> meter.take(SliceStarted(0, 0, 100), now=1.0)
    >>> meter.take(SliceProgress(0, 0, 50, 100, 5, 10, 1, 2), now=2.0)
    >>> meter.line(now=2.0)
    'shards 0/2, slices 0/2, 12% of record-epochs, 25 tok/s, 0:14 left'
    >>> [row.line(now=2.0) for row in meter.at_work()]
    ['shard 0: slice 1/1, epoch 1/2, step 5/10, 50 tok/s, 0:01 left']
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from sisa.core.events import (
    PROGRESS,
    EmbeddingProgress,
    Event,
    Notice,
    PatchProgress,
    Report,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)
from sisa.store.metrics import loggable_numbers

LINE_EVERY_S = 10.0
MOST_ROWS = 16
UNKNOWN_TIME = "unknown time"
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class AtWork:
    """A shard whose worker trains a stage: its stages in this training, and the progress of this one."""

    num_done: int
    num_slices: int
    since: float
    at: SliceProgress

    def line(self, now: float) -> str:
        """Return one line of text; the time left is that of this slice."""
        at, passed = self.at, max(1e-9, now - self.since)
        steps = (
            f"epoch {at.epoch}/{at.num_epochs}, step {at.step}/{at.num_steps}, " if at.num_steps else ""
        )
        left = _clock(passed * (at.total_tokens - at.tokens) / at.tokens) if at.tokens else UNKNOWN_TIME
        return (
            f"shard {at.shard}: slice {self.num_done + 1}/{self.num_slices}, {steps}"
            f"{at.tokens / passed:.0f} tok/s, {left} left"
        )


class Meter:
    """The state of a training, event by event."""

    def __init__(self) -> None:
        self._stages: dict[Place, int] = {}  # record-epochs
        self._done: dict[Place, int] = {}  # tokens
        self._at: dict[int, tuple[float, SliceProgress]] = {}  # by shard: since when, how far
        self._beside: PatchProgress | EmbeddingProgress | None = None  # work beside training
        self._first = 0  # the step of a patch at which its clock started
        self._started = 0.0

    def take(self, event: Event, now: float) -> None:
        if isinstance(event, TrainingStarted):
            self._stages = {(shard, slice_): epochs for shard, slice_, epochs in event.stages}
            self._done, self._at, self._beside = {}, {}, None
            self._started = now
        elif isinstance(event, SliceStarted):
            start = SliceProgress(event.shard, event.slice, 0, event.total_tokens)
            self._at[event.shard] = (now, start)
        elif isinstance(event, SliceProgress):
            since, _ = self._at.get(event.shard, (now, event))
            self._at[event.shard] = (since, event)
        elif isinstance(event, SliceTrained):
            _, at = self._at.pop(event.job.shard, (now, None))
            self._done.setdefault((event.job.shard, event.job.slice), at.tokens if at else 0)
        elif isinstance(event, PatchProgress):
            if not isinstance(self._beside, PatchProgress) or event.step <= self._beside.step:
                self._started, self._first = now, event.step
            self._beside = event
        elif isinstance(event, EmbeddingProgress):
            self._beside = event

    def counts(self) -> tuple[float, int]:
        """Return what is done and the total: record-epochs, steps of a patch, or embedded texts."""
        match self._beside:
            case PatchProgress(done, total) | EmbeddingProgress(done, total):
                return done, total
        under_way = (
            self._stages.get((at.shard, at.slice), 0) * at.tokens / max(1, at.total_tokens)
            for _, at in self._at.values()
        )
        trained = sum(self._stages.get(place, 0) for place in self._done)
        return trained + sum(under_way), sum(self._stages.values())

    @property
    def over(self) -> bool:
        """Return whether no stage is left."""
        return len(self._done) >= len(self._stages)

    def tokens_per_second(self, now: float) -> float:
        """Return the tokens per second of all workers together, since the training began."""
        tokens = sum(self._done.values()) + sum(at.tokens for _, at in self._at.values())
        return tokens / max(1e-9, now - self._started)

    def at_work(self) -> list[AtWork]:
        """Return the shards at a stage now, by number."""
        done, stages = (Counter(shard for shard, _ in each) for each in (self._done, self._stages))
        return [
            AtWork(done[shard], stages[shard], since, at)
            for shard, (since, at) in sorted(self._at.items())
        ]

    def numbers(self, now: float) -> dict[str, Any]:
        """Return the numbers of the line, for machines."""
        if self._beside is not None:
            return loggable_numbers(self._beside)
        share, left = self._share_and_seconds_left(now)
        return {
            "num_slices": len(self._stages),
            "slices_done": len(self._done),
            "share": round(share, 4),
            "tokens_per_second": round(self.tokens_per_second(now), 1),
            "seconds_left": left if left is None else round(left, 1),
        }

    def _share_and_seconds_left(self, now: float) -> tuple[float, float | None]:
        done, total = self.counts()
        left = max(1e-9, now - self._started) * (total - done) / done if done else None
        return done / total if total else 1.0, left

    def line(self, now: float) -> str:
        """Return one line of text: shards, slices, share, tokens/s, time left; or steps, or texts."""
        match self._beside:
            case EmbeddingProgress(done, total):
                return f"embedded {done:,} of {total:,} texts"
            case PatchProgress(step, total, loss):
                left = UNKNOWN_TIME
                if step > self._first:
                    left = _clock((now - self._started) * (total - step) / (step - self._first))
                return f"patch (approximate): step {step}/{total}, loss {loss:.4f}, {left} left"
        share, seconds = self._share_and_seconds_left(now)
        shards = {shard for shard, _ in self._stages}
        open_ = {shard for shard, _ in self._stages.keys() - self._done.keys()}
        return (
            f"shards {len(shards - open_)}/{len(shards)}, "
            f"slices {len(self._done)}/{len(self._stages)}, {int(100 * share)}% of record-epochs, "
            f"{self.tokens_per_second(now):.0f} tok/s, "
            f"{UNKNOWN_TIME if seconds is None else _clock(seconds)} left"
        )


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def progress(stream: TextIO | None = None) -> AbstractContextManager[Report]:
    """Show what is reported on a stream (standard error by default)."""
    stream = stream or sys.stderr
    return _bars(stream) if stream.isatty() else nullcontext(_lines(stream))


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
            isinstance(event, PROGRESS) and now - last >= LINE_EVERY_S
        ):
            last = now
            print(meter.line(now), file=stream, flush=True)

    return report


@contextmanager
def _bars(stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    meter = Meter()
    console = Console(file=stream)
    columns = (BarColumn(bar_width=10), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("starting", total=None)
        rows: dict[int, Any] = {}  # by shard

        def report(event: Event) -> None:
            now = time.monotonic()
            meter.take(event, now)
            if isinstance(event, Notice):
                console.print(event.text, markup=False)
                return
            done, total = meter.counts()
            bars.update(whole, total=total, completed=done, description=meter.line(now))
            shown = {each.at.shard: each for each in meter.at_work()[:MOST_ROWS]}
            changed = rows.keys() != shown.keys()
            for shard in rows.keys() - shown.keys():
                bars.remove_task(rows.pop(shard))
            for shard, each in shown.items():
                if shard not in rows:
                    rows[shard] = bars.add_task("")
                bars.update(
                    rows[shard],
                    total=each.at.total_tokens,
                    completed=each.at.tokens,
                    description=each.line(now),
                )
            if changed:
                bars.refresh()

        yield report
