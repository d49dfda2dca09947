"""Train shards' chains in a Ray worker with `sisa.flows.chains.train_chains_in_lanes`.

A task carries paths and digests, never text or credentials, so no record content reaches Ray's object
store, spill or logs.

The memory of a live worker may hold text of records that it trained on until the Ray session ends.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from cluster.ray.attempt import Unready
from cluster.ray.shared_base import BaseManifest, find_base, write_base
from sisa.core.domain import BaseFiles, Chain
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Report
from sisa.core.ports import CheckpointStore, RecordStore, Trainer
from sisa.flows.chains import Site, train_chains_in_lanes
from sisa.lm.base.cuda_device import require_device
from sisa.lm.base.numerics import KERNEL_SETTINGS, fingerprint

Parts = tuple[Trainer, RecordStore, CheckpointStore]
OpenParts = Callable[[Site], Parts]
Carried = Mapping[str, Sequence[Any]]  # name of a base file -> references to its blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsBase:
    """Hold what a task needs to find the base on its node."""

    manifest: BaseManifest | None  # None on a single node, which has the base
    origin: str  # the driver's node
    carried: Carried = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task(NeedsBase):
    """Hold what travels to a worker."""

    chains: tuple[Chain, ...]
    site: Site
    open_parts: OpenParts
    lanes: int = 1  # chains to train side by side


def open_parts(site: Site) -> Parts:
    """Open the trainer and the stores of a site. The base stays loaded in the process."""
    from sisa.flows.wiring.executors import open_stores, open_trainer
    from sisa.lm.base.numerics import pin_threads
    from sisa.store.blobs.keyring import FileKeyring
    from sisa.store.blobs.local_blobs import LocalBlobs

    records = site.records_at
    if isinstance(records, LocalBlobs) and not records.root.is_dir():
        raise EnvironmentFault(
            "the model's records are not visible on a worker's node",
            where=str(records.root),
            next_step="put the model directory on a file system that all nodes share, or name a "
            "`storage:` that all of them reach",
        )
    keys = site.keyring
    if isinstance(keys, FileKeyring) and keys.seals and not keys.root.is_dir():
        raise EnvironmentFault(
            "the model's keyring is not visible on a worker's node",
            where=str(keys.root),
            next_step="put the keyring on a file system that all nodes share, and name it by `keyring:`",
        )
    pin_threads(site.threads, site.precision)
    return open_trainer(site), *open_stores(site)


def train_remotely(task: Task, report: Report) -> None:
    """Train a task's chains in this worker.

    Raise Unready on a node to which the base must be carried. Raise EnvironmentFault if this worker
    would train other bits.
    """
    _refuse_other_bits(task)
    site = replace(task.site, base=base_on_this_node(task, task.site.base))
    parts = task.open_parts(site)
    for stage in train_chains_in_lanes(task.chains, *parts, report, task.lanes):
        report(stage)  # to the driver


def _refuse_other_bits(task: Task) -> None:
    """Raise EnvironmentFault if this worker would train other bits than the driver, or has no device.

    Ray passes on the settings that it was started with, even on the driver's own node, and a node may
    hold GPUs of several models.
    """
    site = task.site
    require_device(site.precision)
    got = fingerprint(site.threads, site.precision)
    for job in (each for chain in task.chains for each in chain.jobs):
        if job.fingerprint != got:
            given = [f"{name}={os.environ[name]}" for name in KERNEL_SETTINGS if name in os.environ]
            raise EnvironmentFault(
                "a worker would train other bits than the driver",
                where=f"shard {job.shard}, node {ray.get_runtime_context().get_node_id()[:8]}",
                expected=f"fingerprint {job.fingerprint}",
                got=f"fingerprint {got}, with {', '.join(given) or 'no kernel settings'}",
                next_step="start that node's Ray with the kernel settings, package versions and, with "
                "device cuda, the GPUs of the driver, and run the command again",
            )


def base_on_this_node(task: NeedsBase, base: BaseFiles) -> BaseFiles:
    """Return the base as this node has it. Raise Unready if it must be carried here first."""
    from sisa.lm.base.model_cache import cache_dir

    manifest = task.manifest
    if manifest is None or ray.get_runtime_context().get_node_id() == task.origin:
        return base
    try:
        return replace(base, directory=_found_base(base.directory, cache_dir(), manifest))
    except Unready:
        if not task.carried:
            raise
    carried = write_base(cache_dir(), manifest, lambda name: map(ray.get, task.carried[name]))
    return replace(base, directory=carried)


@functools.lru_cache(maxsize=8)
def _found_base(base_dir: Path, cache: Path, manifest: BaseManifest) -> Path:
    """Return where the base is. Raise Unready, which is not cached: the base may be carried here."""
    found = find_base(base_dir, cache, manifest)
    if found is None:
        raise Unready
    return found
