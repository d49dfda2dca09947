"""A Ray worker killed from outside in the middle of a slice: every adapter keeps its sha256.

Real LoRA training on a tiny random base, with dropout and warm-up on, against the serial executor.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace

import psutil
import pytest

from cluster.ray.ray_executor import open_executor
from sisa.core.digest import sha256_hex
from sisa.core.domain import Chain, Part, Record, SliceFile, SliceJob
from sisa.core.events import Event, Notice, SliceProgress, SliceTrained
from sisa.core.ports import StoredRecord
from sisa.flows.serial import SerialExecutor, Site
from sisa.lm.base.numerics import fingerprint
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import FileRecords
from tests.fakes.keyring import PLAIN
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.ray, pytest.mark.torch]

NUM_SHARDS, NUM_SLICES, RECORDS_PER_SLICE = 2, 2, 12
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    from sisa.lm.base.weights import base_digest

    directory = tmp_path_factory.mktemp("kill")
    base = make_tiny_base(directory / "base")
    places = LocalBlobs(directory / "records"), LocalBlobs(directory / "checkpoints")
    return Site(*places, base, base_digest=base_digest(base), threads=1, keyring=PLAIN)


@pytest.fixture(scope="module")
def chains(site: Site) -> list[Chain]:
    return [make_chain(FileRecords(site.records_at, PLAIN), shard, site) for shard in range(NUM_SHARDS)]


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


def training_workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [each for each in found if each.name().startswith("ray::train_remo")]


def adapters(checkpoints: FileCheckpoints, chains: Sequence[Chain]) -> dict[str, str]:
    keys = [job.key for chain in chains for job in chain.jobs]
    return {key: checkpoints.describe(key).manifest_sha256 for key in keys}


def train_serially(site: Site, chains: Sequence[Chain]) -> dict[str, str]:
    from sisa.lm.train.lora import LoraTrainer

    checkpoints = FileCheckpoints(site.base_dir.with_name("serial"), PLAIN)
    trainer = LoraTrainer(site.base_dir, site.base_digest, site.threads)
    SerialExecutor(trainer, FileRecords(site.records_at, PLAIN), checkpoints).run(chains, ignore)
    return adapters(checkpoints, chains)


@pytest.fixture(scope="module")
def expected(site: Site, chains: list[Chain]) -> dict[str, str]:
    return train_serially(site, chains)


def ignore(_: Event) -> None:
    """Ignore an event."""


@pytest.mark.parametrize(("num_workers", "lanes"), [(NUM_SHARDS, 1), (1, NUM_SHARDS)])
def test_killed_workers_change_no_byte(
    site: Site, chains: list[Chain], expected: dict[str, str], num_workers: int, lanes: int
) -> None:
    here = replace(site, checkpoints_at=LocalBlobs(site.base_dir.with_name(f"ray-{lanes}")))
    events: list[Event] = []
    killed: list[tuple[int, int]] = []

    def report(event: Event) -> None:
        events.append(event)
        middle = isinstance(event, SliceProgress) and 0 < event.tokens < event.total_tokens
        announced = any(isinstance(each, Notice) for each in events)
        if isinstance(event, SliceProgress) and middle and event.slice == 1 and not announced:
            killed.append((event.shard, event.slice))
            for worker in training_workers():
                os.kill(worker.pid, signal.SIGKILL)

    open_executor(here, {"num_workers": num_workers, "lanes": lanes}).run(chains, report)
    assert killed
    assert [event for event in events if isinstance(event, Notice)]
    trained = [event.job.key for event in events if isinstance(event, SliceTrained)]
    assert len(trained) == len(set(trained)) == NUM_SHARDS * NUM_SLICES
    assert adapters(FileCheckpoints(here.checkpoints_at, PLAIN), chains) == expected
