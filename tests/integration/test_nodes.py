"""Clusters of several nodes: nodes that are lost, workers that are silent, nodes that train other bits.

All end with the bytes of the serial executor, or with a typed error before any work. A trainer that a
directory scripts stands in for LoRA; the last test has the real one and the real probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster import nodes
from cluster.proofs import Proof
from cluster.ray_executor import RayExecutor
from sisa.domain import Chain
from sisa.errors import EnvironmentFault
from sisa.events import Event, Notice, SliceProgress, SliceTrained
from sisa.serial import Site
from tests.integration.clusters import add_node, own_cluster, remove
from tests.integration.scripted import (
    DIGEST,
    begun,
    bytes_of,
    ignore,
    make_chains,
    make_site,
    open_scripted,
    script_of,
    scripted_proof,
    serial_bytes,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with own_cluster() as cluster:
        yield cluster


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"w" * 5000)
    return replace(make_site(tmp_path), base_dir=tmp_path / "base")


@pytest.fixture
def chains(site: Site) -> list[Chain]:
    return make_chains(site)


@pytest.fixture(autouse=True)
def _nodes_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nodes, "LOOK_EVERY_S", 0.2)
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        for node in list(cluster.worker_nodes):
            remove(cluster, node)


def executor(site: Site, cluster: Cluster, stall_limit_s: float | None = None) -> RayExecutor:
    return RayExecutor(
        site, cluster.address, None, 3, open_scripted, stall_limit_s, prove=scripted_proof
    )


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_node_is_removed_without_warning(site: Site, chains: list[Chain], cluster: Cluster) -> None:
    expected = serial_bytes(site, chains)
    lost = {name: add_node(cluster, name) for name in ("a", "b")}
    wait = script_of(site) / "wait-2.1"
    wait.touch()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        at = [node for place, _, node in begun(site) if place == "2.1"]
        if lost and at:
            remove(cluster, lost.pop(at[0]))
            lost.clear()
        if isinstance(event, Notice) and "shard 2 died" in event.text:
            wait.unlink()

    executor(site, cluster).run(chains, report)
    assert bytes_of(site.checkpoints_at) == expected
    first, second = (node for place, _, node in begun(site) if place == "2.1")
    assert {first, second} == {"a", "b"}
    trained = [event.job.key for event in events if isinstance(event, SliceTrained)]
    assert sorted(trained) == sorted(job.key for chain in chains for job in chain.jobs)


def test_a_silent_worker_is_killed_and_its_slice_trained_elsewhere(
    site: Site, chains: list[Chain], cluster: Cluster
) -> None:
    expected = serial_bytes(site, chains)
    for name in ("a", "b"):
        add_node(cluster, name)
    (script_of(site) / "stop-1.1").touch()
    events: list[Event] = []
    executor(site, cluster, stall_limit_s=2).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    (_, stopped, first), (_, _, second) = (each for each in begun(site) if each[0] == "1.1")
    assert {first, second} == {"a", "b"}
    assert not psutil.pid_exists(stopped)
    assert any("was silent for 2 s and is killed" in text for text in notices(events))


def test_a_worker_killed_for_memory(site: Site, chains: list[Chain], cluster: Cluster) -> None:
    expected = serial_bytes(site, chains)
    memory = psutil.virtual_memory()
    threshold = 1 - (memory.available - 1.5 * 2**30) / memory.total
    limits = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    add_node(cluster, "a", env_vars=limits)
    (script_of(site) / "hungry-0.1").touch()
    events: list[Event] = []
    executor(site, cluster).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    assert [place for place, *_ in begun(site)].count("0.1") == 2
    assert any("shard 0 died" in text for text in notices(events))


def test_a_node_that_joins_later_trains(site: Site, chains: list[Chain], cluster: Cluster) -> None:
    add_node(cluster, "a")
    wait = script_of(site) / "wait-2.0"
    wait.touch()
    joined: list[object] = []

    def report(event: Event) -> None:
        if isinstance(event, SliceProgress) and not joined:
            joined.append(add_node(cluster, "b"))
        if isinstance(event, SliceTrained) and event.job.shard != 2:
            wait.unlink(missing_ok=True)

    executor(site, cluster).run(chains, report)
    assert {node for _, _, node in begun(site)} == {"a", "b"}
    assert bytes_of(site.checkpoints_at) == serial_bytes(site, chains)


def test_a_node_of_other_bits_never_trains(site: Site, chains: list[Chain], cluster: Cluster) -> None:
    add_node(cluster, "good")
    add_node(cluster, "other", env_vars={DIGEST: "f2 d1"})
    add_node(cluster, "faulty", env_vars={DIGEST: "f1 d2"})
    events: list[Event] = []
    executor(site, cluster).run(chains, events.append)
    assert {node for _, _, node in begun(site)} == {"good"}
    told = [text for text in notices(events) if "never trains for this model" in text]
    assert len(told) == 2
    assert any("fingerprint is f2, not f1" in text for text in told)
    assert any("self-test gave d2, and d1" in text for text in told)
    assert bytes_of(site.checkpoints_at) == serial_bytes(site, chains)


def test_no_node_may_train(site: Site, chains: list[Chain], cluster: Cluster) -> None:
    add_node(cluster, "other", env_vars={DIGEST: "f2 d1"})
    with pytest.raises(EnvironmentFault, match="no node") as caught:
        executor(site, cluster).run(chains, ignore)
    assert any("too few CPUs" in problem.what for problem in caught.value.problems)  # the head
    assert any("f2, not f1" in problem.what for problem in caught.value.problems)
    assert begun(site) == []


def test_every_node_is_lost(
    site: Site, chains: list[Chain], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "NO_NODE_S", 1)
    add_node(cluster, "a")
    (script_of(site) / "wait-2.1").touch()

    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if "2.1" in [place for place, *_ in begun(site)]:
            for node in list(cluster.worker_nodes):
                remove(cluster, node)

    with pytest.raises(EnvironmentFault, match="no node"):
        executor(site, cluster).run(chains, report)
    assert any("is lost; places for 0 workers left" in text for text in notices(events))


def test_an_object_store_too_small_for_the_base(site: Site, chains: list[Chain]) -> None:
    with (site.base_dir / "model.safetensors").open("wb") as file:
        file.truncate(100 * 2**20)
    with own_cluster(object_store_memory=80 * 2**20) as cluster:
        add_node(cluster, "a")
        executor(site, cluster).run(chains[:1], ignore)  # sees the base under the driver's path
        with pytest.raises(EnvironmentFault, match="too small") as caught:
            RayExecutor(site, cluster.address, None, 3, open_scripted, prove=without_base).run(
                chains[1:], ignore
            )
    assert "83886080" in caught.value.got
    assert "104857600" in caught.value.expected
    assert {place[0] for place, *_ in begun(site)} == {"0"}


def without_base(*_of: object) -> Proof:
    return Proof("f1", "d1", has_base=False)
