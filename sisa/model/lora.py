"""The real Trainer: one stage of LoRA training as a pure function, to the byte.

Rules: a stage starts from bytes (its parent's files, or the base and a seed), in the process that
trained the parent as in any other, so resuming is the same code. Seeds come from the job: adapter
weights from (seed, shard), dropout from (seed, shard, slice, micro-batch). Schedule and warm-up
restart with each stage; the optimizer's moments go on. The loss of an optimizer step is the summed
cross-entropy over the number of label tokens in all of its micro-batches. The base is never written to.
A stage over patches names the base under them. The stage runs where the base is. The base may be in
bfloat16; adapters, gradients, moments and the loss are in float32 always, and so are their files.

Not covered: the loss (`losses.py`); the modules' forward (`trained_linear.py`); more than one device at
once; full fine-tuning; encoder-decoder models.

    files = LoraTrainer(directory, digest, threads=1).train(job, None, records, print)

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from sisa.arithmetic import USUAL, Arithmetic
from sisa.digest import canonical_json
from sisa.domain import SliceJob
from sisa.errors import IntegrityError, InvalidInput
from sisa.model.adapter import (
    ADAPTER_FILE,
    CONFIG_FILE,
    DEFAULT_NAME,
    adapter_tensors,
    attach,
    config_bytes,
    lora_config,
    read_tensors,
    tensor_bytes,
)
from sisa.model.batches import stage_batches
from sisa.model.flat import Flat
from sisa.model.kept_prefixes import Kept, Rows
from sisa.model.layers import first_adapted
from sisa.model.layerwise import train_block
from sisa.model.losses import Batch, count_labels, has_plain_head, summed_loss
from sisa.model.numerics import fingerprint, keep_freed_memory, pin_threads
from sisa.model.patched import load_patched, patched_name
from sisa.model.prefix import Lower, Prefixes
from sisa.model.ticks import Ticks
from sisa.model.tokens import tokenize_all
from sisa.model.trained_linear import quicken
from sisa.plan import LAYERWISE
from sisa.ports import PrefixStore, StoredRecord, Tick

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def seed_from(*parts: object) -> int:
    """A seed for torch that depends on all parts.

    >>> seed_from(1, 2, "init") == seed_from(1, 2, "init") != seed_from(1, 3, "init")
    True
    """
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class LoraTrainer:
    """Trains stages on one base, under patches or not. Safe to keep: nothing that a stage leaves behind
    reaches another's bits; hidden states of records stay in memory as long as it does."""

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
        arithmetic: Arithmetic = USUAL,
        *,
        prefixes: PrefixStore | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """`patches` are files of those to train over, lowest first. `prefixes` keeps hidden states of
        the lower layers, up to so many bytes of a shard."""
        self._base = (base_dir, base_digest, patches, arithmetic)
        self._base_name = patched_name(base_digest, patches)
        self._threads, self._arithmetic = threads, arithmetic
        self._direct: bool | None = None
        self._prefixes = Prefixes()
        self._checked: set[int] = set()
        named = (self._base_name, fingerprint(threads, arithmetic))
        self._kept = None if prefixes is None else Kept(prefixes, prefix_bytes, *named)

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        """Files of the stage's checkpoint: adapter, its configuration, optimizer, state.

        Raises IntegrityError (another base, a damaged parent), InvalidInput (records that do not
        fit, modules that the base lacks, a loss that is not finite) and EnvironmentFault (no device).
        """
        _check_job(job, self._base_name, records, self._arithmetic)
        pin_threads(self._threads, self._arithmetic)
        keep_freed_memory()
        base, tokenizer = load_patched(*self._base)
        rows = _tokenized(job, records, tokenizer)
        steps = _plan_steps(job, rows)
        if self._direct is None:
            self._direct = has_plain_head(base)
        first = first_adapted(job.training, base)
        if first and first not in self._checked:
            Lower(base, first).check()
            self._checked.add(first)
        kept = self._kept if first else None
        held = kept.read(job, first, rows, base.dtype, self._prefixes) if kept else {}
        stage = Stage(job, base, parent, len(steps), self._direct, self._prefixes)
        ticks = Ticks([_size(step) for step in steps], len(records))
        progress(ticks.before())
        for step in steps:
            progress(ticks.after(*stage.step(step)))
        if kept:
            kept.write(job, first, rows, self._prefixes, held)
        return stage.files()


def _size(step: Sequence[Batch]) -> tuple[int, int]:
    """Records and tokens of a step."""
    return sum(map(len, step)), sum(len(each.input_ids) for batch in step for each in batch)


def _check_job(
    job: SliceJob, base_name: str, records: Sequence[StoredRecord], arithmetic: Arithmetic
) -> None:
    if not arithmetic.is_of(job.training):
        raise IntegrityError(
            "a job was made for another device or dtype",
            where=f"shard {job.shard}, slice {job.slice}",
            expected=str(arithmetic.in_jobs() or "none"),
            got=str(
                {each: job.training[each] for each in USUAL.names if each in job.training} or "none"
            ),
            next_step="run the command again; `sisa train RUN.yaml` names what differs",
        )
    if job.base != base_name:
        raise IntegrityError(
            "a job was made for another base model, or for other patches beneath",
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


def _tokenized(job: SliceJob, records: Sequence[StoredRecord], tokenizer: Any) -> Rows:
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


def _plan_steps(job: SliceJob, told: Rows) -> list[list[Batch]]:
    training = job.training
    batches = stage_batches(
        [each.id_digest for each, _ in told],
        [len(each.input_ids) for _, each in told],
        job.passes,
        micro_batch_size=training["micro_batch_size"],
        seed=training["seed"],
        shard=job.shard,
        slice_=job.slice,
    )
    rows: list[Batch] = [[told[index][1] for index in batch] for batch in batches]
    per_step = training["gradient_accumulation_steps"]
    return [rows[start : start + per_step] for start in range(0, len(rows), per_step)]


class Stage:
    """Model, optimizer and schedule between the stage's first and last step."""

    def __init__(
        self,
        job: SliceJob,
        base: Any,
        parent: Mapping[str, bytes] | None,
        num_steps: int,
        direct: bool = True,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`direct`: whether the base has a plain head (`losses.py`); `prefixes`: of this base."""
        training = job.training
        tensors = None if parent is None else read_tensors(parent, ADAPTER_FILE)
        self._job, self._direct = job, direct
        self._model = attach(
            base,
            lora_config(training, base),
            tensors,
            init_seed=seed_from(training["seed"], job.shard, "init"),
        )
        self._model.train()
        if LAYERWISE in training:
            train_block(self._model, training[LAYERWISE], len(job.before))
        quicken(self._model)
        first = first_adapted(training, base)
        self._lower = Lower(self._model.get_base_model(), first) if first else None
        self._prefixes = prefixes or Prefixes()
        named = self._model.named_parameters()
        self._trained = {name: each for name, each in named if each.requires_grad}
        self._flat = Flat(self._trained)
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

    def step(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """One optimizer step over its micro-batches; the loss, summed over how many label tokens."""
        training = self._job.training
        num_labels = sum(count_labels(batch) for batch in batches)
        mean = 0.0
        self._flat.clear()
        for batch in batches:
            below = self._below(batch)
            name = (training["seed"], self._job.shard, self._job.slice, "dropout", self._micro_batches)
            torch.manual_seed(seed_from(*name))
            with below:
                loss = summed_loss(self._model, batch, direct=self._direct) / num_labels
            mean += _finite(loss, self._job)
            loss.backward()  # type: ignore[no-untyped-call]
            self._micro_batches += 1
        torch.nn.utils.clip_grad_norm_([self._flat.values], training["max_grad_norm"], foreach=False)
        self._optimizer.step()
        self._scheduler.step()
        return mean * num_labels, num_labels

    def _below(self, batch: Batch) -> AbstractContextManager[None]:
        """Lets a forward over the batch begin at the lowest adapted layer, if there are lower ones."""
        if self._lower is None:
            return nullcontext()
        return self._lower.given([self._prefixes.states(self._lower, each.input_ids) for each in batch])

    def files(self) -> dict[str, bytes]:
        """The checkpoint as bytes."""
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
            ADAPTER_FILE: tensor_bytes(adapter_tensors(self._model)),
            CONFIG_FILE: config_bytes(self._model),
            OPTIMIZER_FILE: tensor_bytes(self._moments()),
            STATE_FILE: canonical_json(state),
        }

    def _moments(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of each parameter, by name; the count of steps is one for all."""
        state = self._optimizer.state[self._flat.values]
        found: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            if moment in state:
                whole = state[moment]
                if whole.dim():
                    parts = self._flat.by_name(whole)
                else:
                    parts = {name: whole.clone() for name in self._trained}
                found |= {f"{_without_name(name)}.{moment}": each for name, each in parts.items()}
        return found

    def _put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises IntegrityError where the parent kept moments of some of the parameters only."""
        names = {name: f"{_without_name(name)}." for name in self._trained}
        held = {each for each in tensors if each.rpartition(".")[0] + "." in names.values()}
        if not held:
            return
        values = self._flat.values
        state = {moment: torch.zeros_like(values) for moment in MOMENTS[:2]}
        try:
            for moment, whole in state.items():
                for name, part in self._flat.by_name(whole).items():
                    part.copy_(tensors[names[name] + moment])
            step = tensors[next(iter(names.values())) + MOMENTS[2]].clone()
        except (KeyError, RuntimeError) as error:
            raise IntegrityError(
                "a checkpoint's optimizer does not fit its adapter",
                where=OPTIMIZER_FILE,
                got=f"{len(tensors)} tensors",
                next_step="run `sisa verify` on the model",
            ) from error
        self._optimizer.state[values] = {**state, MOMENTS[2]: step}


def _without_name(parameter: str) -> str:
    return parameter.replace(f".{DEFAULT_NAME}.", ".")


def make_optimizer(training: Mapping[str, Any], values: torch.nn.Parameter) -> torch.optim.Optimizer:
    """AdamW (on the CPU in one pass over its tensors) or plain SGD."""
    lr, decay = training["learning_rate"], training["weight_decay"]
    if training["optimizer"] in ("adamw", "adamw_torch"):
        fused = values.device.type == "cpu"
        return torch.optim.AdamW([values], lr, weight_decay=decay, foreach=False, fused=fused)
    if training["optimizer"] == "sgd":
        return torch.optim.SGD([values], lr, weight_decay=decay, foreach=False, fused=False)
    raise InvalidInput(
        "no such optimizer",
        where="optimizer",
        expected="adamw_torch or sgd",
        got=str(training["optimizer"]),
        next_step="mend the run file",
    )


def _finite(loss: torch.Tensor, job: SliceJob) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise InvalidInput(
            "training diverged: the loss is not a finite number",
            where=f"shard {job.shard}, slice {job.slice}",
            got=str(value),
            next_step="lower learning_rate in the run file",
        )
    return value
