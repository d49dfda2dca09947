"""Name the current run: everything that one command does, in all of its processes.

A run's name (the time in UTC and a random suffix) is in log lines, metrics and Ray's series, also in
those of workers. A run inside another run takes the outer name. `SISA_RUN` sets the name from outside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
RUN_VARIABLE = "SISA_RUN"
RUN = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run's name, and the format of its log lines."""

    run: str
    log_format: LogFormat = "text"


def is_run(name: str) -> bool:
    """Return whether a text can be the name of a run."""
    return RUN.fullmatch(name) is not None


_under_way: ContextVar[RunContext | None] = ContextVar("sisa_running", default=None)


def current_run() -> RunContext | None:
    """Return the run to which this code belongs."""
    return _under_way.get()


def new_run(log_format: LogFormat = "text") -> RunContext:
    """Return a run that begins now."""
    given = os.environ.get(RUN_VARIABLE, "")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return RunContext(given if is_run(given) else f"{now}-{os.urandom(4).hex()}", log_format)


@contextmanager
def running(run: RunContext | None = None) -> Iterator[RunContext]:
    """Make a run the current one until the end of the block: `run`, the current one or a new one."""
    found = run or current_run() or new_run()
    token = _under_way.set(found)
    try:
        yield found
    finally:
        _under_way.reset(token)
