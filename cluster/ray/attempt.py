"""Carry out a task in a Ray worker: send events to the driver, and return exceptions as values.

An exception outside the error tree is returned without its message, which may quote a record. Events go
to the mailbox with the number of the attempt; the outcome lists all trained stages again.
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
from sisa.core.run import RunContext

_T = TypeVar("_T")
_R = TypeVar("_R")

MAILBOX_S = 2.0


class Unready(Exception):
    """Raised by a task whose node lacks something the task needs."""


@dataclass(frozen=True)
class Begun:
    """Name the process of a worker, so that it can be killed; the first message that it sends."""

    pid: int
    created: float


@dataclass(frozen=True)
class Outcome(Generic[_R]):
    """Hold a task's result, or the reason why it has none, and every stage that it stored."""

    result: _R | None
    error: SisaError | Unready | None
    trained: Sequence[SliceTrained]


def end_worker(worker: Begun) -> None:
    """Kill a worker's process on this node, even a stopped one, unless its number was reused."""
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
    """Carry out a task in a worker; return every exception as a value without record text."""
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
    result, failed = None, None
    try:
        result = carry_out(task, report)
    except (SisaError, Unready) as error:
        failed = error
    except Exception as error:
        failed = _describe_fault(error, label)
    with contextlib.suppress(RayError):  # the mailbox may be gone; the outcome repeats what matters
        ray.get(posted, timeout=MAILBOX_S)
    return Outcome(result, failed, trained)


def _describe_fault(error: Exception, of: str) -> SisaError:
    """Translate an exception from outside the error tree, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
    where = f"{of}, {' > '.join(places)}"
    if isinstance(error, OSError | MemoryError):
        return EnvironmentFault(
            "a worker's machine failed",
            where=where,
            got=(error.strerror if isinstance(error, OSError) else None) or type(error).__name__,
            next_step="fix it and run the command again; finished work is kept",
        )
    return SisaError(
        f"a worker failed with {type(error).__name__}",
        where=where,
        next_step="report it with the place named above; its message is withheld, since it may quote a "
        "record",
    )
