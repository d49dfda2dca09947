"""The real Trainer: one stage of LoRA training as a pure function, to the byte.

Rules: a stage starts from bytes (its parent's files, or the base and a seed), in the process that
trained the parent as in any other, so resuming is the same code. Seeds come from the job: adapter
weights from (seed, shard), dropout from (seed, shard, slice, micro-batch). Schedule and warm-up
restart with each stage; the optimizer's moments go on. The loss of an optimizer step is the summed
cross-entropy over the number of label tokens in all of its micro-batches. Rows are padded on the
right and no attention mask is passed: under causal attention a real token never sees padding. Logits
are computed only at positions that predict a label. The base is never written to. A stage over
patches names the base under them. The stage runs where the base is. The base may be in bfloat16;
adapters, gradients, moments and the loss are in float32 always, and so are their files.

Not covered: more than one device at once; full fine-tuning; encoder-decoder models.

    files = LoraTrainer(directory, digest, threads=1).train(job, None, records, print)

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
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
from sisa.model.layerwise import train_block
from sisa.model.numerics import pin_threads
from sisa.model.patched import load_patched, patched_name
from sisa.model.ticks import Ticks
from sisa.model.tokens import NO_LOSS, Tokens, tokenize_all
from sisa.plan import LAYERWISE
from sisa.ports import StoredRecord, Tick

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Batch = Sequence[Tokens]


def seed_from(*parts: object) -> int:
    """A seed for torch that depends on all parts.

    >>> seed_from(1, 2, "init") == seed_from(1, 2, "init") != seed_from(1, 3, "init")
    True
    """
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class LoraTrainer:
    """Trains stages on one base, under patches or not. Safe to keep: no stage leaves anything behind."""

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        threads: int,
        patches: Sequence[Mapping[str, bytes]] = (),
        arithmetic: Arithmetic = USUAL,
    ) -> None:
        """`patches` are files of those to train over, lowest first."""
        self._base = (base_dir, base_digest, patches, arithmetic)
        self._base_name = patched_name(base_digest, patches)
        self._threads, self._arithmetic = threads, arithmetic

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
        base, tokenizer = load_patched(*self._base)
        steps = _plan_steps(job, records, tokenizer)
        stage = Stage(job, base, parent, num_steps=len(steps))
        ticks = Ticks([_size(step) for step in steps], len(records))
        progress(ticks.before())
        for step in steps:
            progress(ticks.after(*stage.step(step)))
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


def _plan_steps(job: SliceJob, records: Sequence[StoredRecord], tokenizer: Any) -> list[list[Batch]]:
    training = job.training
    tokens = tokenize_all(
        [each.record for each in records],
        tokenizer,
        sequence_len=training["sequence_len"],
        overlength=training["overlength"],
        train_on_inputs=training["train_on_inputs"],
        positions=[f"shard {job.shard}, record {n + 1} of the stage" for n in range(len(records))],
    )
    batches = stage_batches(
        [each.id_digest for each in records],
        [len(each.input_ids) for each in tokens],
        job.passes,
        micro_batch_size=training["micro_batch_size"],
        seed=training["seed"],
        shard=job.shard,
        slice_=job.slice,
    )
    rows: list[Batch] = [[tokens[index] for index in batch] for batch in batches]
    per_step = training["gradient_accumulation_steps"]
    return [rows[start : start + per_step] for start in range(0, len(rows), per_step)]


class Stage:
    """Model, optimizer and schedule between the stage's first and last step."""

    def __init__(
        self, job: SliceJob, base: Any, parent: Mapping[str, bytes] | None, num_steps: int
    ) -> None:
        training = job.training
        tensors = None if parent is None else read_tensors(parent, ADAPTER_FILE)
        self._job = job
        self._model = attach(
            base,
            lora_config(training, base),
            tensors,
            init_seed=seed_from(training["seed"], job.shard, "init"),
        )
        self._model.train()
        if LAYERWISE in training:
            train_block(self._model, training[LAYERWISE], len(job.before))
        named = self._model.named_parameters()
        self._trained = {name: each for name, each in named if each.requires_grad}
        self._optimizer = make_optimizer(training, list(self._trained.values()))
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
        for batch in batches:
            name = (training["seed"], self._job.shard, self._job.slice, "dropout", self._micro_batches)
            torch.manual_seed(seed_from(*name))
            loss = summed_loss(self._model, batch) / num_labels
            mean += _finite(loss, self._job)
            loss.backward()  # type: ignore[no-untyped-call]
            self._micro_batches += 1
        torch.nn.utils.clip_grad_norm_(self._trained.values(), training["max_grad_norm"], foreach=False)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mean * num_labels, num_labels

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
        return {
            f"{_without_name(name)}.{moment}": self._optimizer.state[each][moment]
            for name, each in self._trained.items()
            for moment in MOMENTS
            if moment in self._optimizer.state[each]
        }

    def _put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, each in self._trained.items():
            keys = {moment: f"{_without_name(name)}.{moment}" for moment in MOMENTS}
            held = {moment: tensors[key].clone() for moment, key in keys.items() if key in tensors}
            if held:
                # The count of steps stays on the CPU, as AdamW has it.
                on = {moment: held[moment].to(each.device) for moment in held if moment != "step"}
                self._optimizer.state[each] = held | on


def _without_name(parameter: str) -> str:
    return parameter.replace(f".{DEFAULT_NAME}.", ".")


def make_optimizer(
    training: Mapping[str, Any], parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW or plain SGD, in the plain implementation (fused and grouped ones give other bits)."""
    lr, decay = training["learning_rate"], training["weight_decay"]
    if training["optimizer"] in ("adamw", "adamw_torch"):
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, foreach=False, fused=False)
    if training["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, lr, weight_decay=decay, foreach=False, fused=False)
    raise InvalidInput(
        "no such optimizer",
        where="optimizer",
        expected="adamw_torch or sgd",
        got=str(training["optimizer"]),
        next_step="mend the run file",
    )


@dataclass(frozen=True, slots=True)
class Padded:
    """A micro-batch as tensors: ids [B, T], columns [K] whose next token has a label in any row,
    and those labels [B, K]."""

    ids_BT: torch.Tensor
    columns_K: torch.Tensor
    labels_BK: torch.Tensor

    def to(self, device: torch.device) -> Padded:
        """The same on a device."""
        return Padded(self.ids_BT.to(device), self.columns_K.to(device), self.labels_BK.to(device))


def pad(batch: Batch) -> Padded:
    """Pad on the right to the batch's own longest row."""
    length = max(len(each.input_ids) for each in batch)
    ids_BT = torch.zeros((len(batch), length), dtype=torch.long)
    labels_BT = torch.full((len(batch), length), NO_LOSS, dtype=torch.long)
    for row, each in enumerate(batch):
        ids_BT[row, : len(each.input_ids)] = torch.tensor(each.input_ids)
        labels_BT[row, : len(each.labels)] = torch.tensor(each.labels)
    next_BT = labels_BT[:, 1:]
    columns_K = (next_BT != NO_LOSS).any(0).nonzero().flatten()
    return Padded(ids_BT, columns_K, next_BT[:, columns_K])


def count_labels(batch: Batch) -> int:
    """Tokens of a micro-batch that bear loss."""
    return sum(label != NO_LOSS for each in batch for label in each.labels[1:])


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over a micro-batch's label tokens."""
    padded = pad(batch).to(model.device)
    logits_BKV = model(input_ids=padded.ids_BT, logits_to_keep=padded.columns_K, use_cache=False).logits
    return cross_entropy(
        logits_BKV.flatten(0, 1).float(),
        padded.labels_BK.flatten(),
        ignore_index=NO_LOSS,
        reduction="sum",
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
