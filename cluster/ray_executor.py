"""An Executor on Ray: one task per shard's chain, longest first, any number of workers, same bytes.

Rules: a chain can be started again anywhere at any time, since workers skip stages already stored: a
worker killed mid-slice costs that slice. The driver restarts it (at most `max_retries` times a shard,
each announced as a Notice) and never has more than `num_workers` chains running. What must be set
before torch is imported travels in the task's runtime environment.

Progress comes through a mailbox, an actor that needs no CPU. It may die: a task's result lists all of
its SliceTrained again, and each is reported once. `report` is called in the driver's thread alone.
When `run` raises, for whatever reason, Ray has confirmed that its tasks are cancelled; their processes
are gone some milliseconds later.

Not covered: what a worker does (`ray_worker.py`); the connection to Ray (`ray_session.py`).

    with open_executor(site, {"num_workers": 2}) as executor:
        executor.run(chains, report)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from cluster.ray_session import Session, alive_cpus, connect, disconnect
from cluster.ray_worker import MAILBOX_S, Carried, OpenParts, Outcome, Task, open_parts, train_remotely
from cluster.shared_base import list_base, read_blocks
from sisa.domain import Chain
from sisa.errors import EnvironmentFault, InvalidInput, Problem
from sisa.ports import Event, Notice, Report, SliceTrained
from sisa.serial import Site, order_chains

DEFAULT_RETRIES = 3
POLL_S = 0.2
CANCEL_S = 30.0
LOST = (WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)


class RayExecutor:
    """Trains chains side by side in Ray workers."""

    def __init__(
        self,
        site: Site,
        address: str | None = None,
        num_workers: int | None = None,
        max_retries: int = DEFAULT_RETRIES,
        open_parts: OpenParts = open_parts,
    ) -> None:
        # Workers run in another directory.
        self._site = replace(
            site,
            records_dir=site.records_dir.absolute(),
            checkpoints_dir=site.checkpoints_dir.absolute(),
            base_dir=site.base_dir.absolute(),
            patches_dir=site.patches_dir.absolute(),
        )
        self._address = address
        self._num_workers = num_workers
        self._max_retries = max_retries
        self._open_parts = open_parts

    def run(self, chains: Sequence[Chain], report: Report) -> None:
        """Raises what a worker raised; EnvironmentFault when Ray or a worker's machine fails."""
        if not chains:
            return
        session = connect(self._address, self._local_workers() * self._site.threads)
        cpus = alive_cpus()
        places = sum(count // self._site.threads for count in cpus)
        if places == 0:
            raise EnvironmentFault(
                "no node of the Ray cluster has enough CPUs for one worker",
                where=self._address or "the Ray of this process",
                expected=f"{self._site.threads} CPUs",
                got=f"at most {max(cpus, default=0)}",
                next_step="lower `threads_per_shard` or use larger nodes",
            )
        num_workers = places if self._num_workers is None else self._num_workers
        _Run(self, session, num_workers, len(cpus) > 1, report).drive(order_chains(chains))

    def close(self) -> None:
        """End the Ray that executors of this process share, if they started it."""
        disconnect()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _local_workers(self) -> int:
        if self._num_workers is not None:
            return self._num_workers
        return max(1, len(os.sched_getaffinity(0)) // self._site.threads)


class _Run:
    """One call of `run`: what waits, what runs, what has been reported."""

    def __init__(
        self, executor: RayExecutor, session: Session, num_workers: int, many_nodes: bool, report: Report
    ) -> None:
        self._site = executor._site
        self._open_parts = executor._open_parts
        self._max_retries = executor._max_retries
        self._mailbox = session.mailbox
        self._num_workers = num_workers
        self._report = report
        self._manifest = (
            _manifest_of(self._site.base_dir, self._site.base_digest) if many_nodes else None
        )
        self._carried: Carried = {}
        self._answer: Any = None  # the mailbox's, on its way
        self._origin = ray.get_runtime_context().get_node_id()
        self._run_id = os.urandom(8).hex()
        self._waiting: deque[Chain] = deque()
        self._running: dict[Any, Chain] = {}
        self._deaths: Counter[int] = Counter()
        self._reported: set[str] = set()
        self._function = ray.remote(max_retries=0, retry_exceptions=False)(train_remotely).options(
            num_cpus=self._site.threads, runtime_env={"env_vars": _environment(self._site)}
        )

    def drive(self, chains: Sequence[Chain]) -> None:
        self._waiting.extend(chains)
        try:
            while self._waiting or self._running:
                self._submit()
                done, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
                self._deliver()
                for reference in done:
                    self._settle(reference)
        except RayError as error:
            raise EnvironmentFault(
                "Ray failed",
                got=type(error).__name__,
                next_step="check that every node has this package at the driver's version, then run "
                "the command again; finished slices are kept",
            ) from error
        finally:
            self._cancel()

    def _submit(self) -> None:
        while self._waiting and len(self._running) < self._num_workers:
            chain = self._waiting.popleft()
            task = Task(chain, self._site, self._open_parts, self._manifest, self._origin, self._run_id)
            reference = self._function.remote(task, self._mailbox, self._carried)
            self._running[reference] = chain

    def _deliver(self) -> None:
        # A dead mailbox is started again by Ray; what it held comes with the results. An answer that
        # is late is kept, for the events in it are no longer in the mailbox.
        if self._answer is None:
            self._answer = self._mailbox.take.remote(self._run_id)
        ready, _ = ray.wait([self._answer], timeout=MAILBOX_S)
        if not ready:
            return
        answer, self._answer = self._answer, None
        events: list[Event] = []
        with contextlib.suppress(RayError):
            events = ray.get(answer)
        for event in events:
            self._report_once(event)

    def _report_once(self, event: Event) -> None:
        if isinstance(event, SliceTrained):
            if event.job.key in self._reported:
                return
            self._reported.add(event.job.key)
        self._report(event)

    def _settle(self, reference: Any) -> None:
        chain = self._running.pop(reference)
        try:
            outcome: Outcome = ray.get(reference)
        except LOST as error:
            self._start_again(chain, error)
            return
        for event in outcome.trained:
            self._report_once(event)
        if outcome.error is not None:
            raise outcome.error
        if outcome.lacks_base:
            self._carry()
            self._waiting.appendleft(chain)

    def _start_again(self, chain: Chain, error: RayError) -> None:
        self._deaths[chain.shard] += 1
        deaths = self._deaths[chain.shard]
        if deaths > self._max_retries:
            raise EnvironmentFault(
                f"the worker of a shard died {deaths} times",
                where=f"shard {chain.shard}",
                got=type(error).__name__,
                next_step="it may lack memory: lower `num_workers`; then run the command again, "
                "finished slices are kept",
            )
        self._waiting.appendleft(chain)
        attempt = f"attempt {deaths + 1} of {self._max_retries + 1}"
        self._report(
            Notice(f"the worker of shard {chain.shard} died; its slice starts again ({attempt})")
        )

    def _carry(self) -> None:
        if self._carried or self._manifest is None:
            return
        self._report(Notice("a node lacks the base model: carrying it there"))
        self._carried = {
            file.name: [ray.put(block) for block in read_blocks(self._site.base_dir / file.name)]
            for file in self._manifest.files
        }

    def _cancel(self) -> None:
        if not self._running or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):
            for reference in self._running:
                ray.cancel(reference, force=True)
            ray.wait(list(self._running), num_returns=len(self._running), timeout=CANCEL_S)


_manifest_of = functools.lru_cache(maxsize=1)(list_base)


def _environment(site: Site) -> dict[str, str]:
    from sisa.model.numerics import worker_environment

    return {**worker_environment(site.threads), **dict(site.environment)}


def open_executor(site: Site, options: Mapping[str, Any]) -> RayExecutor:
    """The executor of a run file's `cluster:` block. Raises InvalidInput."""
    num_workers = options.get("num_workers")
    max_retries = options.get("max_retries", DEFAULT_RETRIES)
    address = options.get("address")
    problems = [Problem(f"cluster.{key}", "unknown key") for key in sorted(options.keys() - OPTIONS)]
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 1):
        problems.append(Problem("cluster.num_workers", "not a number from 1"))
    if not isinstance(max_retries, int) or max_retries < 0:
        problems.append(Problem("cluster.max_retries", "not a number from 0"))
    if address is not None and str(address).startswith("ray://"):
        problems.append(Problem("cluster.address", "Ray Client is not supported; give HOST:PORT"))
    if problems:
        raise InvalidInput(
            "the cluster can't be used as it is described",
            problems=problems,
            next_step="mend the run file's `cluster:` block",
        )
    return RayExecutor(site, address, num_workers, max_retries)


OPTIONS = frozenset({"address", "num_workers", "max_retries"})
