"""Train on Ray: one task per shard's chain, longest first, any number of workers, the same bytes.

A chain can be started again anywhere at any time, since workers skip stages that are already stored: a
worker killed in the middle of a slice loses that slice alone. See also `ray_tasks.py`.

    with open_executor(site, {"num_workers": 2}) as executor:
        executor.run(chains, report)
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray

from cluster.ray.proofs import Prove, Terms, prove
from cluster.ray.ray_session import Session, alive_cpus, connect, disconnect
from cluster.ray.ray_tasks import DEFAULT_RETRIES, run_tasks
from cluster.ray.ray_worker import Carried, NeedsBase, OpenParts, Task, open_parts, train_remotely
from cluster.ray.shared_base import BaseManifest, list_base, read_blocks
from cluster.ray.worker_slots import Placement
from sisa.core.domain import Chain, SliceJob
from sisa.core.errors import InvalidInput, Problem
from sisa.core.events import Event, Notice, Report, SliceTrained, silent
from sisa.core.ports import BlobStore, Keyring, OnStage
from sisa.flows.serial import Site, order_chains
from sisa.lm.base.numerics import require_device, worker_environment
from sisa.planning.plan import keeps_prefixes, prefix_name
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.keyring import FileKeyring
from sisa.store.blobs.lease import Lease
from sisa.store.checkpoints import FILES
from sisa.store.prefixes import PREFIXES_AREA as PREFIXES

_T = TypeVar("_T", bound=NeedsBase)


class RayExecutor:
    """Train chains side by side in Ray workers."""

    def __init__(
        self,
        site: Site,
        address: str | None = None,
        num_workers: int | None = None,
        max_retries: int = DEFAULT_RETRIES,
        open_parts: OpenParts = open_parts,
        stall_limit_s: float | None = None,
        prove: Prove = prove,
        num_gpus: float = 0,
    ) -> None:
        # Workers run in another directory, so paths must be absolute.
        self._site = site.absolute()
        self._address = address
        self._num_workers = num_workers
        self._max_retries = max_retries
        self._open_parts = open_parts
        self._stall_limit_s = stall_limit_s
        self._prove = prove
        self._num_gpus = num_gpus

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        """Train all chains.

        Raise the first error of a worker. Raise EnvironmentFault if Ray or a worker's machine fails, or
        if this machine lacks the device: jobs are named by this machine's fingerprint.
        """
        if not chains:
            return
        require_device(self._site.precision)
        session = connect(self._address, self._local_workers() * self._site.threads)
        with lent(self._site, chains) as (site, accept):

            def accepting(event: Event) -> None:
                if isinstance(event, SliceTrained):
                    accept(event.job)
                    on_stage(event)
                report(event)

            self._run_on(session, site, chains, accepting)

    def _run_on(self, session: Session, site: Site, chains: Sequence[Chain], report: Report) -> None:
        num_gpus = self._num_gpus
        environment = {**worker_environment(site.threads, site.precision), **dict(site.environment)}
        manifest = manifest_of(site.base_dir, site.base_digest, self._address)
        fingerprints = frozenset(job.fingerprint for chain in chains for job in chain.jobs)
        origin = ray.get_runtime_context().get_node_id()
        run_tasks(
            [Task(each, site, self._open_parts, manifest, origin) for each in order_chains(chains)],
            train_remotely,
            report,
            session=session,
            placement=Placement(site.threads, num_gpus, environment),
            label=_label,
            num_workers=self._num_workers,
            max_retries=self._max_retries,
            make_ready=Carrier(site.base_dir, report),
            terms=Terms(
                site.threads,
                fingerprints,
                site.base_dir,
                manifest,
                self._prove,
                site.precision,
                num_gpus,
            ),
            stall_limit_s=self._stall_limit_s,
        )

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


@contextlib.contextmanager
def lent(site: Site, chains: Sequence[Chain]) -> Iterator[tuple[Site, Callable[[SliceJob], None]]]:
    """Yield a site for workers and a function that accepts a finished stage.

    Workers write into areas that are erased when the block ends, and can't make keys.
    """
    jobs = [job for chain in chains for job in chain.jobs]
    stages = sorted(job.key for job in jobs)
    prefixes = sorted({name for job in jobs for name in _prefixes(site, job)})
    files = [f"{key}/{name}" for key in stages for name in FILES]
    with (
        lent_keys(site.keyring, site.area, stages, site.checkpoints_at) as keyring,
        lent_keys(keyring, PREFIXES, prefixes, site.prefixes_at) as keyring,
        leased(site.checkpoints_at, files) as (checkpoints, accept_stage),
        leased(site.prefixes_at, prefixes) as (states, accept_states),
    ):

        def accept(job: SliceJob) -> None:
            accept_stage(job.key)
            for name in _prefixes(site, job):
                accept_states(name)

        there = replace(site, keyring=keyring, checkpoints_at=checkpoints, prefixes_at=states)
        yield there, accept


@contextlib.contextmanager
def lent_keys(
    keyring: Keyring, room: str, names: Collection[str], place: BlobStore
) -> Iterator[Keyring]:
    """Yield a keyring that holds the keys of the named files alone, for workers.

    When the block ends, destroy the keys of files that were not written.
    """
    if not isinstance(keyring, FileKeyring) or not names:
        yield keyring
        return
    try:
        yield keyring.lend(room, names)
    finally:
        if keyring.seals:
            keyring.destroy(room, sorted({*names} - place.held()))


@contextlib.contextmanager
def leased(
    place: BlobStore, names: Collection[str]
) -> Iterator[tuple[BlobStore, Callable[[str], None]]]:
    """Yield a store for workers and a function that accepts one of the names they wrote.

    Without names, yield the store itself. The leased area is erased when the block ends; if the driver
    is killed, the next sweep of what the ledger does not list erases it.
    """
    if not names:
        yield place, lambda _: None
        return
    area = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        yield Lease(place, place.lend(area, names)), functools.partial(place.accept, area)
    finally:
        place.erase([area])


def _prefixes(site: Site, job: SliceJob) -> list[str]:
    """Return the names of the hidden states that a stage may keep."""
    if not site.prefix_bytes or not keeps_prefixes(job.training):
        return []
    named = (job.training, job.base, job.fingerprint)
    return [prefix_name(job.shard, slice_, root, *named) for slice_, root in job.slices]


class Carrier:
    """Give a task the base for a node that lacks it. Put the base into the object store once."""

    def __init__(self, base_dir: Path, report: Report) -> None:
        self._base_dir = base_dir
        self._report = report
        self._carried: Carried = {}

    def __call__(self, task: _T) -> _T:
        if not self._carried and task.manifest is not None:
            self._report(Notice("a node lacks the base model: carrying it there"))
            self._carried = {
                file.name: [ray.put(block) for block in read_blocks(self._base_dir / file.name)]
                for file in task.manifest.files
            }
        ready: Any = task
        return replace(ready, carried=self._carried)  # type: ignore[no-any-return]


def _label(task: Task) -> str:
    return f"shard {task.chain.shard}"


def manifest_of(base_dir: Path, base_digest: str, address: str | None) -> BaseManifest | None:
    """Return the list of a base's files, or None on a single node, which has the driver's files."""
    several = address is not None or len(alive_cpus()) > 1
    return _listed(base_dir, base_digest) if several else None


_listed = functools.lru_cache(maxsize=1)(list_base)


def open_executor(site: Site, options: Mapping[str, Any]) -> RayExecutor:
    """Open the executor of a run file's `cluster:` block. Raise InvalidInput with every problem."""
    num_workers = options.get("num_workers")
    max_retries = options.get("max_retries", DEFAULT_RETRIES)
    stall_limit_s = options.get("stall_limit_s")
    address = options.get("address")
    num_gpus = options.get("num_gpus")
    on_gpu = site.precision.device == "cuda"
    problems = [Problem(f"cluster.{key}", "unknown key") for key in sorted(options.keys() - OPTIONS)]
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 1):
        problems.append(Problem("cluster.num_workers", "not a number from 1"))
    if not isinstance(max_retries, int) or max_retries < 0:
        problems.append(Problem("cluster.max_retries", "not a number from 0"))
    if stall_limit_s is not None and (not isinstance(stall_limit_s, int | float) or stall_limit_s <= 0):
        problems.append(Problem("cluster.stall_limit_s", "not a number above 0"))
    if address is not None and str(address).startswith("ray://"):
        problems.append(Problem("cluster.address", "Ray Client is not supported; give HOST:PORT"))
    if num_gpus is not None and not on_gpu:
        problems.append(Problem("cluster.num_gpus", "is given, but device is cpu"))
    elif num_gpus is not None and not (0 < num_gpus < 1 or (num_gpus >= 1 and num_gpus % 1 == 0)):
        problems.append(Problem("cluster.num_gpus", "neither a share of one GPU nor whole GPUs"))
    if problems:
        raise InvalidInput(
            "the `cluster:` block is invalid",
            problems=problems,
            next_step="correct the run file's `cluster:` block",
        )
    gpus = (1 if num_gpus is None else num_gpus) if on_gpu else 0
    return RayExecutor(
        site, address, num_workers, max_retries, stall_limit_s=stall_limit_s, num_gpus=gpus
    )


OPTIONS = frozenset({"address", "num_workers", "num_gpus", "max_retries", "stall_limit_s"})
