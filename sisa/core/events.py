"""Events that flows and workers report: one small frozen value each.

Events are the only way out of a flow for progress, logs and metrics. They carry positions, counts,
seconds, mean losses and digests. Only `Notice` holds text for people, without records and ids; it is
shown or logged and not stored with the model.

>>> SliceStarted(0, 1, 40)
SliceStarted(shard=0, slice=1, total_tokens=40)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sisa.core.domain import SavedCheckpoint, SliceJob


class Event:
    """Base class of all events."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TrainingStarted(Event):
    """Stages that will be trained: (shard, slice, record-epochs) each."""

    stages: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class SliceStarted(Event):
    """A worker began a stage of `total_tokens` tokens."""

    shard: int
    slice: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class SliceProgress(Event):
    """Progress of a stage: tokens and steps done and in total, and the current pass, from 1."""

    shard: int
    slice: int
    tokens: int
    total_tokens: int
    step: int = 0
    num_steps: int = 0
    epoch: int = 0
    num_epochs: int = 0


@dataclass(frozen=True, slots=True)
class EpochTrained(Event):
    """A pass of a stage ended: `stage` is the checkpoint's key, `loss` the mean over label tokens."""

    shard: int
    slice: int
    stage: str
    epoch: int
    num_epochs: int
    num_records: int
    tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class SliceTrained(Event):
    """A stage's checkpoint is stored."""

    job: SliceJob
    saved: SavedCheckpoint
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class PatchProgress(Event):
    """Steps done of a patch that is being made, and the loss before the last one."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class EmbeddingProgress(Event):
    """Texts of records that are embedded so far, and their number."""

    num_done: int
    num_texts: int


@dataclass(frozen=True, slots=True)
class QueueSeen(Event):
    """State of the deletion requests.

    `depth` are approved or interrupted, `undecided` wait for a decision, `failed_erasures` could not be
    erased so far; the earliest of their due dates is `oldest_days_left` ahead, None without any.
    """

    depth: int
    undecided: int
    held: int
    failed_erasures: int
    oldest_days_left: int | None


@dataclass(frozen=True, slots=True)
class DeletionCompleted(Event):
    """A request is carried out: seconds from its commit until its shards reached their targets."""

    num_records: int
    num_shards: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ErasureFailed(Event):
    """Bytes that `num_requests` requests wait for could not be erased; the next command tries again."""

    num_requests: int


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """A line for the user, such as a worker that is retried."""

    text: str


PROGRESS = (SliceProgress, PatchProgress, EmbeddingProgress)  # the events that come in great numbers
Report = Callable[[Event], None]


def silent(_event: Event) -> None:
    """Report nothing."""
