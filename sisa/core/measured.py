"""What is measured of a run, as flat lines of numbers: of each event what may be kept, and nothing else.

    {"at": "2026-11-25T21:37:49.123+00:00", "run": "20261125T213749Z-3f9a1c2b", "event": "slice_trained",
     "shard": 0, "slice": 1, "stage": "0f...", "num_records": 12, "tokens": 900, "seconds": 2.5}

Rules: a line holds numbers, the names of its event and run, and the first digits of the stage's
checkpoint key: never a text or an id. A stage's loss and its number of tokens are kept of at least
MIN_RECORDS records, else null, and live no longer than its checkpoint: when a deletion takes that, they
become null (`without`), since the tokens of two stages tell the length of the record between them. They
are not logged, for nothing takes a log back; a patch's losses, of few texts, are not kept at all.
`is_line` holds only of lines that could have been made here, so that a file of them proves itself
clean.

Not covered: files (`store/metrics.py`); logs (`cluster/observe/json_log.py`).

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

MIN_RECORDS = 5  # of which a mean loss may be kept
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
_OF_STAGE = ("loss", "tokens")  # what tells of a stage's records, and goes with its checkpoint
_UNLOGGED = (*_OF_STAGE, "total_tokens")
_MAY_BE_NULL = {*_OF_STAGE, "oldest_days_left"}
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")
_RUN = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_STAGE = re.compile(rf"[0-9a-f]{{{STAGE_DIGITS}}}")


def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return _OWN_FIELDS.get(kind) or tuple(each.name for each in fields_of(kind))


_SHAPES = {EVENT_NAMES[kind]: frozenset(("at", "run", "event", *_field_names(kind))) for kind in KEPT}


def is_run(name: str) -> bool:
    """Whether this may be the name of a run."""
    return _RUN.fullmatch(name) is not None


def fields(event: Event) -> MetricsLine:
    """An event as flat numbers, and the first digits of a stage's key."""
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
    """What a log may say of an event: its numbers, but for a stage's losses and tokens."""
    return {name: value for name, value in fields(event).items() if name not in _UNLOGGED}


def metrics_line(event: Event, at: str, run: str) -> MetricsLine | None:
    """The line to keep of an event; None of one of which nothing is kept, such as a stage that was
    stored before and is only told again."""
    if not isinstance(event, KEPT):
        return None
    if isinstance(event, SliceTrained) and not event.tokens:
        return None
    if isinstance(event, TrainingStarted) and not event.stages:
        return None
    return {"at": at, "run": run, "event": EVENT_NAMES[type(event)], **fields(event)}


def is_line(value: object) -> bool:
    """Whether `metrics_line` could have made this."""
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
    """The line, its loss and tokens only if its stage is one of these, given by the first digits of
    their keys."""
    gone = _OF_STAGE if "stage" in made and made["stage"] not in stages else ()
    return {name: None if name in gone else value for name, value in made.items()}
