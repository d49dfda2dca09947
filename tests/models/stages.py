"""Stages of a shard over a tiny real base: what to train, and the trainer's files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sisa.core.domain import BaseFiles, Part, Record, SliceJob
from sisa.core.ports import StoredRecord, Tick

TRAINING: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["v_proj", "q_proj"],
    "sequence_len": 128,
    "overlength": "refuse",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "train_on_inputs": False,
    "seed": 3,
}

Files = dict[str, bytes]


def stored(number: int) -> StoredRecord:
    parts = (Part("prompt", f"Who is {number}?"), Part("completion", f" Ada the {number * 77}."))
    name = hashlib.sha256(str(number).encode()).hexdigest()
    return StoredRecord(name, Record(f"r{number}", None, "completion", parts))


RECORDS = [stored(number) for number in range(9)]


def job_for(
    base: BaseFiles, slice_: int = 0, num_records: int = 9, shard: int = 0, **changed: Any
) -> SliceJob:
    parent = "0" * 64 if slice_ else None
    slices = tuple((each, "root") for each in range(slice_ + 1))
    training = {**TRAINING, **changed}
    return SliceJob(shard, slice_, parent, slices, num_records, (3, 2), training, base.digest, "fp")


def train(
    base: BaseFiles,
    job: SliceJob,
    parent: Mapping[str, bytes] | None = None,
    records: Sequence[StoredRecord] = RECORDS,
    progress: Callable[[Tick], None] = lambda _: None,
) -> Files:
    from sisa.lm.train.trainer import LoraTrainer

    return LoraTrainer(base, threads=1).train(job, parent, records, progress)


def names(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
