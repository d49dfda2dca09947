"""Write structured logs: one JSON object a line on standard error, with the name of the run.

    {"time": "2026-11-25T21:37:49.123+00:00", "level": "info", "run": "20261125T213749Z-3f9a1c2b",
     "source": "driver", "pid": 4711, "event": "slice_trained", "shard": 0, "slice": 1, ...}

A line names an event and its numbers, but no loss, text or id (`sisa/store/metrics.py`). A `message` is
one of this program's own sentences, without places and values. Workers write to their own standard
error, which Ray keeps among its logs; the driver receives the same events and sums them up.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from sisa.core import events
from sisa.core.events import Event, Report
from sisa.flows.wiring.progress import LINE_EVERY_S, Meter
from sisa.store.metrics import EVENT_NAMES, loggable_numbers

if TYPE_CHECKING:
    from sisa.core.run import RunContext

Level = Literal["info", "error"]


class JsonLog:
    """Write lines to a stream, each with the fields of `where`."""

    def __init__(self, stream: TextIO, run: str, source: str, **where: str) -> None:
        self._stream = stream
        self._always = {"run": run, "source": source, "pid": os.getpid(), **where}

    def write(self, name: str, level: Level = "info", **fields: Any) -> None:
        """Write one line. Fields are this program's own text, numbers or null."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        body = {"time": at, "level": level, **self._always, "event": name, **fields}
        print(json.dumps(body), file=self._stream, flush=True)

    def write_event(self, event: Event) -> None:
        """Write the line of an event."""
        level: Level = "error" if isinstance(event, events.ErasureFailed) else "info"
        extra = {"message": event.text} if isinstance(event, events.Notice) else {}
        self.write(EVENT_NAMES[type(event)], level, **loggable_numbers(event), **extra)


def driver_log(log: JsonLog) -> Report:
    """Return a report that sums up a run's progress, and writes every other event."""
    meter, last = Meter(), time.monotonic()

    def report(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        meter.take(event, now)
        if not isinstance(event, (events.SliceStarted, *events.PROGRESS)):
            log.write_event(event)
        elif now - last >= LINE_EVERY_S:
            last = now
            log.write("progress", **meter.numbers(now))

    return report


def worker_log(run: RunContext | None, stream: TextIO, node: str) -> Report | None:
    """Return a worker's report, which leaves progress to the driver; None if the run has no JSON log."""
    if run is None or run.log_format != "json":
        return None
    log = JsonLog(stream, run.run, "worker", node=node)

    def report(event: Event) -> None:
        if not isinstance(event, events.PROGRESS):
            log.write_event(event)

    return report
