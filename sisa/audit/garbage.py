"""List and remove garbage: retired or unknown files in a model's directory or storage.

    sisa gc -m DIR --dry-run     lists it
    sisa gc -m DIR               removes what belongs to the model and is no longer needed

The ledger, the key, the lock and everything that the ledger lists stay. A retired checkpoint leaves the
ledger in a commit before its bytes are removed. A checkpoint that an interrupted run stored for a
current target is listed and kept; the next command adopts it. A stray file in the directory is listed
and kept, since it may be the user's own. Links are removed as links, and their targets are left alone. A
file's key is destroyed before the file; keys without a file are destroyed as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.audit.lineage import named_files
from sisa.core.errors import IntegrityError, all_tried
from sisa.core.ports import BlobStore, Change, KeptVersions
from sisa.flows.reconcile import give_up_lost
from sisa.flows.wiring.context import (
    Context,
    commit,
    known_by_area,
    open_shards,
    plan_of,
    purge,
    view_shard,
)
from sisa.flows.wiring.wiring import (
    CHECKPOINTS,
    INDEX,
    KEY,
    LEDGER,
    LOCK,
    METRICS,
    PATCHES,
    PREFIXES,
    RECORDS,
    RUNS,
    SCRATCH,
    VAULT,
)
from sisa.store.blobs import files
from sisa.store.blobs.files import LocalBlobs
from sisa.store.metrics import run_files

if TYPE_CHECKING:
    from sisa.model import Model

LEDGER_FILES = (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", f"{LEDGER}-journal")
KEPT_FILES = frozenset({*LEDGER_FILES, KEY, LOCK})
AREAS = (RECORDS, INDEX, PREFIXES, CHECKPOINTS, PATCHES, VAULT, RUNS, METRICS)

TEMPORARY = "a temporary file that a killed process left"
RETIRED = "retired: clean, but no target needs it"
UNKNOWN_FILE = "unknown to the ledger"
WAITING = "stored for a current target, not yet recorded: the next train, add or forget takes it over"
STRAY = "a stray file: not part of a model, so it is left for you to remove"
REPLAY = "scratch files of a replay"
SURPLUS = "a file that the manifest beside it does not name"
ORPHAN = "a key without a file: anyone with a copy of the file can open it"


@dataclass(frozen=True, slots=True)
class Garbage:
    """Describe a file or directory to clean up, its size, and whether `sisa gc` removes it.

    `path` is relative to the model directory; for a key, a path in the keyring; for storage elsewhere,
    absolute or a URI.
    """

    path: str
    num_bytes: int
    reason: str
    removable: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """Hold the outcome of `sisa gc`: what it found, and how many entries and bytes it removed."""

    dry_run: bool
    items: tuple[Garbage, ...]
    removed: int
    removed_bytes: int
    given_up: tuple[str, ...] = ()  # stale exports that were no longer at their path
    kept: tuple[KeptVersions, ...] = ()  # old versions that a bucket keeps


@dataclass(frozen=True, slots=True)
class _Item:
    """Pair garbage with the function that erases it; its key is destroyed first."""

    garbage: Garbage
    erase: Callable[[], None] = lambda: None


def list_garbage(context: Context, directory: Path) -> tuple[Garbage, ...]:
    """Return what is retired or unknown to the ledger, in the directory and in the model's storage.

    Entries of the model directory come first, in order of path.
    """
    return tuple(each.garbage for each in _listed(context, directory))


def _listed(context: Context, directory: Path) -> list[_Item]:
    retired, waiting = _retired(context), _waiting(context)
    known = {**known_by_area(context), METRICS: run_files(directory / METRICS)}
    found: list[_Item] = []
    for name in sorted(files.held_names(directory) - KEPT_FILES):
        path = directory / name
        if name in AREAS and path.is_dir():
            blobs = context.stores.blobs[name]
            if path == at_hand(blobs):
                found += _in_area(context, directory, name, known[name], retired, waiting)
            else:
                found.append(_at(directory, path, UNKNOWN_FILE))
        elif name == SCRATCH:
            found.append(_at(directory, path, REPLAY))
        else:
            ours = name.startswith(files.TEMPORARY_PREFIX)
            found.append(_at(directory, path, TEMPORARY if ours else STRAY, removable=ours))
    for area, blobs in sorted(context.stores.blobs.items()):
        root = at_hand(blobs)
        if root is not None and root.parent == directory:
            continue
        if area != SCRATCH:
            found += _in_area(context, directory, area, known[area], retired, waiting)
        elif blobs.held():
            garbage = Garbage(blobs.location(), blobs.num_bytes(""), REPLAY, True)
            found.append(_Item(garbage, blobs.clear))
    return found + _keys(context, known)


def at_hand(blobs: BlobStore) -> Path | None:
    """Return the directory of a blob store; None for an object store."""
    return blobs.root if isinstance(blobs, LocalBlobs) else None


def _in_area(
    context: Context,
    directory: Path,
    area: str,
    known: frozenset[str],
    retired: frozenset[str],
    waiting: frozenset[str],
) -> list[_Item]:
    blobs = context.stores.blobs[area]
    found: list[_Item] = []
    for entry in sorted(blobs.held()):
        if entry in known and entry not in retired:
            if area in (CHECKPOINTS, PATCHES):
                found += [
                    _in(directory, blobs, f"{entry}/{name}", SURPLUS)
                    for name in _surplus(context, blobs, area, entry)
                ]
            continue
        kept = area == CHECKPOINTS and entry in waiting
        found.append(_in(directory, blobs, entry, _reason(entry, retired, kept), removable=not kept))
    return found


def _keys(context: Context, known: Mapping[str, frozenset[str]]) -> list[_Item]:
    """Return keys without a file."""
    found = []
    for area in (*AREAS, SCRATCH):
        needed = known.get(area, frozenset()) | _stored(context.stores.blobs[area], area)
        for name in sorted(context.stores.keyring.held(area) - needed):
            path = Path(context.stores.keyring.location(area, name))
            found.append(_Item(Garbage(str(path), files.num_bytes(path), ORPHAN, True)))
    return found


def _stored(blobs: BlobStore, area: str) -> frozenset[str]:
    """Return the names of the files in an area; a replay's files lie one folder deeper."""
    names = blobs.held()
    if area != SCRATCH:
        return names
    plain = {each.removeprefix(files.TEMPORARY_PREFIX) for each in names}
    return frozenset[str]().union(*(blobs.below(each).held() for each in names | plain))


def _at(directory: Path, path: Path, reason: str, *, removable: bool = True) -> _Item:
    name = path.relative_to(directory).as_posix()
    garbage = Garbage(name, files.num_bytes(path), reason, removable)
    return _Item(garbage, lambda: files.erase_all(path.parent, [path.name]))


def _in(directory: Path, blobs: BlobStore, name: str, reason: str, *, removable: bool = True) -> _Item:
    root = at_hand(blobs)
    where = blobs.location(name)
    if root is not None and root.parent == directory:
        where = f"{root.name}/{name}"
    garbage = Garbage(where, blobs.num_bytes(name), reason, removable)
    return _Item(garbage, lambda: blobs.erase([name]))


def _reason(entry: str, retired: frozenset[str], kept: bool) -> str:
    if entry in retired:
        return RETIRED
    if kept:
        return WAITING
    return TEMPORARY if entry.startswith(files.TEMPORARY_PREFIX) else UNKNOWN_FILE


def _retired(context: Context) -> frozenset[str]:
    """Return the checkpoints that the next reconciliation drops; an unfinished shard's still serve."""
    found: set[str] = set()
    for head in context.stores.ledger.heads():
        if head.converged:
            view = view_shard(context, head.shard)
            found |= set(plan_of(context, view).retired)
    return frozenset(found)


def _waiting(context: Context) -> frozenset[str]:
    """Return whole checkpoints of current targets that an interrupted run stored but did not record."""
    known = {each.key for each in context.stores.ledger.checkpoints()}
    on_disk = context.stores.checkpoints.held()
    found = set()
    for shard in open_shards(context):
        plan = plan_of(context, view_shard(context, shard))
        for key in plan.stages:
            if key in on_disk and key not in known:
                with contextlib.suppress(IntegrityError):
                    found.add(context.stores.checkpoints.describe(key).key)
    return frozenset(found)


def _surplus(context: Context, blobs: BlobStore, area: str, known: str) -> list[str]:
    """Return files in a known checkpoint or patch that its manifest does not name; none if damaged."""
    expected = named_files(blobs, known, context.stores.keyring, area)
    return [] if expected is None else sorted(blobs.parts(known) - expected)


def remove_garbage(context: Context, directory: Path) -> tuple[Garbage, ...]:
    """Remove what is removable and return it; the caller holds the writer lock."""
    found = [each for each in _listed(context, directory) if each.garbage.removable]
    gone = [each.garbage for each in found]
    retired = [each.path.rpartition("/")[2] for each in gone if each.reason == RETIRED]
    if retired:
        commit(context, Change(dropped=retired))
    kept = {**known_by_area(context), SCRATCH: frozenset[str]()}
    kept[CHECKPOINTS] |= _waiting(context)
    for area, names in kept.items():
        context.stores.keyring.destroy(area, sorted(context.stores.keyring.held(area) - names))
    with all_tried() as tried:
        for each in found:
            with tried():
                each.erase()
    return tuple(gone)


def collect_garbage(model: Model, *, dry_run: bool, lost_exports: bool = False) -> Collected:
    """List garbage, and remove it unless `dry_run`; `lost_exports` gives up stale exports that are gone.

    Raise Busy if something should be removed while another process writes.
    """
    if dry_run:
        with model._context() as context:
            items = list_garbage(context, model.directory)
            return Collected(True, items, 0, 0, kept=purge(context, dry_run=True))
    with files.writer_lock(model.directory / LOCK), model._context(locked=True) as context:
        items = list_garbage(context, model.directory)
        removed = remove_garbage(context, model.directory)
        given_up = give_up_lost(context) if lost_exports else ()
        kept = purge(context)
    removed_bytes = sum(each.num_bytes for each in removed)
    return Collected(False, items, len(removed), removed_bytes, given_up, kept)


@contextlib.contextmanager
def undisturbed(directory: Path) -> Iterator[bool]:
    """Keep writers out until the block ends; yield False if one is running.

    Unlike `writer_lock`, this creates no file, so that a read-only directory can be examined.
    """
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no writer was ever here, or none can write here
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
