"""Events as metrics, over fakes: events before a connection wait for one, and gauges persist."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from cluster.observe.reporting import DESCRIPTIONS, Measuring, RayMeters
from sisa.core.domain import SavedCheckpoint
from sisa.core.events import QueueSeen, SliceProgress, SliceStarted, SliceTrained, TrainingStarted
from tests.unit.store.test_metrics import EVENTS, JOB, RUN, TRAINED


class FakeMeters:
    """Meters whose numbers can be inspected."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.gauges: dict[str, float] = {}
        self.observed: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.counters[name] = self.counters.get(name, 0) + value

    def set(self, name: str, value: float) -> None:
        self.gauges[name] = value

    def observe(self, name: str, value: float) -> None:
        self.observed.setdefault(name, []).append(value)


def test_every_metric_comes_from_an_event() -> None:
    meters = FakeMeters()
    measuring = Measuring(meters)
    for event in EVENTS:
        measuring(event, 1.0)
    assert meters.counters == {
        "sisa_slices_trained": 1,
        "sisa_tokens_trained": 900,
        "sisa_erasure_failures": 1,
    }
    assert meters.observed == {"sisa_slice_seconds": [2.5], "sisa_retrain_seconds": [12.5]}
    queue = {"sisa_queue_depth": 2, "sisa_requests_undecided": 1, "sisa_failed_erasures": 1}
    assert meters.gauges.items() >= {**queue, "sisa_oldest_days_left": -3}.items()
    assert meters.counters.keys() | meters.gauges.keys() | meters.observed.keys() == DESCRIPTIONS.keys()


def test_tokens_per_second_are_of_all_workers_and_end_with_the_training() -> None:
    meters = FakeMeters()
    measuring = Measuring(meters)
    measuring(TrainingStarted(((2, 1, 10), (3, 0, 10))), 0.0)
    for shard, slice_ in ((2, 1), (3, 0)):
        measuring(SliceStarted(shard, slice_, 100), 0.0)
        measuring(SliceProgress(shard, slice_, 50, 100), 10.0)
    assert meters.gauges["sisa_tokens_per_second"] == 10.0
    measuring(TRAINED, 20.0)
    assert meters.gauges["sisa_tokens_per_second"] == 5.0
    measuring(TrainingStarted(((2, 1, 10),)), 30.0)
    measuring(TRAINED, 40.0)
    assert meters.gauges["sisa_tokens_per_second"] == 0.0


def test_a_stage_that_was_stored_before_does_not_count() -> None:
    meters = FakeMeters()
    Measuring(meters)(SliceTrained(JOB, SavedCheckpoint(JOB.key, "m", "a", 1), 0.0, 0), 1.0)
    assert (meters.counters, meters.observed) == ({}, {})


@dataclass
class FakeRay:
    """A connection that comes and goes, and what was recorded over it."""

    job: str = ""
    recorded: list[tuple[str, str, float]] = field(default_factory=list)

    def is_initialized(self) -> bool:
        return bool(self.job)

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_job_id=lambda: self.job)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(RayMeters, "_record", lambda _self, *each: found.recorded.append(each))
    return found


def test_what_is_told_early_waits_for_a_connection(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters = RayMeters(RUN)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "ray")
        meters.set("sisa_queue_depth", 3)
    meters.add("sisa_erasure_failures", 1)
    assert ray.recorded == []
    ray.job = "01"
    Measuring(meters)(QueueSeen(1, 0, 0, 0, None), 1.0)
    early = [("Gauge", "sisa_queue_depth", 3), ("Counter", "sisa_erasure_failures", 1)]
    assert ray.recorded[:2] == early
    assert ray.recorded[2] == ("Gauge", "sisa_queue_depth", 1)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_gauges_are_set_again_until_the_run_ends(ray: FakeRay) -> None:
    """Ray forgets one that is not; counters and histograms it keeps."""
    ray.job = "01"
    depth = ("Gauge", "sisa_queue_depth", 1)
    with RayMeters(RUN, refresh_s=0.001) as meters:
        meters.set("sisa_queue_depth", 2)
        meters.set("sisa_queue_depth", 1)
        meters.add("sisa_slices_trained", 1)
        meters.observe("sisa_slice_seconds", 2.0)
        wait_until(lambda: ray.recorded.count(depth) > 3)
    count = len(ray.recorded)
    assert ray.recorded.count(depth) == count - 3
    time.sleep(0.01)
    assert len(ray.recorded) == count
    assert not any(each.name == "sisa-gauges" for each in threading.enumerate())


def test_gauges_stand_while_another_thread_imports_ray(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.job = "01"
    with RayMeters(RUN, refresh_s=0.001) as meters:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "ray", ModuleType("ray"))  # nothing in it yet
            meters.set("sisa_queue_depth", 1)
            time.sleep(0.02)  # the thread looks at it
            assert ray.recorded == []
        meters.set("sisa_queue_depth", 2)
        wait_until(lambda: ray.recorded.count(("Gauge", "sisa_queue_depth", 2)) > 2)


def test_gauges_of_a_lost_connection_wait_for_the_next_event(ray: FakeRay) -> None:
    ray.job = "01"
    with RayMeters(RUN, refresh_s=0.001) as meters:
        meters.set("sisa_queue_depth", 1)
        for job in ("", "02"):
            ray.job = job
            time.sleep(0.01)  # whoever had looked before is done
            count = len(ray.recorded)
            time.sleep(0.01)
            assert len(ray.recorded) == count
        meters.add("sisa_slices_trained", 1)
        wait_until(lambda: ray.recorded[-1] == ("Gauge", "sisa_queue_depth", 1))
