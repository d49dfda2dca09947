"""The current run: one name for all that one command does, in every process that does it.

The name shows when the run began, in UTC, and is otherwise random; log lines, metrics and Ray's series
bear it, in the workers too. Inner runs are part of the outer one. `SISA_RUN` gives the name, for
whoever starts a command elsewhere and must know it there. It reaches no bit of a model.

>>> with running(RunContext("20261125T213749Z-3f9a1c2b", "json")), running() as inner:
...     inner.run
'20261125T213749Z-3f9a1c2b'
>>> current_run() is None
True
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from sisa.core.measured import is_run

LogFormat = Literal["text", "json"]
RUN_VARIABLE = "SISA_RUN"


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run's name, and how its log lines are written."""

    run: str
    log_format: LogFormat = "text"


_under_way: ContextVar[RunContext | None] = ContextVar("sisa_running", default=None)


def current_run() -> RunContext | None:
    """Return the run that this is a part of."""
    return _under_way.get()


def new_run(log_format: LogFormat = "text") -> RunContext:
    """Return a run that begins now."""
    given = os.environ.get(RUN_VARIABLE, "")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return RunContext(given if is_run(given) else f"{now}-{os.urandom(4).hex()}", log_format)


@contextlib.contextmanager
def running(run: RunContext | None = None) -> Iterator[RunContext]:
    """Make this run the current one until the end of the block; without one, go on with the current
    run, or begin a new one."""
    found = run or current_run() or new_run()
    token = _under_way.set(found)
    try:
        yield found
    finally:
        _under_way.reset(token)
