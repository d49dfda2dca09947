"""The LoRA trainer: one stage of training as a pure function of its inputs, to the byte.

A stage starts from bytes: its parent's files, or the base and a seed. The process that trained the
parent does the same, so resuming runs the same code. The base is never written to. What a process did
before affects no bit: each stage has modules of its own (`trainable.py`), and torch has its default
modes while it runs. Encoder-decoder models, and more than one device at once, are not supported.

    files = LoraTrainer(base, threads=1).train(job, None, records, print)

`steps.py` says which records a step holds, `stage.py` how it is taken.

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import chain
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.domain import DEFAULT_PRECISION, BaseFiles, Precision, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.ports import HiddenStateStore, StoredRecord, Tick
from sisa.lm.base.low_rank import patched_name
from sisa.lm.base.numerics import fingerprint, keep_freed_memory, pin_threads, usual_modes
from sisa.lm.base.tokens import tokenize_all
from sisa.lm.base.weights import load_patched
from sisa.lm.train.frozen_layers import HiddenStateCache, TokenizedRows
from sisa.lm.train.lane_trial import refuse_lanes
from sisa.lm.train.lanes import MicroBatch, compute, finish
from sisa.lm.train.losses import Batch
from sisa.lm.train.stage import Stage
from sisa.lm.train.steps import Ticks, stage_steps
from sisa.lm.train.trainable import Trainable

_tested: dict[tuple[Any, ...], tuple[str | None, Any]] = {}  # what this process tested last, for lanes


class LoraTrainer:
    """A trainer of stages on one base, with or without patches.

    Records' hidden states stay in memory as long as the trainer does.
    """

    def __init__(
        self,
        base: BaseFiles,
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
        precision: Precision = DEFAULT_PRECISION,
        *,
        hidden_states: HiddenStateStore | None = None,
        state_bytes: int = 0,
    ) -> None:
        """Create a trainer; the base is loaded when it is first needed.

        `patches` are the files of the patches to train over, lowest first. `hidden_states` stores those
        of the frozen layers, up to `state_bytes` per shard.
        """
        self._base = (base, patches, precision)
        self._base_name = patched_name(base.digest, patches)
        self._threads, self._precision = threads, precision
        self._known = (self._base_name, fingerprint(threads, precision))
        self._wrapped: tuple[Mapping[str, Any], Trainable] | None = None
        self._tokenizer: Any = None
        self._hidden_states = HiddenStateCache(
            store=hidden_states,
            num_bytes=state_bytes,
            base=self._base_name,
            fingerprint=self._known[1],
        )

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        """Train a stage and return its checkpoint's files: adapter, configuration, optimizer, state.

        Raise IntegrityError (another base, a damaged parent), InvalidInput (records that do not fit,
        modules that the base lacks, a loss that is not finite) or EnvironmentFault (no device).
        """
        with usual_modes(self._precision):
            return finish(self._stage(job, parent, records, progress))

    def begin(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> Generator[MicroBatch, None, dict[str, bytes]]:
        """Train a stage as `train` does, but yield each micro-batch, which the caller computes."""
        stage = self._stage(job, parent, records, progress)
        while True:
            with usual_modes(self._precision):
                try:
                    waiting = next(stage)
                except StopIteration as end:
                    files: dict[str, bytes] = end.value
                    return files
            yield waiting

    def _stage(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> Generator[MicroBatch, None, dict[str, bytes]]:
        _check_job(job, self._base_name, records, self._precision)
        wrapped = self._wrap(job.training)
        rows = _tokenized(job, records, self._tokenizer)
        steps = _plan_steps(job, rows)
        self._hidden_states.load(job, wrapped.first, rows, wrapped.dtype)
        stage = Stage(job, wrapped, parent, len(steps), self._hidden_states)
        lengths = [[len(each.input_ids) for each in chain(*step)] for step in steps]
        ticks = Ticks(lengths, len(records))
        progress(ticks.now())
        for batches in steps:
            progress(ticks.after(*(yield from stage.step(batches))))
        self._hidden_states.save(job, wrapped.first, rows)
        return stage.files()

    def compute(self, waiting: Sequence[MicroBatch]) -> None:
        """Compute micro-batches of several stages, together where that changes no bit."""
        with usual_modes(self._precision):
            compute(waiting)

    def refuse_lanes(self, training: Mapping[str, Any]) -> str | None:
        """Return why stages can't be trained side by side here; None if they can."""
        with usual_modes(self._precision):
            wrapped = self._wrap(training)
            key = (self._base_name, self._threads, self._precision, canonical_json(training))
            if key not in _tested:
                _tested.clear()
                refusal = refuse_lanes(wrapped, training["sequence_len"])
                _tested[key] = refusal, wrapped.row_tests
            refusal, wrapped.row_tests = _tested[key]
            return refusal

    def _wrap(self, training: Mapping[str, Any]) -> Trainable:
        pin_threads(self._threads, self._precision)
        keep_freed_memory()
        if self._wrapped is None or self._wrapped[0] != training:
            self._wrapped = None  # one at a time is in memory
            base, self._tokenizer = load_patched(*self._base)
            self._wrapped = training, Trainable(base, training, self._known)
        return self._wrapped[1]


def _check_job(
    job: SliceJob, base_name: str, records: Sequence[StoredRecord], precision: Precision
) -> None:
    wanted = Precision.of(job.training)
    if wanted != precision:
        raise IntegrityError(
            "a job was made for another device or dtype",
            where=f"shard {job.shard}, slice {job.slice}",
            expected=str(precision.in_jobs() or "none"),
            got=str(wanted.in_jobs() or "none"),
            next_step="run the command again; `sisa train RUN.yaml` shows what differs",
        )
    if job.base != base_name:
        raise IntegrityError(
            "a job was made for another base model or for other patches",
            where=f"shard {job.shard}, slice {job.slice}",
            expected=job.base,
            got=base_name,
            next_step="restore the base model's files, or fetch them again",
        )
    if job.num_records != len(records):
        raise IntegrityError(
            "a job and its records disagree",
            where=f"shard {job.shard}, slice {job.slice}",
            expected=f"{job.num_records} records",
            got=f"{len(records)} records",
            next_step="run `sisa verify` on the model",
        )


def _tokenized(job: SliceJob, records: Sequence[StoredRecord], tokenizer: Any) -> TokenizedRows:
    training = job.training
    tokens = tokenize_all(
        [each.record for each in records],
        tokenizer,
        sequence_len=training["sequence_len"],
        overlength=training["overlength"],
        train_on_inputs=training["train_on_inputs"],
        positions=[f"shard {job.shard}, record {n + 1} of the stage" for n in range(len(records))],
    )
    return list(zip(records, tokens, strict=True))


def _plan_steps(job: SliceJob, rows: TokenizedRows) -> list[list[Batch]]:
    lengths = [len(tokens.input_ids) for _, tokens in rows]
    steps = stage_steps(job, [stored.id_digest for stored, _ in rows], lengths)
    return [[[rows[index][1] for index in batch] for batch in step] for step in steps]
