"""Metrics of runs: numbers of events, as JSON lines in a file for each run, `metrics/RUN.jsonl`.

    {"at": "2026-11-25T21:37:49.123+00:00", "run": "20261125T213749Z-3f9a1c2b", "event": "slice_trained",
     "shard": 0, "slice": 1, "stage": "0f...", "num_records": 12, "tokens": 900, "seconds": 2.5}

A line holds numbers, the names of its event and run, and the first digits of the stage's checkpoint
key; never a text or an id. A stage's loss and token count are stored only for at least MIN_RECORDS
records, else null. They live no longer than the stage's checkpoint: when a deletion erases it, they
become null (`without_losses`) and the files are rewritten, since the token counts of two stages reveal
the length of the record between them. They are not logged, because nothing erases a log. `is_line`
accepts only lines that this module can make, since a number under an unknown key may have to be erased,
too; anything else in a file is an IntegrityError. A last line without its end, from a killed process, is
not read.

>>> run = "20261125T213749Z-3f9a1c2b"
>>> made = metrics_line(QueueSeen(2, 1, 0, 0, 12), "2026-11-25T21:37:49.123+00:00", run)
>>> made["oldest_days_left"], is_line(made), is_line({**made, "note": "text"})
(12, True, False)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.domain import record_epochs
from sisa.core.errors import IntegrityError
from sisa.core.events import (
    DeletionCompleted,
    EmbeddingProgress,
    EpochTrained,
    ErasureFailed,
    Event,
    Notice,
    PatchProgress,
    QueueSeen,
    Report,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)
from sisa.core.ports import Metrics
from sisa.core.run import RUN, current_run, is_run, new_run
from sisa.store.blobs import files

MIN_RECORDS = 5  # fewest records whose mean loss may be stored
STAGE_DIGITS = 16
MetricsLine = dict[str, Any]

EVENT_NAMES: dict[type[Any], str] = {
    TrainingStarted: "training_started",
    SliceStarted: "slice_started",
    SliceProgress: "slice_progress",
    EpochTrained: "epoch_trained",
    SliceTrained: "slice_trained",
    PatchProgress: "patch_progress",
    EmbeddingProgress: "embedding_progress",
    QueueSeen: "queue_seen",
    DeletionCompleted: "deletion_completed",
    ErasureFailed: "erasure_failed",
    Notice: "notice",
}
_OWN_FIELDS: dict[type[Any], tuple[str, ...]] = {
    TrainingStarted: ("num_slices", "num_shards", "record_epochs"),
    SliceTrained: ("shard", "slice", "stage", "num_records", "record_epochs", "tokens", "seconds"),
    PatchProgress: ("step", "num_steps"),
    Notice: (),
}
KEPT = (TrainingStarted, EpochTrained, SliceTrained, QueueSeen, DeletionCompleted, ErasureFailed)
_OF_STAGE = ("loss", "tokens")  # reveal something of a stage's records; erased with its checkpoint
_UNLOGGED = (*_OF_STAGE, "total_tokens")
_MAY_BE_NULL = {*_OF_STAGE, "oldest_days_left"}
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")
_STAGE = re.compile(rf"[0-9a-f]{{{STAGE_DIGITS}}}")


def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return _OWN_FIELDS[kind] if kind in _OWN_FIELDS else tuple(each.name for each in fields(kind))


_SHAPES = {EVENT_NAMES[kind]: frozenset(("at", "run", "event", *_field_names(kind))) for kind in KEPT}


def event_numbers(event: Event) -> MetricsLine:
    """Return an event as flat numbers and the first digits of a stage's key."""
    if isinstance(event, TrainingStarted):
        shards = {shard for shard, _, _ in event.stages}
        total = sum(epochs for _, _, epochs in event.stages)
        return {"num_slices": len(event.stages), "num_shards": len(shards), "record_epochs": total}
    if isinstance(event, SliceTrained):
        job = event.job
        return {
            "shard": job.shard,
            "slice": job.slice,
            "stage": job.key[:STAGE_DIGITS],
            "num_records": job.num_records,
            "record_epochs": record_epochs(job),
            "tokens": event.tokens if job.num_records >= MIN_RECORDS else None,
            "seconds": round(event.seconds, 3),
        }
    found = {name: getattr(event, name) for name in _field_names(type(event))}
    if isinstance(event, EpochTrained):
        found["stage"] = event.stage[:STAGE_DIGITS]
        if event.num_records < MIN_RECORDS:
            found |= dict.fromkeys(_OF_STAGE)
    if "seconds" in found:
        found["seconds"] = round(found["seconds"], 3)
    return found


def loggable_numbers(event: Event) -> MetricsLine:
    """Return what a log may contain of an event: its numbers without a stage's losses and tokens."""
    return {name: value for name, value in event_numbers(event).items() if name not in _UNLOGGED}


def metrics_line(event: Event, at: str, run: str) -> MetricsLine | None:
    """Return the line to store of an event; None, for example, if a finished stage is reported again."""
    again = isinstance(event, SliceTrained) and not event.tokens
    if not isinstance(event, KEPT) or again or (isinstance(event, TrainingStarted) and not event.stages):
        return None
    return {"at": at, "run": run, "event": EVENT_NAMES[type(event)], **event_numbers(event)}


def recording(report: Report, metrics: Metrics, now: Callable[[], str]) -> Report:
    """Return a report that passes every event on and appends a line of metrics for some of them.

    Lines contain the name of the current run. The state of the queue is appended when it has changed.
    """
    run = (current_run() or new_run()).run
    last: QueueSeen | None = None

    def pass_on(event: Event) -> None:
        nonlocal last
        report(event)
        if isinstance(event, QueueSeen):
            if event == last:
                return
            last = event
        if (line := metrics_line(event, now(), run)) is not None:
            metrics.append(line)

    return pass_on


def is_line(value: object) -> bool:
    """Return whether `metrics_line` could have made this value."""
    if not isinstance(value, dict) or _SHAPES.get(str(value.get("event"))) != value.keys():
        return False
    return all(_may_be(name, each) for name, each in value.items())


def _may_be(name: str, value: object) -> bool:
    if shape := {"at": _AT, "run": RUN, "stage": _STAGE}.get(name):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if value is None:
        return name in _MAY_BE_NULL
    return name == "event" or (type(value) in (int, float) and math.isfinite(value))  # type: ignore[arg-type]


def without_losses(made: Mapping[str, Any], stages: Collection[str]) -> MetricsLine:
    """Return the line, without loss and tokens unless its stage, in first digits, is one of `stages`."""
    gone = _OF_STAGE if "stage" in made and made["stage"] not in stages else ()
    return {name: None if name in gone else value for name, value in made.items()}


SUFFIX = ".jsonl"


@dataclass(frozen=True)
class FileMetrics:
    """Metrics in a directory; several processes may write there, each in files of its own runs."""

    root: Path

    def append(self, line: Mapping[str, Any]) -> None:
        path = self._path(str(line["run"]))
        with files.disk_errors(path):
            files.make_directory(self.root)
            with _locked(self.root):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(canonical_json(line) + b"\n")

    def runs(self) -> list[str]:
        return sorted(name.removesuffix(SUFFIX) for name in run_files(self.root))

    def read(self, run: str) -> list[dict[str, Any]]:
        path = self._path(run)
        return parse_lines(files.read_whole(path, "file of metrics"), str(path))

    def keep_losses(self, stages: Collection[str]) -> None:
        names = run_files(self.root)
        if not names:
            return
        with files.disk_errors(self.root), _locked(self.root):
            for path in (self.root / name for name in sorted(names)):
                data = path.read_bytes()
                found = parse_lines(data, str(path))
                kept = [without_losses(line, stages) for line in found]
                if kept != found or not data.endswith(b"\n"):
                    whole = b"".join(canonical_json(line) + b"\n" for line in kept)
                    files.write_atomic(path, whole)

    def _path(self, run: str) -> Path:
        if not is_run(run):  # it becomes part of a path
            raise IntegrityError(
                "that is not the name of a run", expected="a name that `sisa metrics` lists"
            )
        return self.root / f"{run}{SUFFIX}"


def run_files(root: Path) -> frozenset[str]:
    """Return the names of the files of runs; other files in the directory are ignored."""
    names = files.held_names(root)
    return frozenset(n for n in names if n.endswith(SUFFIX) and is_run(n.removesuffix(SUFFIX)))


def parse_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """Return the lines of a file without an unfinished last one. Raise IntegrityError."""
    found = []
    for number, each in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            value = json.loads(each)
        except (ValueError, RecursionError):
            value = None
        if not is_line(value):
            raise IntegrityError(
                "a line of metrics is not in the form that is written",
                where=f"{where}, line {number}",
                expected="a known event with its numbers",
                next_step="remove the file: nothing else needs it",
            )
        found.append(value)
    return found


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lock the directory, so that no file is rewritten while a line is appended to it."""
    with files.opened_directory(root) as handle:
        files.take_lock(handle, root, "keeps the metrics of this model locked")
        yield
