"""Keeping what is measured: a report that passes every event on, and appends a line for some.

Rules: lines bear the name of the run under way. The state of the queue is kept when it has changed. An
event is told first and kept then.

Not covered: what a line holds (`measured.py`), where it rests (`store/metrics.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from sisa.core.events import Event, QueueSeen, Report
from sisa.core.measured import metrics_line
from sisa.core.ports import Metrics
from sisa.flows.wiring.run_context import current_run, new_run


def recording(report: Report, metrics: Metrics, now: Callable[[], str]) -> Report:
    """The report, and lines of metrics for what it is told."""
    run = (current_run() or new_run()).run
    last: QueueSeen | None = None

    def told(event: Event) -> None:
        nonlocal last
        report(event)
        if isinstance(event, QueueSeen):
            if event == last:
                return
            last = event
        if (made := metrics_line(event, now(), run)) is not None:
            metrics.append(made)

    return told
