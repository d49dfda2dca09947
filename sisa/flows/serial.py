"""Train a chain of stages, and provide an Executor that does so in this process.

`train_chain` is the only code that trains stages, for this process, a Ray worker and a replay alike, so
all executors give the same bytes. A stage whose checkpoint is in the store is not trained again, so a
retried worker loses at most its current stage. A task carries no record text, key or credential.

    SerialExecutor(trainer, records, checkpoints).run(chains, report)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sisa.core.domain import DEFAULT_PRECISION, Chain, Precision, SliceFile, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.events import EpochTrained, Report, SliceProgress, SliceStarted, SliceTrained, silent
from sisa.core.ports import (
    BlobStore,
    CheckpointStore,
    Keyring,
    OnStage,
    RecordStore,
    StoredRecord,
    Tick,
    Trainer,
)
from sisa.store.blobs.files import LocalBlobs, absolute

PROGRESS_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Site:
    """Describe where a chain is trained: plain paths and names, which can travel to another process."""

    records_at: BlobStore
    checkpoints_at: BlobStore
    base_dir: Path
    base_digest: str
    threads: int
    keyring: Keyring  # its directory and whether it seals; keys do not travel
    environment: tuple[tuple[str, str], ...] = ()  # variables to set before torch is imported
    area: str = "checkpoints"  # area of the checkpoints' keys
    patches_at: BlobStore = field(default_factory=lambda: LocalBlobs(Path()))
    patches: tuple[tuple[str, str], ...] = ()  # to train over: (key, manifest's sha256), lowest first
    precision: Precision = DEFAULT_PRECISION
    prefixes_at: BlobStore = field(default_factory=lambda: LocalBlobs(Path()))
    prefix_bytes: int = 0  # most bytes of hidden states that a shard keeps there

    def absolute(self) -> Site:
        """Return the same site for a process in another working directory."""
        return replace(
            self,
            records_at=absolute(self.records_at),
            checkpoints_at=absolute(self.checkpoints_at),
            patches_at=absolute(self.patches_at),
            prefixes_at=absolute(self.prefixes_at),
            base_dir=self.base_dir.absolute(),
        )


def order_chains(chains: Sequence[Chain]) -> list[Chain]:
    """Return the longest chains first, so that the last worker to finish is not the longest one."""
    return sorted(chains, key=lambda chain: (-chain.record_epochs, chain.shard))


def train_chain(
    chain: Chain, trainer: Trainer, records: RecordStore, checkpoints: CheckpointStore, report: Report
) -> Iterator[SliceTrained]:
    """Train a chain's missing stages in order; yield each when it is stored. Raise IntegrityError."""
    files = {file.slice: file for file in chain.slices}
    held = checkpoints.held()
    parent = None
    if chain.parent is not None:
        parent = checkpoints.load(chain.parent.key, chain.parent.manifest_sha256)
    for job in chain.jobs:
        if job.key in held:
            saved = checkpoints.describe(job.key)
            parent = checkpoints.load(job.key, saved.manifest_sha256)
            yield SliceTrained(job, saved, 0.0, 0)
            continue
        started = time.monotonic()
        stage = _stage_records(job, files, records)
        meter = _Meter(job, report)
        parent = trainer.train(job, parent, stage, meter)
        saved = checkpoints.save(job, parent)
        yield SliceTrained(job, saved, time.monotonic() - started, meter.tokens)


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

    def __init__(self, job: SliceJob, report: Report) -> None:
        self._job = job
        self._report = report
        self._last = 0.0
        self._since: tuple[float, int] | None = None  # time and token at which the pass began
        self.tokens = 0

    def __call__(self, tick: Tick) -> None:
        position, now = (self._job.shard, self._job.slice), time.monotonic()
        self.tokens = tick.tokens
        if self._since is None:
            self._since = now, tick.tokens
            self._report(SliceStarted(*position, tick.total_tokens))
        if tick.loss is not None:
            began, tokens = self._since
            self._since = now, tick.tokens
            self._report(
                EpochTrained(
                    *position,
                    stage=self._job.key,
                    epoch=tick.epoch,
                    num_epochs=tick.num_epochs,
                    num_records=tick.num_records,
                    tokens=tick.tokens - tokens,
                    seconds=now - began,
                    loss=tick.loss,
                )
            )
        if now - self._last >= PROGRESS_EVERY_S or tick.tokens == tick.total_tokens:
            self._last = now
            done = (tick.tokens, tick.total_tokens, tick.step, tick.num_steps)
            self._report(SliceProgress(*position, *done, tick.epoch, tick.num_epochs))


@dataclass(frozen=True)
class SerialExecutor:
    """Train one chain after another in this process."""

    trainer: Trainer
    records: RecordStore
    checkpoints: CheckpointStore

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        for chain in order_chains(chains):
            for stage in train_chain(chain, self.trainer, self.records, self.checkpoints, report):
                on_stage(stage)
                report(stage)
