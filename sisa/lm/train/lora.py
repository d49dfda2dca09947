"""The LoRA trainer: one stage of training as a pure function of its inputs, to the byte.

A stage starts from bytes: its parent's files, or the base and a seed. The process that trained the
parent does the same, so resuming runs the same code. The base is never written to. What a process did
before affects no bit: each stage has modules of its own (`trainable.py`), and torch has its default
modes while it runs. Encoder-decoder models, and more than one device at once, are not supported.

    files = LoraTrainer(directory, digest, threads=1).train(job, None, records, print)

Seeds come from the job: adapter weights from (seed, shard), dropout from (seed, shard, slice,
micro-batch). The schedule and its warm-up restart with each stage; the optimizer's moments continue. The
loss of an optimizer step is the summed cross-entropy divided by the number of label tokens in all its
micro-batches. Adapters, gradients, moments and loss are in float32 whatever the base's dtype, and so are
the files.

Steps are a pure function of the job and the stage's records. Each pass has its own order, by the hash of
seed, shard, slice, pass and the record's keyed digest, so neither the order of arrival nor another shard
matters. A fractional last pass is a prefix of its order, so a stage presents exactly
`record_epochs(job)` records. A pass is cut into optimizer steps; only its last step may be smaller.

The steps do not group records by length: steps of long records alone give each of their tokens less
weight and ended at a higher loss. Within a step, records are sorted by length and cut into
micro-batches; this saves padding and does not change the sum.

>>> training = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "seed": 0}
>>> job = SliceJob(0, 0, None, (), 3, (3, 2), training, "base", "fingerprint")
>>> stage_steps(job, ["a", "b", "c"], [5, 2, 2])
[[[1, 0]], [[2]], [[2, 0]]]

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from sisa.core.digest import canonical_json
from sisa.core.domain import DEFAULT_PRECISION, Precision, SliceJob, record_epochs
from sisa.core.errors import IntegrityError
from sisa.core.ports import HiddenStateStore, StoredRecord, Tick
from sisa.lm.base.adapter import adapter_files
from sisa.lm.base.low_rank import ADAPTER_FILE, patched_name, read_tensors, tensor_bytes
from sisa.lm.base.numerics import fingerprint, keep_freed_memory, pin_threads, usual_modes
from sisa.lm.base.tokens import tokenize_all
from sisa.lm.base.weights import load_patched
from sisa.lm.train.frozen_layers import HiddenStates, TokenizedRows
from sisa.lm.train.lanes import MicroBatch, compute, finish, refuse_lanes
from sisa.lm.train.losses import Batch, count_labels
from sisa.lm.train.trainable import Trainable, file_name, pattern_key
from sisa.planning.plan import LAYERWISE

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
AVERAGES, STEP = ("exp_avg", "exp_avg_sq"), "step"  # of AdamW; plain SGD has no moments


def stage_steps(
    job: SliceJob, id_digests: Sequence[str], lengths: Sequence[int]
) -> list[list[list[int]]]:
    """Return the record indices of each micro-batch of each step, pass after pass.

    `id_digests` and `lengths`, in tokens, are those of the stage's records.
    """
    steps: list[list[list[int]]] = []
    size = job.training["micro_batch_size"]
    remaining, number = record_epochs(job), 0
    while remaining > 0:
        salt = f"{job.training['seed']}|{job.shard}|{job.slice}|{number}"
        hashes = [hashlib.sha256(f"{salt}|{each}".encode()).digest() for each in id_digests]
        order = sorted(range(len(hashes)), key=hashes.__getitem__)[:remaining]
        for step in _cut(order, size * job.training["gradient_accumulation_steps"]):
            step.sort(key=lambda i: (lengths[i], id_digests[i]))
            steps.append(_cut(step, size))
        remaining -= len(order)
        number += 1
    return steps


def _cut(whole: list[int], size: int) -> list[list[int]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class Ticks:
    """The progress of a stage: a `Tick` before its first step and after each one.

    A step belongs to the pass of its last record. The tick that ends a pass carries the mean loss of the
    whole pass; losses of single steps or records are not reported.

    >>> ticks = Ticks([[5, 5], [5], [4, 4]], num_records=3)
    >>> first, second = ticks.after(6.0, 3), ticks.after(6.0, 1)
    >>> first.step, first.tokens, first.total_tokens, first.epoch, first.loss
    (1, 10, 23, 1, None)
    >>> second.epoch, second.num_epochs, second.num_records, second.loss
    (1, 2, 3, 3.0)
    """

    def __init__(self, steps: Sequence[Sequence[int]], num_records: int) -> None:
        """Count from the start. `steps` are the lengths in tokens of each step's records."""
        self._steps = steps
        self._epochs = [(end - 1) // num_records + 1 for end in accumulate(map(len, steps))]
        self._total = sum(map(sum, steps))
        self._step = self._tokens = self._records = self._labels = 0
        self._loss = 0.0

    def after(self, loss: float, num_labels: int) -> Tick:
        """Return the tick after the next step, given its loss summed over `num_labels` label tokens."""
        lengths = self._steps[self._step]
        self._step += 1
        self._tokens += sum(lengths)
        self._records += len(lengths)
        self._labels += num_labels
        self._loss += loss
        if self._epochs[self._step : self._step + 1] == [self._epochs[self._step - 1]]:
            return self.now()
        tick = self.now(self._records, self._loss / max(1, self._labels))
        self._records = self._labels = 0
        self._loss = 0.0
        return tick

    def now(self, num_records: int = 0, loss: float | None = None) -> Tick:
        """Return the tick after the steps so far."""
        at = max(0, self._step - 1)
        epoch, last = (self._epochs[at], self._epochs[-1]) if self._epochs else (0, 0)
        return Tick(
            self._tokens, self._total, self._step, len(self._steps), epoch, last, num_records, loss
        )


def seed_from(*parts: object) -> int:
    """Return a seed for torch that depends on all parts."""
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class FlatParams:
    """Trained parameters laid out as one parameter, so that one optimizer update covers all of them.

    Each parameter is a view of its part, in the order of names. A tall matrix is stored transposed
    there, as its gradient arrives; what `by_name` returns has the parameter's own shape. Gradients
    accumulate in place. All parameters share one dtype and one device.
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        self._shapes = {name: each.shape for name, each in named.items()}
        device = next(iter(named.values())).device if named else None
        size = sum(each.numel() for each in named.values())
        self.values = torch.nn.Parameter(torch.empty(size, device=device))
        self.values.grad = torch.zeros(size, device=device)
        values, gradients = self.by_name(self.values.data), self.by_name(self.values.grad)
        for name, each in named.items():
            values[name].copy_(each.data)
            each.data, each.grad = values[name], gradients[name]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views, by parameter name, into a tensor of the same size as `values`."""
        found: dict[str, Tensor] = {}
        at = 0
        for name, shape in self._shapes.items():
            part = flat[at : at + shape.numel()]
            at += shape.numel()
            tall = len(shape) == 2 and shape[0] > shape[1]
            found[name] = part.view(shape[1], shape[0]).t() if tall else part.view(shape)
        return found


class Stage:
    """The model, optimizer and schedule of a stage."""

    def __init__(
        self,
        job: SliceJob,
        wrapped: Trainable,
        parent: Mapping[str, bytes] | None,
        num_steps: int,
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Begin a stage from its parent's files, or from the base.

        `hidden_states` are those of the wrapped base. Raise IntegrityError if the parent's files are
        damaged.
        """
        training = job.training
        tensors = None if parent is None else read_tensors(parent, ADAPTER_FILE)
        block = (training[LAYERWISE], len(job.before)) if LAYERWISE in training else None
        self._job, self._wrapped = job, wrapped
        self._hidden_states = hidden_states or HiddenStates()
        self._own = wrapped.begin(tensors, seed_from(training["seed"], job.shard, "init"), block)
        self._flat = FlatParams(self._own.trained)
        self._optimizer = make_optimizer(training, self._flat.values)
        if parent is not None:
            self._put_moments(read_tensors(parent, OPTIMIZER_FILE))
        self._num_steps = num_steps
        self._num_warmup_steps = math.ceil(training["warmup_ratio"] * num_steps)
        self._scheduler = get_scheduler(
            training["lr_scheduler"],
            self._optimizer,
            num_warmup_steps=self._num_warmup_steps,
            num_training_steps=num_steps,
        )
        self._micro_batches = 0

    def step(self, batches: Sequence[Batch]) -> Generator[MicroBatch, None, tuple[float, int]]:
        """Take one optimizer step; yield each micro-batch, which the caller computes.

        Return the summed loss and the number of label tokens.
        """
        training = self._job.training
        num_labels = sum(count_labels(batch) for batch in batches)
        mean = 0.0
        self._optimizer.zero_grad(set_to_none=False)
        for batch in batches:
            at = (training["seed"], self._job.shard, self._job.slice, "dropout", self._micro_batches)
            micro_batch = MicroBatch(
                job=self._job,
                wrapped=self._wrapped,
                own=self._own,
                hidden_states=self._hidden_states,
                batch=batch,
                num_labels=num_labels,
                seed=seed_from(*at),
            )
            yield micro_batch
            mean += micro_batch.loss
            self._micro_batches += 1
        torch.nn.utils.clip_grad_norm_([self._flat.values], training["max_grad_norm"], foreach=False)
        self._optimizer.step()
        self._scheduler.step()
        return mean * num_labels, num_labels

    def files(self) -> dict[str, bytes]:
        """Return the files of the stage's checkpoint."""
        state = {
            "job": self._job.key,
            "steps": self._num_steps,
            "scheduler": {
                "name": self._job.training["lr_scheduler"],
                "num_warmup_steps": self._num_warmup_steps,
                "last_epoch": self._scheduler.last_epoch,
                "last_lr": self._scheduler.get_last_lr(),
            },
        }
        return {
            **adapter_files(self._own.model),
            OPTIMIZER_FILE: tensor_bytes(self._moments()),
            STATE_FILE: canonical_json(state),
        }

    def _moments(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's moments of each parameter, by name; all share one count of steps."""
        found: dict[str, torch.Tensor] = {}
        for moment, whole in self._optimizer.state[self._flat.values].items():
            if moment == STEP:
                parts = {name: whole.clone() for name in self._own.trained}
            else:
                parts = self._flat.by_name(whole)
            found |= {f"{file_name(name)}.{moment}": each for name, each in parts.items()}
        return found

    def _put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore moments. Raise IntegrityError if the parent has those of some parameters only."""
        names = [file_name(name) for name in self._own.trained]
        if not any(each.rpartition(".")[0] in names for each in tensors):
            return
        values = self._flat.values
        state = {moment: torch.zeros_like(values) for moment in AVERAGES}
        try:
            for moment, whole in state.items():
                for name, part in self._flat.by_name(whole).items():
                    part.copy_(tensors[f"{file_name(name)}.{moment}"])
            state[STEP] = tensors[f"{names[0]}.{STEP}"].clone()
        except (KeyError, RuntimeError) as error:
            raise IntegrityError(
                "a checkpoint's optimizer does not fit its adapter",
                where=OPTIMIZER_FILE,
                got=f"{len(tensors)} tensors",
                next_step="run `sisa verify` on the model",
            ) from error
        self._optimizer.state[values] = state


def make_optimizer(training: Mapping[str, Any], values: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Return the run file's optimizer: AdamW (on the CPU in its fused form) or plain SGD."""
    lr, decay = training["learning_rate"], training["weight_decay"]
    if training["optimizer"] == "sgd":
        return torch.optim.SGD([values], lr=lr, weight_decay=decay, foreach=False, fused=False)
    fused = values.device.type == "cpu"
    return torch.optim.AdamW([values], lr=lr, weight_decay=decay, foreach=False, fused=fused)


_tested: dict[tuple[Any, ...], tuple[str | None, Any]] = {}  # what this process tested last, for lanes


class LoraTrainer:
    """A trainer of stages on one base, with or without patches.

    Records' hidden states stay in memory as long as the trainer does.
    """

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
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
        self._base = (base_dir, base_digest, patches, precision)
        self._base_name = patched_name(base_digest, patches)
        self._threads, self._precision = threads, precision
        self._known = (self._base_name, fingerprint(threads, precision))
        self._wrapped: tuple[bytes, Trainable] | None = None
        self._tokenizer: Any = None
        self._hidden_states = HiddenStates(
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
            key = (self._base_name, self._threads, self._precision, pattern_key(training))
            if key not in _tested:
                _tested.clear()
                refusal = refuse_lanes(wrapped, training["sequence_len"])
                _tested[key] = refusal, wrapped.row_tests
            refusal, wrapped.row_tests = _tested[key]
            return refusal

    def _wrap(self, training: Mapping[str, Any]) -> Trainable:
        pin_threads(self._threads, self._precision)
        keep_freed_memory()
        kind = pattern_key(training)
        if self._wrapped is None or self._wrapped[0] != kind:
            self._wrapped = None  # one at a time is in memory
            base, self._tokenizer = load_patched(*self._base)
            self._wrapped = kind, Trainable(base, training, self._known)
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
