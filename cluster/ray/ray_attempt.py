"""Carry out any task in a Ray worker: events go to the driver, and no exception is raised there.

Every exception comes back as a value, without its message unless it is of the error tree, for it
may quote a record. The first word says which process it is, so that it can be killed when it is silent.
Events go to the mailbox with the attempt's number; the result lists all stages again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import ray
from ray.exceptions import RayError

from cluster.observe.json_log import worker_log
from sisa.core.errors import EnvironmentFault, SisaError
from sisa.core.events import Event, Report, SliceTrained
from sisa.flows.wiring.run_context import RunContext

_T = TypeVar("_T")
_R = TypeVar("_R")

MAILBOX_S = 2.0


class Unready(Exception):
    """Raised by a task that this node lacks something for."""


@dataclass(frozen=True)
class Begun:
    """A worker's first word: which process it is on its node."""

    pid: int
    created: float


@dataclass(frozen=True)
class Outcome(Generic[_R]):
    """What comes back of a task: its result, or why there is none; every stage that it stored."""

    result: _R | None = None
    error: SisaError | None = None
    unready: bool = False
    trained: Sequence[SliceTrained] = ()


def end_worker(worker: Begun) -> None:
    """Kill a process of this node, a stopped one, too, unless its number is another's by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(worker.pid)
        if process.create_time() == worker.created:
            process.kill()


def carry_out_remotely(
    carry_out: Callable[[_T, Report], _R],
    task: _T,
    label: str,
    mailbox: Any,
    run_id: str,
    attempt: int,
    running_in: RunContext | None,
) -> Outcome[_R]:
    """Carry a task out in a worker; every exception comes back as a value, without record text."""
    log = worker_log(running_in, sys.stderr, ray.get_runtime_context().get_node_id())
    trained: list[SliceTrained] = []
    posted: list[Any] = []

    def report(event: Event) -> None:
        if isinstance(event, SliceTrained):
            trained.append(event)
        if log is not None:
            log(event)
        posted[:] = [mailbox.put.remote(run_id, (attempt, event))]

    mailbox.put.remote(run_id, (attempt, Begun(os.getpid(), psutil.Process().create_time())))
    result, failed, unready = None, None, False
    try:
        result = carry_out(task, report)
    except Unready:
        unready = True
    except SisaError as error:
        failed = error
    except Exception as error:
        failed = _describe_fault(error, label)
    with contextlib.suppress(RayError):  # the mailbox may be gone; the result tells what matters
        ray.get(posted, timeout=MAILBOX_S)
    return Outcome(result, failed, unready, trained)


def _describe_fault(error: Exception, of: str) -> SisaError:
    """Return an exception from outside the error tree, without its message, for that may quote a
    record."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
    where = f"{of}, {' > '.join(places)}"
    if isinstance(error, OSError | MemoryError):
        return EnvironmentFault(
            "a worker's machine failed",
            where=where,
            got=(error.strerror if isinstance(error, OSError) else None) or type(error).__name__,
            next_step="mend it and run the command again; what is finished is kept",
        )
    return SisaError(
        f"a worker failed with {type(error).__name__}",
        where=where,
        next_step="report it with the place named above; the message is withheld, it may quote a record",
    )
