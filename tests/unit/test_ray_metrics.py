"""Events as metrics, over a fake; what is told before a connection waits for one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_metrics import DESCRIPTIONS, Measuring, RayMeters
from sisa.domain import SavedCheckpoint
from sisa.events import QueueSeen, SliceProgress, SliceStarted, SliceTrained, TrainingStarted
from tests.unit.test_measured import EVENTS, JOB, RUN, TRAINED


class FakeMeters:
    """Numbers that can be looked at."""

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


def test_what_is_told_early_waits_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, str, float]] = []
    monkeypatch.setattr(RayMeters, "_record", lambda _self, *each: recorded.append(each))
    connected: list[Any] = []
    context = SimpleNamespace(get_job_id=lambda: "01")
    ray = SimpleNamespace(is_initialized=lambda: bool(connected), get_runtime_context=lambda: context)
    meters = RayMeters(RUN)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    meters.set("sisa_queue_depth", 3)
    monkeypatch.setitem(sys.modules, "ray", ray)
    meters.add("sisa_erasure_failures", 1)
    assert recorded == []
    connected.append(True)
    Measuring(meters)(QueueSeen(1, 0, 0, 0, None), 1.0)
    assert recorded[:2] == [("Gauge", "sisa_queue_depth", 3), ("Counter", "sisa_erasure_failures", 1)]
    assert recorded[2] == ("Gauge", "sisa_queue_depth", 1)
