"""Train on Ray, longest chains first; the bytes are the same for any number of workers.

A task is one shard's chain, or several that a worker trains side by side. It can be started again
anywhere at any time, since workers skip stages that are already stored: a worker killed in the middle of
a slice loses that slice alone, or those that it was training. See also `tasks.py`.

    open_executor(site, {"num_workers": 2}).run(chains, report)
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from cluster.ray.proofs import NodeTerms, Prove, prove
from cluster.ray.scheduling import Placement
from cluster.ray.session import alive_cpus, connect
from cluster.ray.shared_base import BaseManifest, list_base, read_blocks
from cluster.ray.tasks import DEFAULT_RETRIES, run_tasks
from cluster.ray.worker import Carried, NeedsBase, OpenParts, Task, open_parts, train_remotely
from sisa.core.checkpoint_files import CHECKPOINT_FILES
from sisa.core.domain import BaseFiles, Chain, SliceJob
from sisa.core.errors import InvalidInput
from sisa.core.events import Event, Notice, Report, SliceTrained, silent
from sisa.core.ports import BlobStore, Keyring, OnStage
from sisa.flows.chains import LanesSetting, Site, num_lanes, order_chains
from sisa.lm.base.cuda_device import require_device
from sisa.lm.base.numerics import worker_environment
from sisa.planning.hidden_state_files import keeps_hidden_states, states_name
from sisa.store.areas import HIDDEN_STATES
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.keyring import FileKeyring
from sisa.store.blobs.lease import Lease

_T = TypeVar("_T", bound=NeedsBase)


@dataclass(frozen=True)
class RayExecutor:
    """Train chains side by side in Ray workers."""

    site: Site
    address: str | None = None
    num_workers: int | None = None
    max_retries: int = DEFAULT_RETRIES
    open_parts: OpenParts = open_parts
    stall_limit_s: float | None = None
    prove: Prove = prove
    num_gpus: float | None = None  # of one worker; None: 1 with device cuda
    lanes: LanesSetting = 1  # chains that a worker trains side by side

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        """Train all chains.

        Raise the first error of a worker. Raise EnvironmentFault if Ray or a worker's machine fails, or
        if this machine lacks the device: jobs are named by this machine's fingerprint.
        """
        if not chains:
            return
        here = self.site.absolute()  # workers run in another directory
        require_device(here.precision)
        num_workers = self.num_workers or max(1, len(os.sched_getaffinity(0)) // here.threads)
        session = connect(self.address, num_workers * here.threads)
        gpus = (self.num_gpus or 1) if here.precision.device == "cuda" else 0
        environment = {**worker_environment(here.threads, here.precision), **dict(here.environment)}
        manifest = manifest_of(here.base, self.address)
        fingerprints = frozenset(job.fingerprint for chain in chains for job in chain.jobs)
        origin = ray.get_runtime_context().get_node_id()
        terms = NodeTerms(
            here.threads, fingerprints, here.base.directory, manifest, self.prove, here.precision
        )
        with lent(here, chains) as (site, accept):

            def accepting(event: Event) -> None:
                if isinstance(event, SliceTrained):
                    accept(event.job)
                    on_stage(event)
                report(event)

            lanes = num_lanes(self.lanes, chains)
            at_once = self.num_workers or sum(each // here.threads for each in alive_cpus()) or 1
            tasks = [
                Task(each, site, self.open_parts, lanes, manifest=manifest, origin=origin)
                for each in dealt(order_chains(chains), at_once, lanes)
            ]
            run_tasks(
                tasks,
                train_remotely,
                accepting,
                session=session,
                placement=Placement(site.threads, gpus, environment),
                label=lambda task: _label([chain.shard for chain in task.chains]),
                num_workers=self.num_workers,
                max_retries=self.max_retries,
                make_ready=carrier(site.base.directory, report),
                terms=terms,
                stall_limit_s=self.stall_limit_s,
            )


def dealt(chains: Sequence[Chain], num_workers: int, lanes: int) -> list[tuple[Chain, ...]]:
    """Deal chains to tasks, in their order: one a task, or up to twice the lanes, so that lanes refill.

    Tasks are small enough that every worker gets one.
    """
    size = min(2 * lanes, math.ceil(len(chains) / num_workers)) if lanes > 1 else 1
    return [tuple(chains[start : start + size]) for start in range(0, len(chains), size)]


def _label(shards: Sequence[int]) -> str:
    return f"{'shard' if len(shards) == 1 else 'shards'} {', '.join(map(str, shards))}"


@contextlib.contextmanager
def lent(site: Site, chains: Sequence[Chain]) -> Iterator[tuple[Site, Callable[[SliceJob], None]]]:
    """Yield a site for workers and a function that accepts a finished stage.

    Workers write into areas that are erased when the block ends, and can't make keys.
    """
    jobs = [job for chain in chains for job in chain.jobs]
    stages = sorted(job.key for job in jobs)
    state_names = sorted({name for job in jobs for name in _states_names(site, job)})
    files = [f"{key}/{name}" for key in stages for name in CHECKPOINT_FILES]
    with (
        lent_keys(site.keyring, site.area, stages, site.checkpoints_at) as keyring,
        lent_keys(keyring, HIDDEN_STATES, state_names, site.hidden_states_at) as keyring,
        leased(site.checkpoints_at, files) as (checkpoints, accept_stage),
        leased(site.hidden_states_at, state_names) as (states, accept_states),
    ):

        def accept(job: SliceJob) -> None:
            accept_stage(job.key)
            for name in _states_names(site, job):
                accept_states(name)

        there = replace(site, keyring=keyring, checkpoints_at=checkpoints, hidden_states_at=states)
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


def _states_names(site: Site, job: SliceJob) -> list[str]:
    """Return the names of the hidden states that a stage may keep."""
    if not site.state_bytes or not keeps_hidden_states(job.training):
        return []
    named = (job.training, job.base, job.fingerprint)
    return [states_name(job.shard, slice_, root, *named) for slice_, root in job.slices]


def carrier(base_dir: Path, report: Report) -> Callable[[_T], _T]:
    """Return a function that gives a task the base for a node that lacks it.

    It puts the base into the object store once.
    """

    @functools.cache
    def carried(manifest: BaseManifest | None) -> Carried:
        report(Notice("a node lacks the base model: carrying it there"))
        names = [file.name for file in manifest.files] if manifest else ()
        return {name: [ray.put(block) for block in read_blocks(base_dir / name)] for name in names}

    return lambda task: replace(task, carried=carried(task.manifest))


def manifest_of(base: BaseFiles, address: str | None) -> BaseManifest | None:
    """Return the list of a base's files, or None on a single node, which has the driver's files."""
    several = address is not None or len(alive_cpus()) > 1
    return list_base(base) if several else None


def open_executor(site: Site, options: Mapping[str, Any]) -> RayExecutor:
    """Open the executor of a run file's `cluster:` block. Raise InvalidInput for a Ray Client."""
    if str(options.get("address")).startswith("ray://"):
        raise InvalidInput(
            "Ray Client is not supported",
            where="cluster.address",
            expected="HOST:PORT",
            next_step="correct the run file's `cluster:` block",
        )
    return RayExecutor(site, **options)
