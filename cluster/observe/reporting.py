"""Show a command's events and errors to a person, or log them, as the run under way asks.

Everything goes to standard error; standard output stays free for the result. With `--log-format
json` each line there is a JSON object. Ray is not imported.

>>> log_format_of(["train", "run.yaml", "--log-format", "json"]), log_format_of(["status"])
('json', 'text')
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from cluster.observe.json_log import DriverLog, JsonLog
from cluster.observe.ray_metrics import Measuring, RayMeters
from sisa.core.events import Event, Notice, Report
from sisa.flows.wiring.progress import progress
from sisa.flows.wiring.run_context import LogFormat, running

OPTION = "--log-format"


def log_format_of(arguments: Sequence[str]) -> LogFormat:
    """Return how a command line wants its log; the option itself is checked where it is declared."""
    given = [each.removeprefix(f"{OPTION}=") for each in arguments if each.startswith(f"{OPTION}=")]
    given += [after for each, after in pairwise(arguments) if each == OPTION]
    return "json" if "json" in given else "text"


def open_log() -> JsonLog | None:
    """Return the log of the run under way; None where a person reads."""
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
    """Write a line for a person or a log, from outside of any flow."""
    log = open_log()
    if log is not None:
        log.write_event(Notice(text.strip()))
    else:
        print(text, file=sys.stderr, flush=True)
