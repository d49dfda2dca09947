"""Run tasks side by side on Ray; restart a task when its worker dies; cancel tasks on an error.

Workers may die, so it must be safe to carry out a task again anywhere at any time; a task continues from
what it stored. `TaskQueue` decides which task starts and which restarts (a Notice announces it), `Nodes`
which nodes may take tasks. A task is pinned to one node and restarts on another if it can. A worker that
has begun and then sends nothing is killed, which counts as a death; a task whose worker does not begin
is given to another.

Events arrive through a mailbox, an actor that needs no CPU. The mailbox may die, so the result of a task
lists all of its SliceTrained events again; each is reported once. `report` is called in the driver's
thread alone. When `run_tasks` raises, even because of an interrupt, Ray has confirmed that its tasks are
cancelled; their processes end some milliseconds later.

    session = connect(None, num_cpus=2)
    run_tasks([1, 2], square, report, session=session, placement=Placement(1), label=str)  # [1, 4]
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray.attempt import MAILBOX_S, Begun, Outcome, Unready, carry_out_remotely, end_worker
from cluster.ray.nodes import Nodes
from cluster.ray.proofs import LOST, NodeTerms, Remote
from cluster.ray.scheduling import Placement, TaskQueue
from cluster.ray.session import Listener, Session
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Event, Notice, Report, SliceTrained
from sisa.core.run import current_run

_T = TypeVar("_T")
_R = TypeVar("_R")

DEFAULT_RETRIES = 3
POLL_S = 0.2
CANCEL_S = 30.0
START_S = 120.0  # a worker's start, with its imports, on a busy machine


def run_tasks(
    tasks: Sequence[_T],
    carry_out: Callable[[_T, Report], _R],
    report: Report,
    *,
    session: Session,
    placement: Placement,
    label: Callable[[_T], str],
    num_workers: int | None = None,
    max_retries: int = DEFAULT_RETRIES,
    make_ready: Callable[[_T], _T] | None = None,
    terms: NodeTerms | None = None,
    stall_limit_s: float | None = None,
) -> list[_R]:
    """Run all tasks, started in their order, and return their results in the same order.

    `carry_out` is a function of a module. If it raises `Unready`, `make_ready` replaces the task.
    `label` returns a task's name for people. `num_workers` tasks run at once, or as many as the nodes
    have room for; nodes must meet `terms`. A worker is killed when it sends nothing for `stall_limit_s`
    seconds. Raise the first error of a task. Raise EnvironmentFault if no node may take tasks, or if Ray
    or a worker's machine fails.
    """
    remote = _remote(placement)
    nodes = Nodes(session, report, placement, remote, terms)
    nodes.open()
    return _Run(
        tasks=list(tasks),
        carry_out=carry_out,
        report=report,
        mailbox=session.mailbox,
        nodes=nodes,
        remote=remote,
        label=label,
        num_workers=len(tasks) if num_workers is None else num_workers,
        max_retries=max_retries,
        make_ready=make_ready,
        stall_limit_s=stall_limit_s,
    ).drive()


@dataclass
class _Attempt:
    """Describe an attempt at a task, on one node."""

    number: int
    task: int
    node: str
    last_event_s: float  # when it sent an event, or else started
    worker: Begun | None = None  # None: it has not begun
    killed: bool = False


@dataclass
class _Run(Generic[_T, _R]):
    """Drive one call of `run_tasks`; tasks are known by their number."""

    tasks: list[_T]
    carry_out: Callable[[_T, Report], _R]
    report: Report
    mailbox: Any
    nodes: Nodes
    remote: Remote
    label: Callable[[_T], str]
    num_workers: int
    max_retries: int
    make_ready: Callable[[_T], _T] | None
    stall_limit_s: float | None

    def __post_init__(self) -> None:
        self._run_id = os.urandom(8).hex()
        self._listener = Listener(self.mailbox, self._run_id)
        self._context = current_run()
        self._queue = TaskQueue(len(self.tasks), self.max_retries)
        self._attempt_numbers = count()
        self._attempts: dict[Any, _Attempt] = {}  # those that run, by Ray's reference
        self._failed_on: dict[int, str] = {}  # the node where a task failed last
        self._reported: set[str] = set()  # keys of stages
        self._results: dict[int, Any] = {}

    def drive(self) -> list[_R]:
        try:
            while not self._queue.over:
                self.nodes.look()
                self._start_tasks()
                done = self._wait()
                self._deliver()
                for reference in done:
                    self._settle(reference)
                self._end_stalled()
                self._leave_lost_nodes()
        except RayError as error:
            raise EnvironmentFault(
                "Ray failed",
                got=type(error).__name__,
                next_step="check that every node has this package at the driver's version, then run "
                "the command again; finished work is kept",
            ) from error
        finally:
            self._cancel()
        return [self._results[number] for number in range(len(self.tasks))]

    def _wait(self) -> list[Any]:
        if not self._attempts:
            time.sleep(POLL_S)  # until a node joins
            return []
        done: list[Any] = ray.wait(list(self._attempts), num_returns=1, timeout=POLL_S)[0]
        return done

    def _start_tasks(self) -> None:
        slots = self.nodes.slots
        workers = min(self.num_workers, slots.total)
        while (task := self._queue.next_task(workers)) is not None:
            node = slots.take(avoid=self._failed_on.get(task))
            if node is None:
                self._queue.again(task)
                return
            self._submit(_Attempt(next(self._attempt_numbers), task, node, time.monotonic()))

    def _submit(self, attempt: _Attempt) -> None:
        task, carry_out = self.tasks[attempt.task], self.carry_out
        name = getattr(carry_out, "__name__", "task")
        there = self.remote(carry_out_remotely, attempt.node, name=name)
        sent_to = (self.mailbox, self._run_id, attempt.number, self._context)
        self._attempts[there.remote(carry_out, task, self.label(task), *sent_to)] = attempt

    def _deliver(self) -> None:
        # Outcomes repeat the events that are lost when the mailbox dies.
        events: list[tuple[int, Event | Begun]] = self._listener.received(MAILBOX_S)
        attempts = {each.number: each for each in self._attempts.values()}
        for number, event in events:
            attempt = attempts.get(number)  # None: an earlier attempt sent this
            if attempt is not None:
                attempt.last_event_s = time.monotonic()
            if isinstance(event, Begun):
                if attempt is not None:
                    attempt.worker = event
                continue
            self._report_once(event)
            # A stage that was stored before is reported with zero seconds; it is no progress.
            if isinstance(event, SliceTrained) and event.seconds and attempt is not None:
                self._queue.progressed(attempt.task)

    def _report_once(self, event: Event) -> None:
        if isinstance(event, SliceTrained):
            if event.job.key in self._reported:
                return
            self._reported.add(event.job.key)
        self.report(event)

    def _settle(self, reference: Any) -> None:
        attempt = self._attempts.pop(reference)
        task = attempt.task
        self.nodes.slots.give_back(attempt.node)
        try:
            outcome: Outcome[_R] = ray.get(reference)
        except (*LOST, ObjectLostError) as error:
            self._failed_on[task] = attempt.node
            self.nodes.look(at_once=True)
            if isinstance(error, TaskUnschedulableError):  # the node was lost before the task began
                self._queue.again(task)
            else:
                self._restart(task, error)
            return
        for event in outcome.trained:
            self._report_once(event)
        if isinstance(outcome.error, Unready) and self.make_ready is not None:
            self.tasks[task] = self.make_ready(self.tasks[task])
            self._queue.again(task)
        elif outcome.error is not None:
            raise outcome.error
        else:
            self._queue.finished(task)
            self._results[task] = outcome.result

    def _restart(self, task: int, error: RayError) -> None:
        """Restart a task whose worker died. Raise EnvironmentFault if that happened too often."""
        again = self._queue.died(task)
        deaths, of = self._queue.deaths(task), self.label(self.tasks[task])
        if not again:
            raise EnvironmentFault(
                f"a worker died {deaths} times in a row",
                where=of,
                got=type(error).__name__,
                next_step="it may lack memory: run fewer workers (`num_workers`, or `--executor "
                "serial`); or it was silent for longer than `stall_limit_s`: raise that; then run the "
                "command again; finished work is kept",
            )
        attempt = f"attempt {deaths + 1} of {self.max_retries + 1}"
        self.report(Notice(f"the worker of {of} died; its task starts again ({attempt})"))

    def _end_stalled(self) -> None:
        """Kill workers that have fallen silent; give tasks that have not begun to other workers."""
        limit = self.stall_limit_s
        if limit is None:
            return
        for reference, attempt in list(self._attempts.items()):
            silent_s = time.monotonic() - attempt.last_event_s
            if attempt.killed or silent_s <= limit:
                continue
            of = self.label(self.tasks[attempt.task])
            worker = f"the worker of {of} on node {self.nodes.name_of(attempt.node)}"
            if attempt.worker is not None:  # this counts as a death of its task
                self.remote(end_worker, attempt.node, num_cpus=0, num_gpus=0).remote(attempt.worker)
                attempt.killed = True
                self.report(Notice(f"{worker} was silent for {limit:g} s and is killed"))
            elif silent_s > START_S:
                del self._attempts[reference]
                ray.cancel(reference, force=True)
                self.nodes.slots.give_back(attempt.node)
                self._failed_on[attempt.task] = attempt.node
                self._queue.again(attempt.task)
                self.report(Notice(f"{worker} did not begin for {silent_s:.0f} s; trying another"))

    def _leave_lost_nodes(self) -> None:
        """Restart the tasks of lost nodes elsewhere, without waiting for Ray to give them up."""
        for reference, attempt in list(self._attempts.items()):
            if attempt.node not in self.nodes.slots and not ray.wait([reference], timeout=0)[0]:
                del self._attempts[reference]
                self._restart(attempt.task, NodeDiedError("the node is lost"))

    def _cancel(self) -> None:
        if not self._attempts or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):
            for reference in self._attempts:
                ray.cancel(reference, force=True)
            ray.wait(list(self._attempts), num_returns=len(self._attempts), timeout=CANCEL_S)


def _remote(placement: Placement) -> Remote:
    """Return a function that makes tasks pinned to a node, with the environment that workers need."""
    from sisa.lm.base.numerics import worker_environment

    environment = {**worker_environment(placement.num_cpus), **placement.environment}
    made = functools.cache(ray.remote(max_retries=0, retry_exceptions=False))
    every = {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        "runtime_env": {"env_vars": environment},
    }

    def remote(function: Callable[..., Any], node: str, **options: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return made(function).options(**{**every, **options}, scheduling_strategy=here)

    return remote
