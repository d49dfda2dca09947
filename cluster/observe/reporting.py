"""Show a command's events and errors to a person, or log them; export its metrics to Prometheus.

Everything goes to standard error; standard output stays free for the result.

>>> log_format_of(["train", "run.yaml", "--log-format", "json"]), log_format_of(["status"])
('json', 'text')
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

from cluster.observe.json_log import JsonLog, driver_log
from cluster.observe.ray_metrics import RayMeters, readings
from sisa.core import events
from sisa.core.events import Event, Report
from sisa.core.run import LogFormat, running
from sisa.flows.wiring.progress import Meter, progress

LOG_FORMAT_OPTION = "--log-format"


def log_format_of(arguments: Sequence[str]) -> LogFormat:
    """Return the log format that a command line asks for; click validates the option."""
    prefix = f"{LOG_FORMAT_OPTION}="
    given = [each.removeprefix(prefix) for each in arguments if each.startswith(prefix)]
    given += [after for each, after in pairwise(arguments) if each == LOG_FORMAT_OPTION]
    return "json" if "json" in given else "text"


def open_log() -> JsonLog | None:
    """Return the log of the current run, or None for text."""
    with running() as run:
        return JsonLog(sys.stderr, run.run, "driver") if run.log_format == "json" else None


@contextmanager
def watched() -> Iterator[Report]:
    """Yield a report that shows or logs events, and passes them to Ray's metrics."""
    meter, log = Meter(), open_log()
    shown = progress() if log is None else nullcontext(driver_log(log))
    with running() as run, shown as show, RayMeters(run.run) as meters:

        def report(event: Event) -> None:
            now = time.monotonic()
            show(event)
            meter.take(event, now)
            for name, value in readings(event, meter, now).items():
                meters.write(name, value)

        yield report


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
    """Write a notice for a person, or into the log; flows report events instead."""
    log = open_log()
    if log is not None:
        log.write_event(events.Notice(text.strip()))
    else:
        print(text, file=sys.stderr, flush=True)
