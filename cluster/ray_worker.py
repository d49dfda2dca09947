"""What runs in a Ray worker: one shard's chain, trained by `sisa.serial.train_chain`.

Rules: a task carries paths and digests, never text, so nothing of a record reaches Ray's object store,
spill or logs; every exception comes back as a value, without its message. On another node than the
driver's a worker first compares its numerics fingerprint with the jobs', for the bits are promised
under one fingerprint.

Not covered: starting workers again (`ray_executor.py`); the memory of live workers, which may hold text
of records that they trained on until the Ray session ends.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    RayError,
)

from cluster.shared_base import BaseManifest, Block, holds_base, write_base
from sisa.domain import Chain
from sisa.errors import EnvironmentFault, SisaError
from sisa.ports import CheckpointStore, Event, RecordStore, SliceTrained, Trainer
from sisa.serial import Site, train_chain

MAILBOX_S = 2.0

Parts = tuple[Trainer, RecordStore, CheckpointStore]
OpenParts = Callable[[Site], Parts]
Carried = Mapping[str, Sequence[Any]]  # a base file's name -> references to its blocks


@dataclass(frozen=True, slots=True)
class Task:
    """What travels to a worker. `manifest` is None on a single node, whose base is the driver's own."""

    chain: Chain
    site: Site
    open_parts: OpenParts
    manifest: BaseManifest | None
    origin: str  # the driver's node
    run_id: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes back: every stage that is stored, and why there are not all of them."""

    trained: tuple[SliceTrained, ...] = ()
    error: SisaError | None = None
    lacks_base: bool = False


class Mailbox:
    """Events on their way to the driver, by run."""

    def __init__(self) -> None:
        self._events: dict[str, list[Event]] = {}

    def put(self, run_id: str, event: Event) -> None:
        self._events.setdefault(run_id, []).append(event)

    def take(self, run_id: str) -> list[Event]:
        return self._events.pop(run_id, [])


def open_parts(site: Site) -> Parts:
    """The real parts of a site; the base is kept per process."""
    from sisa.model.numerics import pin_threads
    from sisa.opening import open_stores, open_trainer
    from sisa.store.keyring import FileKeyring

    if not site.records_dir.is_dir():
        raise EnvironmentFault(
            "the model directory is not visible on a worker's node",
            where=str(site.records_dir),
            next_step="put the model directory on a file system that all nodes share",
        )
    keys = site.keyring
    if isinstance(keys, FileKeyring) and not keys.root.is_dir():
        raise EnvironmentFault(
            "the model's keyring is not visible on a worker's node",
            where=str(keys.root),
            next_step="put the keyring on a file system that all nodes share, and name it by `keyring:`",
        )
    pin_threads(site.threads)
    return open_trainer(site), *open_stores(site)


def train_remotely(task: Task, mailbox: Any, carried: Carried) -> Outcome:
    """Train a chain in this worker; every exception comes back as a value, without record text."""
    trained: list[SliceTrained] = []
    posted: list[Any] = []

    def report(event: Event) -> None:
        if isinstance(event, SliceTrained):
            trained.append(event)
        posted[:] = [mailbox.put.remote(task.run_id, event)]

    error = None
    try:
        site = _site_on_this_node(task, carried)
        if site is None:
            return Outcome(lacks_base=True)
        train_chain(task.chain, *task.open_parts(site), report)
    except SisaError as raised:
        error = raised
    except Exception as raised:
        error = describe_fault(raised, f"shard {task.chain.shard}")
    with contextlib.suppress(RayError):  # the mailbox may be gone; the result tells what matters
        ray.get(posted, timeout=MAILBOX_S)
    return Outcome(tuple(trained), error)


def _site_on_this_node(task: Task, carried: Carried) -> Site | None:
    """The task's site with the base where this node has it; None when it must be carried here."""
    from sisa.model.packages import cache_dir

    manifest = task.manifest
    if manifest is None or ray.get_runtime_context().get_node_id() == task.origin:
        return task.site
    _check_fingerprint(task)
    if _holds_base(task.site.base_dir, manifest):
        return task.site
    if not carried:
        return None

    def blocks(name: str) -> Iterable[Block]:
        return (ray.get(reference) for reference in carried[name])

    return replace(task.site, base_dir=write_base(cache_dir(), manifest, blocks))


_holds_base = functools.lru_cache(maxsize=8)(holds_base)


def _check_fingerprint(task: Task) -> None:
    from sisa.model.numerics import fingerprint

    got = fingerprint(task.site.threads)
    for job in task.chain.jobs:
        if job.fingerprint != got:
            raise EnvironmentFault(
                "a node would train other bits than the driver's",
                where=f"shard {job.shard}",
                expected=f"fingerprint {job.fingerprint}",
                got=f"fingerprint {got}",
                next_step="use nodes of one processor model with the same package versions",
            )


def describe_fault(error: Exception, of: str) -> SisaError:
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
