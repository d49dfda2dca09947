"""Events as metrics, over fakes: events before a connection wait for one, and gauges persist."""

from __future__ import annotations

import math
import sys
import threading
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from cluster.observe import ray_metrics
from cluster.observe.ray_metrics import SERIES, RayMeters, readings
from sisa.core.domain import SavedCheckpoint
from sisa.core.events import (
    Event,
    QueueSeen,
    SliceProgress,
    SliceStarted,
    SliceTrained,
    TrainingStarted,
)
from sisa.flows.wiring.progress import Meter
from tests.fakes.metrics import EVENTS, JOB, RUN, TRAINED
from tests.waiting import wait_for


def taken(meter: Meter, event: Event, now: float) -> dict[str, float]:
    meter.take(event, now)
    return readings(event, meter, now)


def test_every_metric_comes_from_an_event() -> None:
    meter, found = Meter(), list[tuple[str, float]]()
    for event in EVENTS:
        found += taken(meter, event, 1.0).items()
    assert {name for name, _ in found} == SERIES.keys()
    once = {name: value for name, value in found if SERIES[name][0] != "Gauge"}
    assert once == {
        "sisa_slices_trained": 1,
        "sisa_tokens_trained": 900,
        "sisa_erasure_failures": 1,
        "sisa_slice_seconds": 2.5,
        "sisa_retrain_seconds": 12.5,
    }
    assert all([name for name, _ in found].count(each) == 1 for each in once)
    queue = {"sisa_queue_depth": 2, "sisa_requests_undecided": 1, "sisa_failed_erasures": 1}
    assert dict(found).items() >= {**queue, "sisa_oldest_days_left": -3}.items()


def test_without_an_open_request_the_days_left_are_no_number() -> None:
    found = readings(QueueSeen(0, 0, 0, 0, None), Meter(), 1.0)
    assert math.isnan(found["sisa_oldest_days_left"])


def test_tokens_per_second_are_of_all_workers_and_end_with_the_training() -> None:
    meter = Meter()

    def speed(event: Event, now: float) -> float | None:
        return taken(meter, event, now).get("sisa_tokens_per_second")

    assert speed(TrainingStarted(((2, 1, 10), (3, 0, 10))), 0.0) is None
    for shard, slice_ in ((2, 1), (3, 0)):
        speed(SliceStarted(shard, slice_, 100), 0.0)
        last = speed(SliceProgress(shard, slice_, 50, 100), 10.0)
    assert last == 10.0
    assert speed(TRAINED, 20.0) == 5.0
    speed(TrainingStarted(((2, 1, 10),)), 30.0)
    assert speed(TRAINED, 40.0) == 0.0


def test_a_stage_that_was_stored_before_does_not_count() -> None:
    stored = SliceTrained(JOB, SavedCheckpoint(JOB.key, "m", "a", 1), 0.0, 0)
    assert taken(Meter(), stored, 1.0).keys() == {"sisa_tokens_per_second"}


@dataclass
class FakeRay:
    """A connection that comes and goes, and what was recorded over it."""

    job: str = ""
    recorded: list[tuple[str, float]] = field(default_factory=list)

    def is_initialized(self) -> bool:
        return bool(self.job)

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_job_id=lambda: self.job)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(ray_metrics, "REFRESH_S", 0.001)
    monkeypatch.setattr(RayMeters, "_record", lambda _self, *each: found.recorded.append(each))
    return found


def test_values_set_early_wait_for_a_connection(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    meters = RayMeters(RUN)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "ray")
        meters.write("sisa_queue_depth", 3)
    meters.write("sisa_erasure_failures", 1)
    assert ray.recorded == []
    ray.job = "01"
    meters.write("sisa_queue_depth", 1)
    early = [("sisa_queue_depth", 3), ("sisa_erasure_failures", 1)]
    assert ray.recorded == [*early, ("sisa_queue_depth", 1)]


def test_gauges_are_set_again_until_the_run_ends(ray: FakeRay) -> None:
    """Ray forgets one that is not; counters and histograms it keeps."""
    ray.job = "01"
    depth = ("sisa_queue_depth", 1)
    with RayMeters(RUN) as meters:
        meters.write("sisa_queue_depth", 2)
        meters.write("sisa_queue_depth", 1)
        meters.write("sisa_slices_trained", 1)
        meters.write("sisa_slice_seconds", 2.0)
        wait_for(lambda: ray.recorded.count(depth) > 3)
    count = len(ray.recorded)
    assert ray.recorded.count(depth) == count - 3
    time.sleep(0.01)
    assert len(ray.recorded) == count
    assert not any(each.name == "sisa-gauges" for each in threading.enumerate())


def test_gauges_stand_while_another_thread_imports_ray(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.job = "01"
    with RayMeters(RUN) as meters:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "ray", ModuleType("ray"))  # nothing in it yet
            meters.write("sisa_queue_depth", 1)
            time.sleep(0.02)  # the thread looks at it
            assert ray.recorded == []
        meters.write("sisa_queue_depth", 2)
        wait_for(lambda: ray.recorded.count(("sisa_queue_depth", 2)) > 2)


def test_gauges_of_a_lost_connection_wait_for_the_next_event(ray: FakeRay) -> None:
    ray.job = "01"
    with RayMeters(RUN) as meters:
        meters.write("sisa_queue_depth", 1)
        for job in ("", "02"):
            ray.job = job
            time.sleep(0.01)  # whoever had looked before is done
            count = len(ray.recorded)
            time.sleep(0.01)
            assert len(ray.recorded) == count
        meters.write("sisa_slices_trained", 1)
        wait_for(lambda: ray.recorded[-1] == ("sisa_queue_depth", 1))
