"""What the flows and the workers tell whoever watches: one small frozen value per happening.

Rules: events are the only way out of a flow for progress, logs and metrics. They carry places, counts,
seconds and digests; text for people is in `Notice` alone, which is shown and not kept.

Not covered: who listens (`cluster/progress.py`).

>>> SliceProgress(0, 1, 10, 40)
SliceProgress(shard=0, slice=1, tokens=10, total_tokens=40)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sisa.domain import SavedCheckpoint, SliceJob


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """Stages that will be trained: (shard, slice, record-epochs) each."""

    stages: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class SliceStarted:
    """A worker began a stage of `total_tokens` tokens."""

    shard: int
    slice: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class SliceProgress:
    """Tokens done so far of a stage."""

    shard: int
    slice: int
    tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class SliceTrained:
    """A stage's checkpoint rests in the store."""

    job: SliceJob
    saved: SavedCheckpoint
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class PatchProgress:
    """Steps done of a patch that is being made, and the loss before the last one."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Notice:
    """A line for the person who waits, such as a retried worker."""

    text: str


Event = TrainingStarted | SliceStarted | SliceProgress | SliceTrained | PatchProgress | Notice
Report = Callable[[Event], None]
