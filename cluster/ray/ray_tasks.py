"""Run tasks on Ray side by side; start them again when their worker dies; cancel them.

    run_tasks(tasks: Sequence[T], carry_out: Callable[[T, Report], R], report: Report, *,
              session: Session, placement: Placement, label: Callable[[T], str],
              num_workers: int | None = None, max_retries: int = DEFAULT_RETRIES,
              mend: Callable[[T], T] = give_up, terms: Terms | None = None,
              stall_limit_s: float | None = None) -> list[R]

A task can be carried out again anywhere at any time and goes on from what it had stored, for a
worker may die. Which task starts, and which starts again (announced as a Notice), `TaskQueue` decides;
`num_workers` run at once, or as many as the nodes have CPUs for. `Nodes` says by `terms` on which nodes;
a task is pinned to one, and starts again on another if it can. `carry_out` is a module's function; it
may raise `Unready`, and then `mend` says, in the driver, which task takes that
one's place. What must be set before torch is imported travels in the task's runtime environment.
A worker that has begun and sends nothing for `stall_limit_s` seconds is killed, which is a death. One
that has not begun for as long (and START_S) is not waited for any more: its task is handed out again.

Events come through a mailbox, an actor that needs no CPU. It may die: a task's result lists all of its
SliceTrained again, and each is reported once. `report` is called in the driver's thread alone. When
`run_tasks` raises, for whatever reason, an interrupt too, Ray has confirmed that its tasks are
cancelled; their processes are gone some milliseconds later.

    session = connect(None, num_cpus=2)
    run_tasks([1, 2], square, report, session=session, placement=Placement(cpus=1), label=str)  # [1, 4]
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

from cluster.ray.nodes import Nodes
from cluster.ray.proofs import LOST, Remote, Terms
from cluster.ray.ray_attempt import MAILBOX_S, Begun, Outcome, carry_out_remotely, end_worker
from cluster.ray.ray_session import Listener, Session
from cluster.ray.worker_slots import Placement
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Event, Notice, Report, SliceTrained
from sisa.flows.wiring.run_context import current_run
from sisa.planning.task_queue import TaskQueue

_T = TypeVar("_T")
_R = TypeVar("_R")

DEFAULT_RETRIES = 3
POLL_S = 0.2
CANCEL_S = 30.0
START_S = 120.0  # a worker's start, with its imports, on a busy machine


@dataclass
class _Attempt:
    """A task under way: which, on what node, when it was last handed out or sent something."""

    number: int
    node: str
    received: float
    worker: Begun | None = None
    killed: bool = False


def give_up(task: _T) -> _T:
    """Raises EnvironmentFault: nobody can mend what is not ready."""
    raise EnvironmentFault(
        "a node lacks what a task needs",
        got=type(task).__name__,
        next_step="use nodes that share the driver's files",
    )


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
    mend: Callable[[_T], _T] = give_up,
    terms: Terms | None = None,
    stall_limit_s: float | None = None,
) -> list[_R]:
    """Results in the order of tasks, which start in that order. `label` names a task for people.

    Raises what a task raised first; EnvironmentFault when no node may take tasks, or when Ray or a
    worker's machine fails.
    """
    remote = _remote(placement)
    nodes = Nodes(session, report, placement, remote, terms)
    nodes.open()
    options = _Options(carry_out, label, mend, max_retries, stall_limit_s, num_workers)
    return _Run(list(tasks), report, session.mailbox, nodes, remote, options).drive()


@dataclass(frozen=True)
class _Options(Generic[_T, _R]):
    """What a caller of `run_tasks` wants."""

    carry_out: Callable[[_T, Report], _R]
    label: Callable[[_T], str]
    mend: Callable[[_T], _T]
    max_retries: int
    stall_limit_s: float | None
    num_workers: int | None


@dataclass
class _Run(Generic[_T, _R]):
    """One call of `run_tasks`: what waits, what runs, what has been reported; tasks by their number."""

    tasks: list[_T]
    report: Report
    mailbox: Any
    nodes: Nodes
    remote: Remote
    options: _Options[_T, _R]

    def __post_init__(self) -> None:
        self._run_id = os.urandom(8).hex()
        self._listener = Listener(self.mailbox, self._run_id)
        self._running_in = current_run()
        self._hand_out = TaskQueue(len(self.tasks), self.options.max_retries)
        self._count = count()
        self._running: dict[Any, int] = {}  # attempts
        self._attempts: dict[int, _Attempt] = {}  # those under way
        self._failed_on: dict[int, str] = {}  # the node where a task failed last
        self._reported: set[str] = set()
        self._results: dict[int, Any] = {}

    def drive(self) -> list[_R]:
        try:
            while not self._hand_out.over:
                self.nodes.look()
                self._hand_out_tasks()
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
                "the command again; what is finished is kept",
            ) from error
        finally:
            self._cancel()
        return [self._results[number] for number in range(len(self.tasks))]

    def _wait(self) -> list[Any]:
        if not self._running:
            time.sleep(POLL_S)  # for a node to come
            return []
        done: list[Any] = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)[0]
        return done

    def _hand_out_tasks(self) -> None:
        places, most = self.nodes.places, self.options.num_workers
        workers = places.total if most is None else min(most, places.total)
        while (number := self._hand_out.next_task(workers)) is not None:
            node = places.take(avoid=self._failed_on.get(number))
            if node is None:
                self._hand_out.again(number)
                return
            self._submit(number, node)

    def _submit(self, number: int, node: str) -> None:
        task, attempt, carry_out = self.tasks[number], next(self._count), self.options.carry_out
        there = self.remote(carry_out_remotely, node, name=getattr(carry_out, "__name__", "task"))
        reference = there.remote(
            carry_out,
            task,
            self.options.label(task),
            self.mailbox,
            self._run_id,
            attempt,
            self._running_in,
        )
        self._running[reference] = attempt
        self._attempts[attempt] = _Attempt(number, node, time.monotonic())

    def _deliver(self) -> None:
        # What is lost with a mailbox that died comes with the results.
        events: list[tuple[int, Event | Begun]] = self._listener.received(MAILBOX_S)
        for attempt, event in events:
            # An event of an attempt that is over says nothing of the next one.
            under_way = self._attempts.get(attempt)
            if under_way is not None:
                under_way.received = time.monotonic()
            if isinstance(event, Begun):
                if under_way is not None:
                    under_way.worker = event
                continue
            self._report_once(event)
            # What was stored before is reported again, after no time.
            if isinstance(event, SliceTrained) and event.seconds and under_way is not None:
                self._hand_out.progressed(under_way.number)

    def _report_once(self, event: Event) -> None:
        if isinstance(event, SliceTrained):
            if event.job.key in self._reported:
                return
            self._reported.add(event.job.key)
        self.report(event)

    def _settle(self, reference: Any) -> None:
        attempt = self._attempts.pop(self._running.pop(reference))
        number = attempt.number
        self.nodes.places.give_back(attempt.node)
        try:
            outcome: Outcome[_R] = ray.get(reference)
        except (*LOST, ObjectLostError) as error:
            self._failed_on[number] = attempt.node
            self.nodes.look(at_once=True)
            if isinstance(error, TaskUnschedulableError):  # the node was lost before it began
                self._hand_out.again(number)
            else:
                self._start_again(number, error)
            return
        for event in outcome.trained:
            self._report_once(event)
        if outcome.error is not None:
            raise outcome.error
        if outcome.unready:
            self.tasks[number] = self.options.mend(self.tasks[number])
            self._hand_out.again(number)
        else:
            self._hand_out.finished(number)
            self._results[number] = outcome.result

    def _start_again(self, number: int, error: RayError) -> None:
        again = self._hand_out.died(number)
        deaths, of = self._hand_out.deaths(number), self.options.label(self.tasks[number])
        if not again:
            raise EnvironmentFault(
                f"a worker died {deaths} times in a row",
                where=of,
                got=type(error).__name__,
                next_step="it may lack memory: run fewer at once (`num_workers`, or "
                "`--executor serial`); or it was silent for longer than `stall_limit_s`; then run the "
                "command again, what is finished is kept",
            )
        attempt = f"attempt {deaths + 1} of {self.options.max_retries + 1}"
        self.report(Notice(f"the worker of {of} died; what it was at starts again ({attempt})"))

    def _end_stalled(self) -> None:
        """Kill workers that say nothing any more; what they were at settles as a death."""
        limit = self.options.stall_limit_s
        if limit is None:
            return
        for reference, attempt in [(each, self._attempts[n]) for each, n in self._running.items()]:
            silent_s = time.monotonic() - attempt.received
            if attempt.killed or silent_s <= limit:
                continue
            of = self.options.label(self.tasks[attempt.number])
            worker = f"the worker of {of} on node {self.nodes.name_of(attempt.node)}"
            if attempt.worker is not None:
                self.remote(end_worker, attempt.node, num_cpus=0, num_gpus=0).remote(attempt.worker)
                attempt.killed = True
                self.report(Notice(f"{worker} was silent for {limit:g} s and is killed"))
            elif silent_s > START_S:
                self._withdraw(reference)
                self.report(Notice(f"{worker} did not begin for {silent_s:.0f} s; another is asked for"))

    def _withdraw(self, reference: Any) -> None:
        """Hand a task out again that has not begun, on another node if it can."""
        attempt = self._attempts.pop(self._running.pop(reference))
        ray.cancel(reference, force=True)
        self.nodes.places.give_back(attempt.node)
        self._failed_on[attempt.number] = attempt.node
        self._hand_out.again(attempt.number)

    def _leave_lost_nodes(self) -> None:
        """Start elsewhere what is still under way on a node that is lost, whenever Ray gives it
        up."""
        for reference, number in list(self._running.items()):
            attempt = self._attempts[number]
            if attempt.node in self.nodes.places or ray.wait([reference], timeout=0)[0]:
                continue
            del self._running[reference], self._attempts[number]
            self._start_again(attempt.number, NodeDiedError("the node is lost"))

    def _cancel(self) -> None:
        if not self._running or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):
            for reference in self._running:
                ray.cancel(reference, force=True)
            ray.wait(list(self._running), num_returns=len(self._running), timeout=CANCEL_S)


def _remote(placement: Placement) -> Remote:
    """Makes tasks of functions, pinned to a node, with what workers need before torch is imported."""
    from sisa.lm.base.numerics import worker_environment

    environment = {**worker_environment(placement.cpus), **placement.environment}
    made = functools.cache(ray.remote(max_retries=0, retry_exceptions=False))
    every = {
        "num_cpus": placement.cpus,
        "num_gpus": placement.gpus,
        "runtime_env": {"env_vars": environment},
    }

    def remote(function: Callable[..., Any], node: str, **options: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return made(function).options(**{**every, **options}, scheduling_strategy=here)

    return remote
