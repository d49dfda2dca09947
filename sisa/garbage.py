"""What lies in a model directory and is retired or unknown to the ledger; and its removal.

    sisa gc -m DIR --dry-run     lists it
    sisa gc -m DIR               removes what is ours and needed by nothing

Rules: what the ledger knows is never removed, nor is the ledger, the key or the lock. A retired
checkpoint leaves the ledger in a commit before its bytes go. What a cut-short run stored for a present
target is listed and kept: the next command takes it over. A stray file at the top is listed and kept,
since it may be the user's own. Links are removed as links; what they point to is left alone. A file's
key goes before the file, and keys without a file go, too.

Not covered: whether a file was touched by a deleted record (`residue.py`); damage (`doctor.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.errors import IntegrityError
from sisa.lineage import named_files
from sisa.opening import (
    CHECKPOINTS,
    INDEX,
    KEY,
    LEDGER,
    LOCK,
    METRICS,
    PATCHES,
    RECORDS,
    RUNS,
    SCRATCH,
    VAULT,
)
from sisa.plan import plan_shard
from sisa.ports import Change
from sisa.stale_exports import give_up_lost
from sisa.store import files
from sisa.store.metrics import run_files
from sisa.world import World, commit, known_names, view_shard

if TYPE_CHECKING:
    from sisa.api import Model

LEDGER_FILES = (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", f"{LEDGER}-journal")
KEPT_FILES = frozenset({*LEDGER_FILES, KEY, LOCK})
ROOMS = (RECORDS, INDEX, CHECKPOINTS, PATCHES, VAULT, RUNS, METRICS)

TEMPORARY = "a temporary file that a killed process left"
RETIRED = "retired: clean, but no target needs it"
UNKNOWN = "unknown to the ledger"
WAITING = "stored for a present target, not yet recorded: the next train, add or forget takes it over"
STRAY = "a stray: not of a model, so it is left for you to remove"
REPLAY = "scratch of a replay"
SURPLUS = "a file that the manifest beside it does not name"
ORPHAN = "a key of no file: whoever has a copy of that file can open it"


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file or directory: its path in the model directory (a key's: in the keyring), bytes in all, and
    whether `gc` takes it."""

    path: str
    num_bytes: int
    reason: str
    removable: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """What `gc` found, and how many entries and bytes of it are gone now."""

    dry_run: bool
    items: tuple[Garbage, ...]
    removed: int
    removed_bytes: int
    given_up: tuple[str, ...] = ()  # stale exports that were not where they were written


def list_garbage(world: World, directory: Path) -> tuple[Garbage, ...]:
    """Everything in the directory that is retired or unknown to the ledger, in order of path."""
    retired, waiting = _retired(world), _waiting(world)
    known = {**known_names(world), METRICS: run_files(directory / METRICS)}
    found: list[Garbage] = []
    for name in sorted(files.held_names(directory) - KEPT_FILES):
        path = directory / name
        if name == SCRATCH:
            found.append(_garbage(directory, path, REPLAY))
        elif name not in ROOMS or not path.is_dir():
            ours = name.startswith(files.TEMPORARY_PREFIX)
            found.append(_garbage(directory, path, TEMPORARY if ours else STRAY, removable=ours))
        else:
            for entry in sorted(files.held_names(path)):
                if entry in known[name] and entry not in retired:
                    if name in (CHECKPOINTS, PATCHES):
                        found += _surplus(world, directory, path / entry)
                    continue
                kept = name == CHECKPOINTS and entry in waiting
                found.append(
                    _garbage(directory, path / entry, _reason(entry, retired, kept), removable=not kept)
                )
    for room in (*ROOMS, SCRATCH):
        needed = known.get(room, frozenset()) | _on_disk(directory, room)
        for name in sorted(world.keyring.held(room) - needed):
            path = Path(world.keyring.location(room, name))
            found.append(Garbage(str(path), num_bytes(path), ORPHAN, True))
    return tuple(found)


def _on_disk(directory: Path, room: str) -> frozenset[str]:
    """Names of the files that lie in a room; a replay's lie one folder deeper."""
    return frozenset(path.name for path in (directory / room).glob("*/*" if room == SCRATCH else "*"))


def _garbage(directory: Path, path: Path, reason: str, *, removable: bool = True) -> Garbage:
    return Garbage(path.relative_to(directory).as_posix(), num_bytes(path), reason, removable)


def _reason(entry: str, retired: frozenset[str], kept: bool) -> str:
    if entry in retired:
        return RETIRED
    if kept:
        return WAITING
    return TEMPORARY if entry.startswith(files.TEMPORARY_PREFIX) else UNKNOWN


def num_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; links count as links."""
    if path.is_dir() and not path.is_symlink():
        return sum(num_bytes(each) for each in path.iterdir())
    return path.lstat().st_size


def _retired(world: World) -> frozenset[str]:
    """Checkpoints that the next reconciliation drops; those of unfinished shards still serve."""
    found: set[str] = set()
    for head in world.ledger.heads():
        if head.converged:
            view = view_shard(world, head.shard)
            found |= set(plan_shard(view, world.recipe, world.fingerprint).retired)
    return frozenset(found)


def _waiting(world: World) -> frozenset[str]:
    """Whole checkpoints of present targets that a cut-short run did not get to record."""
    known = {each.key for each in world.ledger.checkpoints()}
    on_disk = world.checkpoints.held()
    found = set()
    for head in world.ledger.heads():
        if head.converged:
            continue
        plan = plan_shard(view_shard(world, head.shard), world.recipe, world.fingerprint)
        for job in plan.path:
            if job.key in on_disk and job.key not in known:
                with contextlib.suppress(IntegrityError):
                    found.add(world.checkpoints.describe(job.key).key)
    return frozenset(found)


def _surplus(world: World, directory: Path, known: Path) -> list[Garbage]:
    """Files in a known checkpoint or patch that are not of it; none where the manifest is damaged."""
    expected = named_files(known, world.keyring, known.parent.name)
    if expected is None:
        return []
    return [
        _garbage(directory, known / name, SURPLUS) for name in sorted(files.held_names(known) - expected)
    ]


def remove_garbage(world: World, directory: Path) -> tuple[Garbage, ...]:
    """Remove what is removable and return it. The caller holds the writer lock."""
    found = tuple(each for each in list_garbage(world, directory) if each.removable)
    retired = [each.path.rpartition("/")[2] for each in found if each.reason == RETIRED]
    if retired:
        commit(world, Change(dropped=retired))
    kept = {**known_names(world), SCRATCH: frozenset[str]()}
    kept[CHECKPOINTS] |= _waiting(world)
    for room, names in kept.items():
        world.keyring.destroy(room, sorted(world.keyring.held(room) - names))
    for each in found:
        if each.reason != ORPHAN:
            files.erase(directory / each.path)
    return found


def collect_garbage(model: Model, *, dry_run: bool, lost_exports: bool = False) -> Collected:
    """List, or list and remove; `lost_exports` gives up stale exports that can't be found.

    Raises Busy where another process writes and something would go.
    """
    if dry_run:
        with model._world() as world:
            return Collected(True, list_garbage(world, model.directory), 0, 0)
    with files.writer_lock(model.directory / LOCK), model._world(locked=True) as world:
        items = list_garbage(world, model.directory)
        removed = remove_garbage(world, model.directory)
        given_up = give_up_lost(world) if lost_exports else ()
    removed_bytes = sum(each.num_bytes for each in removed)
    return Collected(False, items, len(removed), removed_bytes, given_up)


@contextlib.contextmanager
def undisturbed(directory: Path) -> Iterator[bool]:
    """Keep writers out for a while, if that can be had; False when one is at work.

    Unlike `writer_lock` this makes no file, so that a directory that can't be written can be examined.
    """
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no writer was ever here, or none can be
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(handle)
