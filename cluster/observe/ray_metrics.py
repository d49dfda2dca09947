"""Export a run's metrics to Prometheus through Ray.

Ray exports the metrics of SERIES on the endpoint of the driver's node, labelled by the run's name alone.
Ray is never imported or started for this: values that come before there is a connection are kept, and
written with the first event after it. Ray forgets a gauge that is not set again, so all gauges are set
again every REFRESH_S seconds until the run ends.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any, Self

from sisa.core import events
from sisa.core.events import Event
from sisa.flows.wiring.progress import Meter

BOUNDARIES_S = (1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0)
MOST_WAITING = 10_000
REFRESH_S = 5.0
COUNTER, GAUGE, HISTOGRAM = "Counter", "Gauge", "Histogram"
SERIES = {
    "sisa_slices_trained": (COUNTER, "Slices whose checkpoints were stored"),
    "sisa_tokens_trained": (COUNTER, "Tokens of the slices that were trained"),
    "sisa_tokens_per_second": (GAUGE, "Tokens per second of all workers together"),
    "sisa_slice_seconds": (HISTOGRAM, "Seconds that a slice took"),
    "sisa_queue_depth": (GAUGE, "Requests for deletion that are to be carried out"),
    "sisa_requests_undecided": (GAUGE, "Requests for deletion that wait for a decision"),
    "sisa_oldest_days_left": (GAUGE, "Days to the earliest due date of an open request"),
    "sisa_failed_erasures": (GAUGE, "Requests whose bytes could not be erased so far"),
    "sisa_erasure_failures": (COUNTER, "Erasures that failed"),
    "sisa_retrain_seconds": (HISTOGRAM, "Seconds from a deletion's commit until its shards arrived"),
}


def queue_readings(seen: events.QueueSeen) -> dict[str, float]:
    """Return the values of the series about requests for deletion."""
    days = seen.oldest_days_left
    return {
        "sisa_queue_depth": seen.depth,
        "sisa_requests_undecided": seen.undecided,
        "sisa_failed_erasures": seen.failed_erasures,
        "sisa_oldest_days_left": math.nan if days is None else days,  # Ray does not show NaN
    }


def readings(event: Event, meter: Meter, now: float) -> dict[str, float]:
    """Return the values of the series that an event changes; `meter` has taken the event before."""
    if isinstance(event, events.QueueSeen):
        return queue_readings(event)
    if isinstance(event, events.DeletionCompleted):
        return {"sisa_retrain_seconds": event.seconds}
    if isinstance(event, events.ErasureFailed):
        return {"sisa_erasure_failures": 1}
    if not isinstance(event, events.SliceProgress | events.SliceTrained):
        return {}
    speed = 0.0 if meter.over else meter.tokens_per_second(now)
    found: dict[str, float] = {"sisa_tokens_per_second": round(speed, 1)}
    if isinstance(event, events.SliceTrained) and event.seconds:  # else it was stored before
        found["sisa_slices_trained"] = 1
        found["sisa_tokens_trained"] = event.tokens
        found["sisa_slice_seconds"] = event.seconds
    return found


class RayMeters:
    """Ray's series of one run; their gauges last until the end of the block."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._session = ""
        self._made: dict[str, Any] = {}
        self._gauges: dict[str, float] = {}
        self._waiting: list[tuple[str, float]] = []
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="sisa-gauges", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def write(self, name: str, value: float) -> None:
        """Write a value and those that waited for a connection, or let it wait."""
        with self._one_at_a_time:
            if SERIES[name][0] == GAUGE:
                self._gauges[name] = value
            self._waiting.append((name, value))
            session = _session()
            if not session:
                del self._waiting[:-MOST_WAITING]
                return
            if session != self._session:  # series belong to a connection
                self._session, self._made = session, {}
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._record(*each)

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_S):
            with self._one_at_a_time:
                session = _session()
                if session and session == self._session:
                    for name, value in self._gauges.items():
                        self._record(name, value)

    def _record(self, name: str, value: float) -> None:
        from ray.util import metrics

        kind, description = SERIES[name]
        if name not in self._made:
            more = {"boundaries": list(BOUNDARIES_S)} if kind == HISTOGRAM else {}
            make = getattr(metrics, kind)
            self._made[name] = make(name, description=description, tag_keys=("run",), **more)
            self._made[name].set_default_tags({"run": self._run})
        series = self._made[name]
        if kind == GAUGE:
            series.set(value)
        elif kind == HISTOGRAM:
            series.observe(value)
        elif value > 0:
            series.inc(value)


def _session() -> str:
    """Return the id of the present connection to Ray; empty if there is none."""
    ray = sys.modules.get("ray")
    is_initialized = getattr(ray, "is_initialized", None)  # none while another thread imports Ray
    if ray is None or is_initialized is None or not is_initialized():
        return ""
    return str(ray.get_runtime_context().get_job_id())
