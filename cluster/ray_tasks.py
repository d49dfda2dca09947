"""Tasks on Ray, side by side: handed out, heard, started again when their worker dies, cancelled.

    run_tasks(tasks: Sequence[T], carry_out: Callable[[T, Report], R], report: Report, *,
              session: Session, placement: Placement, label: Callable[[T], str],
              num_workers: int | None = None, max_retries: int = DEFAULT_RETRIES,
              mend: Callable[[T], T] = give_up) -> list[R]

Rules: a task can be carried out again anywhere at any time and goes on from what it had stored, for a
worker may die. Which task starts, and which starts again (announced as a Notice), `HandOut` decides;
`num_workers` run at once, or as many as the nodes have CPUs for. `carry_out` is a module's function; it
may raise `Unready`, and then `mend` says, in the driver, which task takes that
one's place. What must be set before torch is imported travels in the task's runtime environment.

Every exception of a worker comes back as a value, without its message unless it is of the error tree.
Events come through a mailbox, an actor that needs no CPU. It may die: a task's result lists all of its
SliceTrained again, and each is reported once. `report` is called in the driver's thread alone. When
`run_tasks` raises, for whatever reason, an interrupt too, Ray has confirmed that its tasks are
cancelled; their processes are gone some milliseconds later.

Not covered: the connection to Ray (`ray_session.py`); carrying tasks out in this process: a loop.

    session = connect(None, num_cpus=2)
    run_tasks([1, 2], square, report, session=session, placement=Placement(cpus=1), label=str)  # [1, 4]
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from cluster.json_log import worker_log
from cluster.ray_session import Session, alive_cpus
from sisa.errors import EnvironmentFault, SisaError
from sisa.events import Event, Notice, Report, SliceTrained
from sisa.handout import HandOut
from sisa.running import Running, under_way

T = TypeVar("T")
R = TypeVar("R")

DEFAULT_RETRIES = 3
POLL_S = 0.2
MAILBOX_S = 2.0
CANCEL_S = 30.0
LOST = (WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)


class Unready(Exception):
    """Raised by a task that this node lacks something for."""


@dataclass(frozen=True)
class Placement:
    """What each task takes of a node: CPUs, which are also its threads, GPUs, environment variables."""

    cpus: int
    gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outcome(Generic[R]):
    """What comes back of a task: its result, or why there is none; every stage that it stored."""

    result: R | None = None
    error: SisaError | None = None
    unready: bool = False
    trained: Sequence[SliceTrained] = ()


def give_up(task: T) -> T:
    """Raises EnvironmentFault: nobody can mend what is not ready."""
    raise EnvironmentFault(
        "a node lacks what a task needs",
        got=type(task).__name__,
        next_step="use nodes that share the driver's files",
    )


def run_tasks(
    tasks: Sequence[T],
    carry_out: Callable[[T, Report], R],
    report: Report,
    *,
    session: Session,
    placement: Placement,
    label: Callable[[T], str],
    num_workers: int | None = None,
    max_retries: int = DEFAULT_RETRIES,
    mend: Callable[[T], T] = give_up,
) -> list[R]:
    """Results in the order of tasks, which start in that order. `label` names a task for people.

    Raises what a task raised first; EnvironmentFault when Ray or a worker's machine fails.
    """
    cpus = alive_cpus()
    places = sum(count // placement.cpus for count in cpus)
    if places == 0:
        raise EnvironmentFault(
            "no node of the Ray cluster has enough CPUs for one worker",
            where=session.address or "the Ray of this process",
            expected=f"{placement.cpus} CPUs",
            got=f"at most {max(cpus, default=0)}",
            next_step="lower `threads_per_shard` or use larger nodes",
        )
    run = _Run(list(tasks), carry_out, report, session.mailbox, label, max_retries, mend)
    return run.drive(placement, places if num_workers is None else num_workers)


@dataclass
class _Run(Generic[T, R]):
    """One call of `run_tasks`: what waits, what runs, what has been reported; tasks by their number."""

    tasks: list[T]
    carry_out: Callable[[T, Report], R]
    report: Report
    mailbox: Any
    label: Callable[[T], str]
    max_retries: int
    mend: Callable[[T], T]

    def __post_init__(self) -> None:
        self._answer: Any = None  # the mailbox's, on its way
        self._run_id = os.urandom(8).hex()
        self._running_in = under_way()
        self._hand_out = HandOut(len(self.tasks), self.max_retries)
        self._attempts = count()
        self._running: dict[Any, int] = {}  # attempts
        self._number_of: dict[int, int] = {}  # tasks of the attempts that are under way
        self._reported: set[str] = set()
        self._results: dict[int, Any] = {}

    def drive(self, placement: Placement, num_workers: int) -> list[R]:
        self._function = _remote(self.carry_out, placement)
        try:
            while not self._hand_out.over:
                while (number := self._hand_out.next_task(num_workers)) is not None:
                    self._submit(number)
                done, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
                self._deliver()
                for reference in done:
                    self._settle(reference)
        except RayError as error:
            raise EnvironmentFault(
                "Ray failed",
                got=type(error).__name__,
                next_step="check that every node has this package at the driver's version, then run "
                "the command again; what is finished is kept",
            ) from error
        finally:
            self._cancel()
        return [self._results[number] for number in range(len(self.tasks))]

    def _submit(self, number: int) -> None:
        task, attempt = self.tasks[number], next(self._attempts)
        reference = self._function.remote(
            self.carry_out, task, self.label(task), self.mailbox, self._run_id, attempt, self._running_in
        )
        self._running[reference] = attempt
        self._number_of[attempt] = number

    def _deliver(self) -> None:
        # A dead mailbox is started again by Ray; what matters comes with the results. An answer that
        # is late is kept, for the events in it are no longer in the mailbox.
        if self._answer is None:
            self._answer = self.mailbox.take.remote(self._run_id)
        ready, _ = ray.wait([self._answer], timeout=MAILBOX_S)
        if not ready:
            return
        answer, self._answer = self._answer, None
        events: list[tuple[int, Event]] = []
        with contextlib.suppress(RayError):
            events = ray.get(answer)
        for attempt, event in events:
            self._report_once(event)
            # What was stored before is told again, after no time; what an attempt that is over has
            # told too late is not heard, so that it does not speak for the next one.
            if isinstance(event, SliceTrained) and event.seconds and attempt in self._number_of:
                self._hand_out.progressed(self._number_of[attempt])

    def _report_once(self, event: Event) -> None:
        if isinstance(event, SliceTrained):
            if event.job.key in self._reported:
                return
            self._reported.add(event.job.key)
        self.report(event)

    def _settle(self, reference: Any) -> None:
        number = self._number_of.pop(self._running.pop(reference))
        try:
            outcome: _Outcome[R] = ray.get(reference)
        except LOST as error:
            self._start_again(number, error)
            return
        for event in outcome.trained:
            self._report_once(event)
        if outcome.error is not None:
            raise outcome.error
        if outcome.unready:
            self.tasks[number] = self.mend(self.tasks[number])
            self._hand_out.again(number)
        else:
            self._hand_out.finished(number)
            self._results[number] = outcome.result

    def _start_again(self, number: int, error: RayError) -> None:
        again = self._hand_out.died(number)
        deaths, of = self._hand_out.deaths(number), self.label(self.tasks[number])
        if not again:
            raise EnvironmentFault(
                f"a worker died {deaths} times in a row",
                where=of,
                got=type(error).__name__,
                next_step="it may lack memory: run fewer at once (`num_workers`, or "
                "`--executor serial`); then run the command again, what is finished is kept",
            )
        attempt = f"attempt {deaths + 1} of {self.max_retries + 1}"
        self.report(Notice(f"the worker of {of} died; what it was at starts again ({attempt})"))

    def _cancel(self) -> None:
        if not self._running or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):
            for reference in self._running:
                ray.cancel(reference, force=True)
            ray.wait(list(self._running), num_returns=len(self._running), timeout=CANCEL_S)


def _remote(carry_out: Callable[[T, Report], R], placement: Placement) -> Any:
    from sisa.model.numerics import worker_environment

    environment = {**worker_environment(placement.cpus), **placement.environment}
    return ray.remote(max_retries=0, retry_exceptions=False)(_carry_out_remotely).options(
        name=getattr(carry_out, "__name__", "task"),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
        runtime_env={"env_vars": environment},
    )


def _carry_out_remotely(
    carry_out: Callable[[T, Report], R],
    task: T,
    label: str,
    mailbox: Any,
    run_id: str,
    attempt: int,
    running_in: Running | None,
) -> _Outcome[R]:
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
    return _Outcome(result, failed, unready, trained)


def _describe_fault(error: Exception, of: str) -> SisaError:
    """An exception from outside the error tree, without its message, for that may quote a record."""
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
