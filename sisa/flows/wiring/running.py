"""The run that is under way: one name for all that one command does, wherever it does it.

Rules: a name tells when the run began, in UTC, and is otherwise random; log lines, metrics and Ray's
series bear it, in the workers too. Inner runs are part of the outer one. `SISA_RUN` gives the name, for
whoever starts a command elsewhere and must know it there. It reaches no bit of a model.

Not covered: what is told under it (`measured.py`, `cluster/observe/json_log.py`).

>>> with running(Running("20261125T213749Z-3f9a1c2b", "json")), running() as inner:
...     inner.run
'20261125T213749Z-3f9a1c2b'
>>> under_way() is None
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
NAME = "SISA_RUN"


@dataclass(frozen=True, slots=True)
class Running:
    """A run's name, and how its log lines are written."""

    run: str
    log_format: LogFormat = "text"


_under_way: ContextVar[Running | None] = ContextVar("sisa_running", default=None)


def under_way() -> Running | None:
    """The run that this is a part of."""
    return _under_way.get()


def new_run(log_format: LogFormat = "text") -> Running:
    """A run that begins now."""
    given = os.environ.get(NAME, "")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Running(given if is_run(given) else f"{now}-{os.urandom(4).hex()}", log_format)


@contextlib.contextmanager
def running(run: Running | None = None) -> Iterator[Running]:
    """Until the end of the block: this run, or the one under way, or else a new one."""
    found = run or under_way() or new_run()
    token = _under_way.set(found)
    try:
        yield found
    finally:
        _under_way.reset(token)
