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

from cluster.ray.executor import open_executor
from sisa.core.domain import Chain
from sisa.core.events import Event, Notice, SliceProgress, SliceTrained
from sisa.flows.serial import SerialExecutor, Site
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import FileRecords
from tests.fakes.keyring import PLAIN
from tests.models.chains import NUM_SLICES, make_chain
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.ray, pytest.mark.torch]

NUM_SHARDS = 2


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


def training_workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [each for each in found if each.name().startswith("ray::train_remo")]


def adapters(checkpoints: FileCheckpoints, chains: Sequence[Chain]) -> dict[str, str]:
    keys = [job.key for chain in chains for job in chain.jobs]
    return {key: checkpoints.describe(key).manifest_sha256 for key in keys}


def train_serially(site: Site, chains: Sequence[Chain]) -> dict[str, str]:
    from sisa.lm.train.trainer import LoraTrainer

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
