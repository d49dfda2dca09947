"""The LoRA trainer: one stage of training as a pure function of its inputs, to the byte.

A stage starts from bytes: its parent's files, or the base and a seed. This is so in the process that
trained the parent as in any other, so resuming runs the same code. The base is never written to. A stage
over patches names the base with them. A stage runs on the base's device and in its dtype. What a process
did before reaches no bit: each stage has modules of its own (`trainable.py`), and torch has its default
modes while it runs. Hidden states of the frozen layers are kept between stages. Encoder-decoder models,
and more than one device at once, are not supported.

    files = LoraTrainer(directory, digest, threads=1).train(job, None, records, print)

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sisa.core.domain import SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.ports import PrefixStore, StoredRecord, Tick
from sisa.core.precision import DEFAULT_PRECISION, Precision
from sisa.lm.base.numerics import fingerprint, keep_freed_memory, pin_threads, usual_modes
from sisa.lm.base.patched import load_patched, patched_name
from sisa.lm.base.tokens import tokenize_all
from sisa.lm.train.frozen_prefix import Prefixes, PrefixFiles, TokenizedRows
from sisa.lm.train.losses import Batch
from sisa.lm.train.stage import Stage
from sisa.lm.train.steps import Ticks, stage_steps
from sisa.lm.train.trainable import Trainable, pattern_key


class LoraTrainer:
    """A trainer of stages on one base, with or without patches.

    It may train any number of stages; none affects another's bits. Records' hidden states and the last
    stage's weights stay in memory as long as the trainer does.
    """

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
        precision: Precision = DEFAULT_PRECISION,
        *,
        prefixes: PrefixStore | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """`patches` are the files of the patches to train over, lowest first. `prefixes` stores the
        hidden states of the frozen layers, up to `prefix_bytes` per shard.
        """
        self._base = (base_dir, base_digest, patches, precision)
        self._base_name = patched_name(base_digest, patches)
        self._threads, self._precision = threads, precision
        self._wrapped: tuple[bytes, Trainable] | None = None
        self._tokenizer: Any = None
        named = (self._base_name, fingerprint(threads, precision))
        files = None if prefixes is None else PrefixFiles(prefixes, prefix_bytes, *named)
        self._prefixes = Prefixes(files=files)

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        """Train a stage and return its checkpoint's files: adapter, configuration, optimizer, state.

        Raises IntegrityError (another base, a damaged parent), InvalidInput (records that do not fit,
        modules that the base lacks, a loss that is not finite) or EnvironmentFault (no device).
        """
        _check_job(job, self._base_name, records, self._precision)
        pin_threads(self._threads, self._precision)
        keep_freed_memory()
        with usual_modes(self._precision):
            wrapped = self._wrap(job)
            rows = _tokenized(job, records, self._tokenizer)
            steps = _plan_steps(job, rows)
            held = self._prefixes.load(job, wrapped.first, rows, wrapped.dtype)
            stage = Stage(job, wrapped, parent, len(steps), self._prefixes)
            ticks = Ticks([_size(step) for step in steps], len(records))
            progress(ticks.before())
            for step in steps:
                progress(ticks.after(*stage.step(step)))
            self._prefixes.save(job, wrapped.first, rows, held)
            return stage.files()

    def _wrap(self, job: SliceJob) -> Trainable:
        kind = pattern_key(job.training)
        if self._wrapped is None or self._wrapped[0] != kind:
            self._wrapped = None  # one at a time is in memory
            base, self._tokenizer = load_patched(*self._base)
            self._wrapped = kind, Trainable(base, job.training)
        return self._wrapped[1]


def _size(step: Sequence[Batch]) -> tuple[int, int]:
    """Return the numbers of records and tokens of a step."""
    return sum(map(len, step)), sum(len(each.input_ids) for batch in step for each in batch)


def _check_job(
    job: SliceJob, base_name: str, records: Sequence[StoredRecord], precision: Precision
) -> None:
    if not precision.is_of(job.training):
        raise IntegrityError(
            "a job was made for another device or dtype",
            where=f"shard {job.shard}, slice {job.slice}",
            expected=str(precision.in_jobs() or "none"),
            got=str(
                {each: job.training[each] for each in DEFAULT_PRECISION.names if each in job.training}
                or "none"
            ),
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
    training = job.training
    steps = stage_steps(
        [each.id_digest for each, _ in rows],
        [len(each.input_ids) for _, each in rows],
        job.passes,
        micro_batch_size=training["micro_batch_size"],
        per_step=training["gradient_accumulation_steps"],
        seed=training["seed"],
        shard=job.shard,
        slice_=job.slice,
    )
    return [[[rows[index][1] for index in batch] for batch in step] for step in steps]
