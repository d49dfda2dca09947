"""Fake a store of metrics in memory, and one event of each kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sisa.core.domain import SavedCheckpoint, SliceJob
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
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)
from sisa.core.run import is_run
from sisa.store.metrics import is_line, metrics_line, without_losses

AT, RUN = "2026-11-25T21:37:49.123+00:00", "20261125T213749Z-3f9a1c2b"
JOB = SliceJob(2, 1, None, ((1, "root"),), 9, (3, 2), {"seed": 1}, "base", "f")
TRAINED = SliceTrained(JOB, SavedCheckpoint(JOB.key, "m", "a", 1), 2.5, 900)
EPOCH = EpochTrained(2, 1, JOB.key, 1, 2, 9, 600, 1.5, 0.75)
EVENTS: list[Event] = [
    TrainingStarted(((0, 0, 10), (0, 1, 20), (1, 0, 30))),
    SliceStarted(2, 1, 900),
    SliceProgress(2, 1, 300, 900, 3, 9, 1, 2),
    EPOCH,
    TRAINED,
    PatchProgress(3, 40, 1.5),
    EmbeddingProgress(1024, 8000),
    QueueSeen(2, 1, 0, 1, -3),
    DeletionCompleted(4, 2, 12.5),
    ErasureFailed(2),
    Notice("a line"),
]


def kept(event: Event) -> dict[str, Any]:
    found = metrics_line(event, AT, RUN)
    assert found is not None
    return found


class FakeMetrics:
    """A Metrics whose lines can be inspected."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def append(self, line: Mapping[str, Any]) -> None:
        if not is_run(str(line["run"])):
            raise IntegrityError("that is not the name of a run")
        self.lines.append(dict(line))

    def runs(self) -> list[str]:
        return sorted({each["run"] for each in self.lines})

    def read(self, run: str) -> list[dict[str, Any]]:
        found = [each for each in self.lines if each["run"] == run]
        if not found or not all(map(is_line, found)):
            raise IntegrityError("metrics are missing, or not in the form that is written")
        return found

    def keep_losses(self, stages: Collection[str]) -> None:
        self.lines = [without_losses(each, stages) for each in self.lines]
