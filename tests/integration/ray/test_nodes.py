"""Clusters of several nodes: lost nodes, silent workers, nodes that train other bits.

All end with the bytes of the serial executor, or with a typed error before any work. A trainer scripted
by a directory replaces LoRA; `tests/endurance/nodes.py` has the real one and the real probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.ray import nodes
from cluster.ray.executor import RayExecutor
from cluster.ray.proofs import Proof
from sisa.core.domain import BaseFiles, Chain
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Event, Notice, SliceProgress, SliceTrained, silent
from sisa.flows.chains import Site
from sisa.lm.base.numerics import fingerprint
from sisa.store.blobs.local_blobs import LocalBlobs
from tests.models.programs.clusters import add_node, own_cluster, remove
from tests.models.scripted import (
    DIGEST,
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

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("own_ray")]


MIB = 2**20
HERE = fingerprint(1)
SPECS: dict[str, dict[str, str]] = {
    "other": {DIGEST: "f2 d1"},
    "faulty": {DIGEST: f"{HERE} d2"},
}


class Nodes:
    """A cluster and its nodes by name; a node that stays is reused by the next test."""

    def __init__(self, cluster: Cluster) -> None:
        self.address: str = cluster.address
        self._cluster = cluster
        self._held: dict[str, object] = {}

    def only(self, *names: str, **variables: str) -> None:
        """Add and remove nodes until there are exactly these."""
        for name in self._held.keys() - set(names):
            self.remove(name)
        for name in names:
            self.add(name, **variables)

    def add(self, name: str, **variables: str) -> None:
        if name not in self._held:
            env = {**SPECS.get(name, {}), **variables}
            self._held[name] = add_node(self._cluster, name, env_vars=env)

    def remove(self, name: str) -> None:
        remove(self._cluster, self._held.pop(name))


@pytest.fixture(scope="module")
def there() -> Iterator[Nodes]:
    with own_cluster(object_store_memory=80 * MIB) as cluster:
        yield Nodes(cluster)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"w" * 5000)
    return replace(make_site(tmp_path), base=BaseFiles(tmp_path / "base", "b1"))


@pytest.fixture
def chains(site: Site) -> list[Chain]:
    return make_chains(site)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOOK_EVERY_S", 0.2)


def executor(site: Site, there: Nodes, stall_limit_s: float | None = None) -> RayExecutor:
    return RayExecutor(site, there.address, None, 3, open_scripted, stall_limit_s, prove=scripted_proof)


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_node_is_removed_without_warning(site: Site, chains: list[Chain], there: Nodes) -> None:
    expected = serial_bytes(site, chains)
    there.only("a", "b")
    lost: list[str] = []
    wait = script_of(site) / "wait-2.1"
    wait.touch()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        at = [node for place, _, node in begun(site) if place == "2.1"]
        if at and not lost:
            lost.append(at[0])
            there.remove(at[0])
        if isinstance(event, Notice) and "shard 2 died" in event.text:
            wait.unlink()

    executor(site, there).run(chains, report)
    assert bytes_of(site.checkpoints_at) == expected
    first, second = (node for place, _, node in begun(site) if place == "2.1")
    assert {first, second} == {"a", "b"}
    trained = [event.job.key for event in events if isinstance(event, SliceTrained)]
    assert sorted(trained) == sorted(job.key for chain in chains for job in chain.jobs)


def test_a_silent_worker_is_killed_and_its_slice_trained_elsewhere(
    site: Site, chains: list[Chain], there: Nodes
) -> None:
    expected = serial_bytes(site, chains)
    there.only("a", "b")
    (script_of(site) / "stop-1.1").touch()
    events: list[Event] = []
    executor(site, there, stall_limit_s=2).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    (_, stopped, first), (_, _, second) = (each for each in begun(site) if each[0] == "1.1")
    assert {first, second} == {"a", "b"}
    assert not psutil.pid_exists(stopped)
    assert any("was silent for 2 s and is killed" in text for text in notices(events))


def test_a_worker_killed_for_memory(site: Site, chains: list[Chain], there: Nodes) -> None:
    expected = serial_bytes(site, chains)
    memory = psutil.virtual_memory()
    threshold = 1 - (memory.available - 1.5 * 2**30) / memory.total
    limits = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    there.only("small", **limits)
    (script_of(site) / "hungry-0.1").touch()
    events: list[Event] = []
    executor(site, there).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    assert [place for place, *_ in begun(site)].count("0.1") == 2
    assert any("shard 0 died" in text for text in notices(events))


def test_a_node_that_joins_later_trains(site: Site, chains: list[Chain], there: Nodes) -> None:
    there.only("a")
    wait = script_of(site) / "wait-2.0"
    wait.touch()

    def report(event: Event) -> None:
        if isinstance(event, SliceProgress):
            there.add("b")
        if isinstance(event, SliceTrained) and event.job.shard != 2:
            wait.unlink(missing_ok=True)

    executor(site, there).run(chains, report)
    assert {node for _, _, node in begun(site)} == {"a", "b"}
    assert bytes_of(site.checkpoints_at) == serial_bytes(site, chains)


def test_a_node_of_other_bits_never_trains(
    site: Site, chains: list[Chain], there: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = serial_bytes(site, chains)
    there.only("a", "other", "faulty")
    wait = script_of(site) / "wait-2.1"
    wait.touch()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if "2.1" in [place for place, *_ in begun(site)]:
            wait.unlink(missing_ok=True)

    executor(site, there).run(chains, report)
    assert {node for _, _, node in begun(site)} == {"a"}
    refusals = [text for text in notices(events) if "never trains for this model" in text]
    assert len(refusals) == 2
    assert any(f"fingerprint is f2, not {HERE[:12]}" in text for text in refusals)
    assert any("self-test gave d2, and d1" in text for text in refusals)
    assert bytes_of(site.checkpoints_at) == expected

    monkeypatch.setattr(nodes, "NO_NODE_S", 1)
    anew = replace(site, checkpoints_at=LocalBlobs(folder_of(site) / "anew"))
    wait.touch()
    lost: list[str] = []

    def lose(event: Event) -> None:
        events.append(event)
        if [place for place, *_ in begun(site)].count("2.1") == 2 and not lost:
            lost.append("a")
            there.remove("a")

    with pytest.raises(EnvironmentFault, match="no node") as caught:
        executor(anew, there).run(chains, lose)
    assert {node for _, _, node in begun(site)} == {"a"}
    assert any("is lost; places for 0 workers left" in text for text in notices(events))
    problems = [problem.what for problem in caught.value.problems]
    for why in (f"f2, not {HERE[:12]}", "gave d2, and d1", "too few CPUs"):  # the last is the head
        assert any(why in problem for problem in problems)


def test_the_drivers_node_is_the_reference_only_under_the_drivers_numerics(
    site: Site, chains: list[Chain], there: Nodes
) -> None:
    there.only("a")
    refused = RayExecutor(site, there.address, None, 3, open_scripted, prove=proof_of_another_driver)
    with pytest.raises(EnvironmentFault, match="on the driver's node would train other bits") as caught:
        refused.run(chains, silent)
    assert f"f3, not {HERE[:12]}" in caught.value.got
    assert begun(site) == []


def test_an_object_store_too_small_for_the_base(site: Site, chains: list[Chain], there: Nodes) -> None:
    with (site.base.directory / "model.safetensors").open("wb") as file:
        file.truncate(100 * MIB)
    there.only("a")
    executor(site, there).run(chains[:1], silent)  # sees the base under the driver's path
    with pytest.raises(EnvironmentFault, match="too small") as caught:
        RayExecutor(site, there.address, None, 3, open_scripted, prove=without_base).run(
            chains[1:], silent
        )
    assert str(80 * MIB) in caught.value.got
    assert str(100 * MIB) in caught.value.expected
    assert {place[0] for place, *_ in begun(site)} == {"0"}


def without_base(*_of: object) -> Proof:
    return Proof(HERE, "d1", has_base=False)


def proof_of_another_driver(*_of: object) -> Proof:
    return Proof("f3", "d1", has_base=True)
