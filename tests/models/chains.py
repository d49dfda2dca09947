"""Chains of real stages, long enough that a kill falls into the second."""

from __future__ import annotations

from sisa.core.digest import sha256_hex
from sisa.core.domain import Chain, Part, Record, SliceFile, SliceJob
from sisa.core.ports import StoredRecord
from sisa.flows.serial import Site
from sisa.lm.base.numerics import fingerprint
from sisa.store.records import FileRecords

NUM_SLICES, RECORDS_PER_SLICE = 2, 12
TRAINING = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj"],
    "sequence_len": 128,
    "overlength": "refuse",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "optimizer": "adamw_torch",
    "lr_scheduler": "linear",
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "train_on_inputs": False,
    "seed": 7,
}


def make_chain(store: FileRecords, shard: int, site: Site) -> Chain:
    files: list[SliceFile] = []
    jobs: list[SliceJob] = []
    for slice_ in range(NUM_SLICES):
        records = make_records(shard, slice_)
        root = sha256_hex("".join(each.id_digest for each in records).encode())
        files.append(store.write(shard, slice_, root, records))
        jobs.append(
            SliceJob(
                shard=shard,
                slice=slice_,
                parent=jobs[-1].key if jobs else None,
                slices=tuple((file.slice, file.root) for file in files),
                num_records=sum(file.num_records for file in files),
                passes=(40 if slice_ else 4, 3),  # long enough that the kill falls into the second one
                training=TRAINING,
                base=site.base_digest,
                fingerprint=fingerprint(1),
            )
        )
    return Chain(shard, tuple(jobs), None, tuple(files))


def make_records(shard: int, slice_: int) -> list[StoredRecord]:
    stored = []
    for number in range(RECORDS_PER_SLICE):
        name = f"{shard}-{slice_}-{number}"
        parts = (Part("prompt", f"Who is {name}?"), Part("completion", f"A keeper of {name} bees."))
        stored.append(StoredRecord(sha256_hex(name.encode()), Record(name, None, "completion", parts)))
    return sorted(stored, key=lambda each: each.id_digest)
