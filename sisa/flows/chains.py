"""Train chains of stages, and provide an Executor that does so in this process.

`train_chains_in_lanes` is the only code that trains stages, for this process, a Ray worker and a replay
alike, so all executors give the same bytes. A stage whose checkpoint is in the store is not trained
again, so a retried worker loses at most its current stages. A task carries no record text, key or
credential.

    SerialExecutor(trainer, records, checkpoints).run(chains, report)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sisa.core.domain import DEFAULT_PRECISION, BaseFiles, Chain, Precision, SliceFile, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.events import (
    EpochTrained,
    Notice,
    Report,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    silent,
)
from sisa.core.ports import (
    BlobStore,
    CheckpointStore,
    Keyring,
    LaneTrainer,
    OnStage,
    RecordStore,
    StoredRecord,
    Tick,
    Trainer,
)
from sisa.store.areas import CHECKPOINTS
from sisa.store.blobs.local_blobs import LocalBlobs, absolute

PROGRESS_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Site:
    """Describe where a chain is trained: plain paths and names, which can travel to another process."""

    records_at: BlobStore
    checkpoints_at: BlobStore
    base: BaseFiles
    threads: int
    keyring: Keyring  # its directory and whether it seals; keys do not travel
    environment: tuple[tuple[str, str], ...] = ()  # variables to set before torch is imported
    area: str = CHECKPOINTS  # area of the checkpoints' keys
    patches_at: BlobStore = field(default_factory=lambda: LocalBlobs(Path()))
    patches: tuple[tuple[str, str], ...] = ()  # to train over: (key, manifest's sha256), lowest first
    precision: Precision = DEFAULT_PRECISION
    hidden_states_at: BlobStore = field(default_factory=lambda: LocalBlobs(Path()))
    state_bytes: int = 0  # most bytes of hidden states that a shard keeps there

    def absolute(self) -> Site:
        """Return the same site for a process in another working directory."""
        return replace(
            self,
            records_at=absolute(self.records_at),
            checkpoints_at=absolute(self.checkpoints_at),
            patches_at=absolute(self.patches_at),
            hidden_states_at=absolute(self.hidden_states_at),
            base=self.base.absolute(),
        )


def order_chains(chains: Sequence[Chain]) -> list[Chain]:
    """Return the longest chains first, so that the last worker to finish is not the longest one."""
    return sorted(chains, key=lambda chain: (-chain.record_epochs, chain.shard))


LanesSetting = int | Literal["auto"]
AUTO_LANES, SMALL_BATCH, MANY_BATCHES = 4, 2, 400  # SMALL_BATCH in records, MANY_BATCHES in all chains


def num_lanes(setting: LanesSetting, chains: Sequence[Chain]) -> int:
    """Return how many chains to train side by side.

    For `auto` several, where that was measured to pay: on the CPU, in small micro-batches, if there are
    enough of them to make up for the test that precedes it.
    """
    if setting != "auto":
        return min(setting, len(chains))
    if not chains:
        return 1
    training = chains[0].jobs[0].training if chains[0].jobs else {}
    size = training.get("micro_batch_size", SMALL_BATCH + 1)
    batches = sum(chain.record_epochs for chain in chains) / size
    pays = "device" not in training and size <= SMALL_BATCH and batches >= MANY_BATCHES
    return min(AUTO_LANES, len(chains)) if pays else 1


def train_chains_in_lanes(
    chains: Sequence[Chain],
    trainer: Trainer,
    records: RecordStore,
    checkpoints: CheckpointStore,
    report: Report,
    lanes: int = 1,
) -> Iterator[SliceTrained]:
    """Train the missing stages of chains in their order, up to `lanes` chains side by side.

    Yield each stage when it is stored; a chain that ends makes room for the next. The store is listed
    once, so no two of the chains may share a stage. Raise IntegrityError.
    """
    lane_trainer = trainer if lanes > 1 and isinstance(trainer, LaneTrainer) else None
    if lane_trainer and (refusal := lane_trainer.refuse_lanes(chains[0].jobs[0].training)):
        report(Notice(f"shards are trained one after another, not side by side: {refusal}"))
        lane_trainer = None
    begin = lane_trainer.begin if lane_trainer else _begin_whole(trainer)
    clock, running, held = _Clock(), list[Iterator[Any]](), checkpoints.held()
    not_begun = (_stages(each, begin, records, checkpoints, held, report, clock) for each in chains)
    while True:
        # Advance each running chain, and begin others in free lanes, until each waits or has ended.
        waiting, still_running, turns = [], list[Iterator[Any]](), itertools.chain(running, not_begun)
        while len(still_running) < lanes and (stages := next(turns, None)) is not None:
            for each in stages:
                if not isinstance(each, SliceTrained):
                    waiting.append(each)
                    still_running.append(stages)
                    break
                yield each
        if lane_trainer is None or not waiting:  # without lanes, nothing waits: all chains have ended
            return
        clock.share_by(len(still_running))
        lane_trainer.compute(waiting)
        running = still_running


_Begin = Callable[..., Generator[Any, None, dict[str, bytes]]]


def _begin_whole(trainer: Trainer) -> _Begin:
    """Return a function that trains a whole stage and waits for nothing."""

    def begin(*stage: Any) -> Generator[Any, None, dict[str, bytes]]:
        yield from ()
        return trainer.train(*stage)

    return begin


def _stages(
    chain: Chain,
    begin: _Begin,
    records: RecordStore,
    checkpoints: CheckpointStore,
    held: Collection[str],
    report: Report,
    clock: _Clock,
) -> Iterator[Any]:
    """Train a chain's missing stages in order; yield what a stage waits for, and each stored stage."""
    files = {file.slice: file for file in chain.slices}
    parent = None
    if chain.parent is not None:
        parent = checkpoints.load(chain.parent.key, chain.parent.manifest_sha256)
    for job in chain.jobs:
        if job.key in held:
            saved = checkpoints.describe(job.key)
            parent = checkpoints.load(job.key, saved.manifest_sha256)
            yield SliceTrained(job, saved, 0.0, 0)
            continue
        started = clock.seconds()
        stage = _stage_records(job, files, records)
        meter = _Meter(job, report, clock)
        parent = yield from begin(job, parent, stage, meter)
        saved = checkpoints.save(job, parent)
        yield SliceTrained(job, saved, clock.seconds() - started, meter.tokens)


class _Clock:
    """The seconds of work on one chain: time with several under way counts for each in equal shares."""

    def __init__(self) -> None:
        self._seconds, self._at, self._num = 0.0, time.monotonic(), 1

    def seconds(self) -> float:
        now = time.monotonic()
        self._seconds += (now - self._at) / self._num
        self._at = now
        return self._seconds

    def share_by(self, num: int) -> None:
        """Count from now on for `num` chains."""
        self.seconds()
        self._num = num


def _stage_records(
    job: SliceJob, files: dict[int, SliceFile], records: RecordStore
) -> list[StoredRecord]:
    stage: list[StoredRecord] = []
    for slice_, root in job.slices:
        file = files[slice_]
        if file.root != root:
            raise IntegrityError(
                "a job and its slice file disagree",
                where=f"shard {job.shard}, slice {slice_}",
                expected=root,
                got=file.root,
                next_step="run `sisa verify` on the model",
            )
        stage.extend(replace(each, slice=slice_) for each in records.read(file))
    return sorted(stage, key=lambda each: each.id_digest)


class _Meter:
    """Turn the trainer's ticks into events: one at the end of each pass, and progress now and then."""

    def __init__(self, job: SliceJob, report: Report, clock: _Clock) -> None:
        self._job = job
        self._report = report
        self._clock = clock
        self._last = 0.0
        self._since: tuple[float, int] | None = None  # time and token at which the pass began
        self.tokens = 0

    def __call__(self, tick: Tick) -> None:
        position, now = (self._job.shard, self._job.slice), time.monotonic()
        self.tokens = tick.tokens
        if self._since is None:
            self._since = self._clock.seconds(), tick.tokens
            self._report(SliceStarted(*position, tick.total_tokens))
        if tick.loss is not None:
            began, tokens = self._since
            ended = self._clock.seconds()
            self._since = ended, tick.tokens
            self._report(
                EpochTrained(
                    *position,
                    stage=self._job.key,
                    epoch=tick.epoch,
                    num_epochs=tick.num_epochs,
                    num_records=tick.num_records,
                    tokens=tick.tokens - tokens,
                    seconds=ended - began,
                    loss=tick.loss,
                )
            )
        if now - self._last >= PROGRESS_EVERY_S or tick.tokens == tick.total_tokens:
            self._last = now
            done = (tick.tokens, tick.total_tokens, tick.step, tick.num_steps)
            self._report(SliceProgress(*position, *done, tick.epoch, tick.num_epochs))


@dataclass(frozen=True)
class SerialExecutor:
    """Train chains in this process: one after another, or several side by side."""

    trainer: Trainer
    records: RecordStore
    checkpoints: CheckpointStore
    lanes: LanesSetting = 1

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        parts = self.trainer, self.records, self.checkpoints
        lanes = num_lanes(self.lanes, chains)
        for stage in train_chains_in_lanes(order_chains(chains), *parts, report, lanes):
            on_stage(stage)
            report(stage)
