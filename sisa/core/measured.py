"""Metrics of a run as flat lines of numbers: what may be stored of each event.

    {"at": "2026-11-25T21:37:49.123+00:00", "run": "20261125T213749Z-3f9a1c2b", "event": "slice_trained",
     "shard": 0, "slice": 1, "stage": "0f...", "num_records": 12, "tokens": 900, "seconds": 2.5}

A line holds numbers, the names of its event and run, and the first digits of the stage's checkpoint
key; never a text or an id. A stage's loss and token count are stored only for at least MIN_RECORDS
records, else null. They live no longer than the stage's checkpoint: when a deletion erases it, they
become null (`without`), since the token counts of two stages reveal the length of the record between
them. They are not logged, because nothing erases a log. A patch's losses, of few texts, are not stored
at all. `is_line` accepts only lines that this module can make, so a metrics file can be checked for
anything else.

>>> fields(SliceProgress(0, 1, 10, 40, 2, 8, 1, 2))["tokens"]
10
>>> run = "20261125T213749Z-3f9a1c2b"
>>> made = metrics_line(QueueSeen(2, 1, 0, 0, 12), "2026-11-25T21:37:49.123+00:00", run)
>>> made["oldest_days_left"], is_line(made), is_line({**made, "note": "text"})
(12, True, False)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields as fields_of
from typing import Any

from sisa.core.domain import record_epochs
from sisa.core.events import (
    DeletionCompleted,
    EpochTrained,
    ErasureFailed,
    Event,
    Notice,
    PatchProgress,
    QueueSeen,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)

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
_RUN = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_STAGE = re.compile(rf"[0-9a-f]{{{STAGE_DIGITS}}}")


def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return _OWN_FIELDS.get(kind) or tuple(each.name for each in fields_of(kind))


_SHAPES = {EVENT_NAMES[kind]: frozenset(("at", "run", "event", *_field_names(kind))) for kind in KEPT}


def is_run(name: str) -> bool:
    """Return whether a text can be the name of a run."""
    return _RUN.fullmatch(name) is not None


def fields(event: Event) -> MetricsLine:
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
    if isinstance(event, Notice):
        return {}
    found = {name: getattr(event, name) for name in _field_names(type(event))}
    if isinstance(event, EpochTrained):
        found["stage"] = event.stage[:STAGE_DIGITS]
        if event.num_records < MIN_RECORDS:
            found |= dict.fromkeys(_OF_STAGE)
    if "seconds" in found:
        found["seconds"] = round(found["seconds"], 3)
    return found


def logged(event: Event) -> MetricsLine:
    """Return what a log may contain of an event: its numbers without a stage's losses and tokens."""
    return {name: value for name, value in fields(event).items() if name not in _UNLOGGED}


def metrics_line(event: Event, at: str, run: str) -> MetricsLine | None:
    """Return the line to store of an event, or None when nothing is stored.

    Nothing is stored, for example, of a stage that was complete before and is only reported again.
    """
    if not isinstance(event, KEPT):
        return None
    if isinstance(event, SliceTrained) and not event.tokens:
        return None
    if isinstance(event, TrainingStarted) and not event.stages:
        return None
    return {"at": at, "run": run, "event": EVENT_NAMES[type(event)], **fields(event)}


def is_line(value: object) -> bool:
    """Return whether `metrics_line` could have made this value."""
    if not isinstance(value, dict) or _SHAPES.get(str(value.get("event"))) != value.keys():
        return False
    return all(_may_be(name, each) for name, each in value.items())


def _may_be(name: str, value: object) -> bool:
    if name == "event":
        return True
    shape = {"at": _AT, "run": _RUN, "stage": _STAGE}.get(name)
    if shape is not None:
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if value is None:
        return name in _MAY_BE_NULL
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def without(made: Mapping[str, Any], stages: Collection[str]) -> MetricsLine:
    """Return the line, without its loss and tokens unless its stage is one of `stages`.

    `stages` are the first digits of checkpoint keys.
    """
    gone = _OF_STAGE if "stage" in made and made["stage"] not in stages else ()
    return {name: None if name in gone else value for name, value in made.items()}
