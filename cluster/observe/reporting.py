"""Show a command's events and errors to a person, or log them; export its metrics for Prometheus.

Everything goes to standard error; standard output stays free for the result. With `--log-format
json` each line there is a JSON object.

>>> log_format_of(["train", "run.yaml", "--log-format", "json"]), log_format_of(["status"])
('json', 'text')

Ray exports these metrics on the endpoint of the driver's node:

    ray_sisa_slices_trained_total     slices whose checkpoints were stored
    ray_sisa_tokens_trained_total     their tokens
    ray_sisa_tokens_per_second        of all workers together, while they train; else 0
    ray_sisa_slice_seconds            how long slices took (a histogram)
    ray_sisa_queue_depth              requests that are to be carried out
    ray_sisa_requests_undecided       requests that wait for a decision
    ray_sisa_oldest_days_left         days to the earliest due date among both
    ray_sisa_failed_erasures          requests whose bytes could not be erased so far
    ray_sisa_erasure_failures_total   erasures that failed
    ray_sisa_retrain_seconds          from a deletion's commit until its shards arrived (a histogram)

Every series holds the run's name and nothing of a record. Ray is never imported or started for this:
values that come before there is a connection are kept and passed on with the first event after it.
Without an open request the days left are not a number, which Ray does not show. Ray forgets a gauge that
is not set again, so all gauges are set again every REFRESH_S seconds until the run ends.

Ray exports every `RAY_metrics_report_interval_ms` (ten seconds) and shows a gauge for twice as long.

>>> class Shown:
...     def __getattr__(self, kind):
...         return lambda name, value: print(kind, name, value)
>>> Measuring(Shown())(QueueSeen(2, 1, 0, 0, None), now=1.0)
set sisa_queue_depth 2
set sisa_requests_undecided 1
set sisa_failed_erasures 0
set sisa_oldest_days_left nan
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self

from cluster.observe.json_log import DriverLog, JsonLog
from sisa.core.events import (
    DeletionCompleted,
    ErasureFailed,
    Event,
    Notice,
    QueueSeen,
    Report,
    SliceProgress,
    SliceTrained,
)
from sisa.flows.wiring.progress import LogFormat, Meter, progress, running

BOUNDARIES_S = (1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0)
MOST_WAITING = 10_000
REFRESH_S = 5.0
DESCRIPTIONS = {
    "sisa_slices_trained": "Slices whose checkpoints were stored",
    "sisa_tokens_trained": "Tokens of the slices that were trained",
    "sisa_tokens_per_second": "Tokens per second of all workers together",
    "sisa_slice_seconds": "Seconds that a slice took",
    "sisa_queue_depth": "Requests for deletion that are to be carried out",
    "sisa_requests_undecided": "Requests for deletion that wait for a decision",
    "sisa_oldest_days_left": "Days to the earliest due date of an open request",
    "sisa_failed_erasures": "Requests whose bytes could not be erased so far",
    "sisa_erasure_failures": "Erasures that failed",
    "sisa_retrain_seconds": "Seconds from a deletion's commit until its shards arrived",
}


class Meters(Protocol):
    def add(self, name: str, value: float) -> None:
        """Increase a counter."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram."""


class Measuring:
    """Turn events into metrics."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._meter = Meter()

    def __call__(self, event: Event, now: float) -> None:
        self._meter.take(event, now)
        to = self._meters
        if isinstance(event, SliceTrained) and event.seconds:
            to.add("sisa_slices_trained", 1)
            to.add("sisa_tokens_trained", event.tokens)
            to.observe("sisa_slice_seconds", event.seconds)
        elif isinstance(event, QueueSeen):
            to.set("sisa_queue_depth", event.depth)
            to.set("sisa_requests_undecided", event.undecided)
            to.set("sisa_failed_erasures", event.failed_erasures)
            days = event.oldest_days_left
            to.set("sisa_oldest_days_left", math.nan if days is None else days)
        elif isinstance(event, DeletionCompleted):
            to.observe("sisa_retrain_seconds", event.seconds)
        elif isinstance(event, ErasureFailed):
            to.add("sisa_erasure_failures", 1)
        if isinstance(event, SliceProgress | SliceTrained):
            speed = 0.0 if self._meter.over else self._meter.tokens_per_second(now)
            to.set("sisa_tokens_per_second", round(speed, 1))


class RayMeters:
    """Ray's series of one run; their gauges last until the end of the block."""

    def __init__(self, run: str, refresh_s: float | None = None) -> None:
        self._run = run
        self._refresh_s = REFRESH_S if refresh_s is None else refresh_s
        self._session = ""
        self._made: dict[str, Any] = {}
        self._gauges: dict[str, float] = {}
        self._waiting: list[tuple[str, str, float]] = []
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="sisa-gauges", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def add(self, name: str, value: float) -> None:
        self._pass_on("Counter", name, value)

    def set(self, name: str, value: float) -> None:
        with self._one_at_a_time:
            self._gauges[name] = value
        self._pass_on("Gauge", name, value)

    def observe(self, name: str, value: float) -> None:
        self._pass_on("Histogram", name, value)

    def _refresh(self) -> None:
        while not self._over.wait(self._refresh_s):
            with self._one_at_a_time:
                session = _session()
                if session and session == self._session:
                    for name, value in self._gauges.items():
                        self._record("Gauge", name, value)

    def _pass_on(self, kind: str, name: str, value: float) -> None:
        with self._one_at_a_time:
            self._waiting.append((kind, name, value))
            session = _session()
            if not session:
                del self._waiting[:-MOST_WAITING]
                return
            if session != self._session:  # series belong to a connection
                self._session, self._made = session, {}
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._record(*each)

    def _record(self, kind: str, name: str, value: float) -> None:
        from ray.util import metrics

        if name not in self._made:
            more: dict[str, Sequence[float]] = {}
            if kind == "Histogram":
                more = {"boundaries": list(BOUNDARIES_S)}
            make = getattr(metrics, kind)
            made = make(name, description=DESCRIPTIONS[name], tag_keys=("run",), **more)
            made.set_default_tags({"run": self._run})
            self._made[name] = made
        series = self._made[name]
        if kind == "Gauge":
            series.set(value)
        elif kind == "Histogram":
            series.observe(value)
        elif value > 0:
            series.inc(value)


def _session() -> str:
    """Return the present connection to Ray; empty if there is none."""
    ray = sys.modules.get("ray")
    is_initialized = getattr(ray, "is_initialized", None)  # none while another thread imports Ray
    if ray is None or is_initialized is None or not is_initialized():
        return ""
    return str(ray.get_runtime_context().get_job_id())


OPTION = "--log-format"


def log_format_of(arguments: Sequence[str]) -> LogFormat:
    """Return the log format that a command line asks for; click validates the option."""
    given = [each.removeprefix(f"{OPTION}=") for each in arguments if each.startswith(f"{OPTION}=")]
    given += [after for each, after in pairwise(arguments) if each == OPTION]
    return "json" if "json" in given else "text"


def open_log() -> JsonLog | None:
    """Return the log of the current run, or None for text."""
    with running() as run:
        return JsonLog(sys.stderr, run.run, "driver") if run.log_format == "json" else None


@contextmanager
def watched() -> Iterator[Report]:
    """Yield a report that shows or logs events, and passes them to Ray's metrics."""
    with running() as run, _shown() as shown, RayMeters(run.run) as meters:
        measuring = Measuring(meters)

        def report(event: Event) -> None:
            shown(event)
            measuring(event, time.monotonic())

        yield report


@contextmanager
def _shown() -> Iterator[Report]:
    log = open_log()
    if log is not None:
        yield DriverLog(log)
        return
    with progress() as shown:
        yield shown


@contextmanager
def logged_run(command: str) -> Iterator[None]:
    """Write the first and the last line of a command's log."""
    log, started = open_log(), time.monotonic()
    if log is not None:
        log.write("run_started", command=command)
    yield
    if log is not None:
        log.write("run_finished", command=command, seconds=round(time.monotonic() - started, 3))


def say(text: str) -> None:
    """Write a line to a person or a log, from outside any flow."""
    log = open_log()
    if log is not None:
        log.write_event(Notice(text.strip()))
    else:
        print(text, file=sys.stderr, flush=True)
