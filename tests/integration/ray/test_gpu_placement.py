"""GPUs as Ray counts them: what tasks request, what they see, and a cluster with too few.

Ray's GPUs are numbers given to a node at its start, so placement needs no GPU.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray import executor as ray_executor
from cluster.ray.executor import open_executor
from cluster.ray.scheduling import Placement
from cluster.ray.session import connect
from cluster.ray.tasks import run_tasks
from sisa.core.domain import BaseFiles, Precision
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Report, silent
from sisa.flows.chains import Site
from sisa.lm.base import cuda_device
from sisa.store.blobs.local_blobs import LocalBlobs
from tests.fakes.keyring import PLAIN

pytestmark = pytest.mark.ray

CUDA = Precision("cuda")


def seen(wanted: Path, _: Report) -> tuple[list[Any], str | None, str | None]:
    """Return what a task was given, once the other task runs as well."""
    import ray

    (wanted / str(os.getpid())).touch()
    until = time.monotonic() + 30
    while len(list(wanted.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    name = "CUDA_VISIBLE_DEVICES"
    return ray.get_gpu_ids(), os.environ.get(name), os.environ.get(cuda_device.WORKSPACE)


def run(tasks: list[Path], placement: Placement) -> list[Any]:
    session = connect(None, 2)
    return run_tasks(tasks, seen, silent, session=session, placement=placement, label=str)


def test_two_tasks_share_a_gpu_and_have_the_workspace(tmp_path: Path) -> None:
    found = run([tmp_path] * 2, Placement(1, 0.5, cuda_device.cuda_environment()))
    assert len(list(tmp_path.iterdir())) == 2, "side by side"
    assert found == [([0], "0", cuda_device.cuda_environment()[cuda_device.WORKSPACE])] * 2


def test_too_few_gpus_are_reported_before_any_task_starts(tmp_path: Path) -> None:
    for placement in (Placement(1, 2), Placement(3, 1)):
        with pytest.raises(EnvironmentFault, match="no node") as caught:
            run([tmp_path], placement)
        assert f"{placement.num_cpus} CPUs and {placement.num_gpus} GPUs" in str(caught.value.expected)
        assert [each.what for each in caught.value.problems] == ["too few CPUs or GPUs for one worker"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    here = LocalBlobs(tmp_path)
    return Site(here, here, BaseFiles(tmp_path, "b1"), 1, PLAIN, precision=CUDA)


def test_what_a_worker_asks_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run file: a share, whole GPUs, one by default with cuda, none on the CPU."""
    asked: list[Placement] = []
    monkeypatch.setattr(ray_executor, "require_device", lambda _: None)
    monkeypatch.setattr(ray_executor, "run_tasks", lambda *_, **how: asked.append(how["placement"]))
    monkeypatch.setattr(ray_executor, "order_chains", lambda _: [])
    anything: Any = [SimpleNamespace(jobs=())]
    for options in ({}, {"num_gpus": 0.25}, {"num_gpus": 2}):
        open_executor(site, options).run(anything, silent)
    open_executor(replace(site, precision=Precision()), {}).run(anything, silent)
    assert [each.num_gpus for each in asked] == [1, 0.25, 2, 0]
    assert [cuda_device.WORKSPACE in each.environment for each in asked] == [True, True, True, False]
