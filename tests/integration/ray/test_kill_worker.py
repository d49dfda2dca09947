"""A Ray worker killed from outside in the middle of its slices: every adapter keeps its bytes.

Real LoRA training on a tiny random base, with dropout and warm-up on, two shards side by side in one
worker. `test_ray_executor.py` has one shard a worker, with a scripted trainer.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from cluster.ray.executor import open_executor
from sisa.core.events import Event, Notice, SliceProgress, SliceTrained
from tests.models.chains import NUM_SLICES, real_chains, serial_bytes
from tests.models.scripted import bytes_of

pytestmark = [pytest.mark.ray, pytest.mark.torch]

NUM_SHARDS = 2


def training_workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [each for each in found if each.name().startswith("ray::train_remo")]


def test_a_killed_worker_changes_no_byte(tmp_path: Path) -> None:
    site, chains = real_chains(tmp_path, NUM_SHARDS, passes=(30, 3))
    expected = serial_bytes(site, chains)
    events: list[Event] = []
    killed: list[int] = []

    def report(event: Event) -> None:
        events.append(event)
        middle = isinstance(event, SliceProgress) and 0 < event.tokens < event.total_tokens
        announced = any(isinstance(each, Notice) for each in events)
        if isinstance(event, SliceProgress) and middle and event.slice == 1 and not announced:
            for worker in training_workers():
                killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    open_executor(site, {"num_workers": 1, "lanes": NUM_SHARDS}).run(chains, report)
    assert killed
    assert [event for event in events if isinstance(event, Notice)]
    trained = [event.job.key for event in events if isinstance(event, SliceTrained)]
    assert len(trained) == len(set(trained)) == NUM_SHARDS * NUM_SLICES
    assert bytes_of(site.checkpoints_at) == expected
