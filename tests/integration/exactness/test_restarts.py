"""The driver is killed, or the head node lost: the same command ends with the same bytes.

A driver is a process of its own (`python -m tests.integration.exactness.test_restarts FOLDER ADDRESS`).
Ray keeps its tables in the head's memory, so a lost head ends a job; the error must say so, and stored
stages must survive.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.ray import nodes
from cluster.ray.executor import RayExecutor
from sisa.core.errors import EnvironmentFault, SisaError
from sisa.core.events import silent
from sisa.flows.chains import Site
from sisa.store.blobs.files import TEMPORARY_PREFIX
from tests.models.programs.clusters import add_node, own_cluster
from tests.models.scripted import (
    begun,
    bytes_of,
    folder_of,
    make_chains,
    make_site,
    open_scripted,
    script_of,
    scripted_proof,
    serial_bytes,
)
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("own_ray")]

ROOT = Path(__file__).parents[3]
WAITS = "1.1"


@contextmanager
def driver(site: Site, address: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.integration.exactness.test_restarts"]
    folder = str(folder_of(site))
    with subprocess.Popen(
        [*command, folder, address],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def drive(folder: Path, address: str) -> int:
    """Train as a driver does; return the exit code."""
    nodes.LOOK_EVERY_S, nodes.HEAD_LOST_S = 0.5, 2.0
    site = make_site(folder)
    chains = make_chains(site)
    try:
        RayExecutor(site, address, None, 3, open_scripted, prove=scripted_proof).run(chains, silent)
    except SisaError as error:
        print(error)
        return error.exit_code
    return 0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path)
    (site.base.directory / "model.safetensors").write_bytes(b"w" * 5000)
    return site


def sweep(site: Site) -> None:
    """Erase areas of killed drivers, which no ledger lists, as a writing command does."""
    held = site.checkpoints_at.held()
    site.checkpoints_at.erase([each for each in held if each.startswith(TEMPORARY_PREFIX)])


def test_a_killed_driver_and_a_lost_head(site: Site) -> None:
    expected = serial_bytes(site, make_chains(site))
    wait = script_of(site) / f"wait-{WAITS}"
    wait.touch()

    def waiting(times: int) -> bool:
        return [place for place, *_ in begun(site)].count(WAITS) == times

    with own_cluster() as cluster:
        add_node(cluster, "a")
        with driver(site, cluster.address) as first:
            wait_for(lambda: waiting(1))
            first.send_signal(signal.SIGKILL)
        with driver(site, cluster.address) as second:  # on the same cluster, from what is stored
            wait_for(lambda: waiting(2))
            cluster.head_node.kill_gcs_server()
            output, _ = second.communicate(timeout=120)
        assert second.returncode == EnvironmentFault.exit_code, output.decode()
        assert b"the head node of the Ray cluster is lost" in output
        assert b"run the command again" in output
    wait.unlink()
    sweep(site)
    assert bytes_of(site.checkpoints_at).keys() < expected.keys()
    with own_cluster() as cluster:
        add_node(cluster, "b")
        with driver(site, cluster.address) as third:
            output, _ = third.communicate(timeout=120)
        assert third.returncode == 0, output.decode()
    sweep(site)
    assert bytes_of(site.checkpoints_at) == expected
    places = [place for place, *_ in begun(site)]
    assert sorted({*places}) == sorted(f"{shard}.{each}" for shard in range(3) for each in range(3))
    # 1.0 was finished a moment before the first driver was killed, perhaps before that driver knew
    assert {place for place in places if places.count(place) > 1} <= {"1.0", WAITS, "1.2"}
    assert {node for _, _, node in begun(site)} == {"a", "b"}


if __name__ == "__main__":
    sys.exit(drive(Path(sys.argv[1]), sys.argv[2]))
