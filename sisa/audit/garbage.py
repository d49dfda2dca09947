"""List and remove garbage: retired or unknown files in a model's directory or storage.

    sisa gc -m DIR --dry-run     lists it
    sisa gc -m DIR               removes what belongs to the model and is no longer needed

The ledger, the key, the lock and everything that the ledger lists stay. A retired checkpoint leaves the
ledger in a commit before its bytes are removed. Listed, but kept, are a checkpoint that an interrupted
run stored for a current target, which the next command adopts, and stray files, which may be the user's
own. Links are removed as links. A file's key is destroyed before the file; so are keys without a file.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sisa.core.checkpoint_files import MANIFEST_FILE
from sisa.core.errors import Busy, IntegrityError, all_tried
from sisa.core.ports import BlobStore, Change, KeptVersions
from sisa.flows.context.areas import known_by_area, purge
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.context.plans import retired
from sisa.flows.context.stale_exports import give_up_lost
from sisa.flows.reconcile import open_plans
from sisa.flows.wiring import moving, wiring
from sisa.flows.wiring.keys import PARTITION_KEY
from sisa.flows.wiring.ledger_place import (
    LEDGER,
    LEDGER_URL,
    LOCK,
    ledger_place,
    lock_beside,
    model_lock,
)
from sisa.flows.wiring.model_directory import ModelDirectory
from sisa.flows.wiring.upper_houses import SERVICE, SERVICE_STATE, TOKENS
from sisa.store import areas
from sisa.store.blobs import files
from sisa.store.blobs.local_blobs import LocalBlobs, local_root
from sisa.store.blobs.sealed_area import SealedArea
from sisa.store.blobs.sqlite_files import SQLITE_FILES
from sisa.store.checkpoints import parse_manifest
from sisa.store.ledger.sqlite import COMMIT_LOCK
from sisa.store.metrics import run_files

LEDGER_FILES = (*(LEDGER + each for each in SQLITE_FILES), LEDGER_URL, moving.LEDGERS_LEFT)
EVIDENCE_FILES = (wiring.EVIDENCE, f"{wiring.EVIDENCE}-journal", areas.LOG)
SERVICE_FILES = (SERVICE, TOKENS, *(SERVICE_STATE + each for each in SQLITE_FILES))
KEPT_FILES = frozenset(
    {*LEDGER_FILES, *EVIDENCE_FILES, *SERVICE_FILES, PARTITION_KEY, LOCK, COMMIT_LOCK}
)
AREAS = tuple(
    each for each in (*areas.SHARED_AREAS, *areas.LOCAL_AREAS) if each not in (areas.REPLAYS, areas.LOG)
)

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
    """Describe what to clean up: its `path`, relative if it is in the model directory, and its size."""

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
    old_versions_kept: tuple[KeptVersions, ...] = ()  # that a bucket keeps


_Item = tuple[Garbage, Callable[[], None]]  # with the function that erases it


def list_garbage(context: Context, directory: Path) -> tuple[Garbage, ...]:
    """Return what is retired or unknown to the ledger: in the directory, by path, then in storage."""
    return tuple(garbage for garbage, _ in _listed(context, directory))


def _listed(context: Context, directory: Path) -> list[_Item]:
    known = {**known_by_area(context), areas.METRICS: run_files(directory / areas.METRICS)}
    dropped = frozenset(retired(context))
    in_area = partial(_garbage_in_area, context, directory, dropped, _waiting(context))
    here = LocalBlobs(directory)
    found: list[_Item] = []
    for name in sorted(files.held_names(directory) - KEPT_FILES):
        path = directory / name
        if name in AREAS and path.is_dir():
            if path == local_root(context.stores.blobs[name]):
                found += in_area(name, known[name])
            else:
                found.append(_item(directory, here, name, UNKNOWN_FILE))
        elif name == areas.REPLAYS:
            found.append(_item(directory, here, name, REPLAY))
        elif name.startswith(files.TEMPORARY_PREFIX):
            found.append(_item(directory, here, name, TEMPORARY))
        else:
            found.append(_item(directory, here, name, STRAY, removable=False))
    for area, blobs in sorted(context.stores.blobs.items()):
        root = local_root(blobs)
        if area == areas.LOG:  # the log itself is kept, and only a disk has temporary files
            for name in sorted(files.held_names(root)) if root else ():
                if name.startswith(files.TEMPORARY_PREFIX):
                    found.append(_item(directory, blobs, name, TEMPORARY))
        elif root is not None and root.parent == directory:
            continue  # listed above
        elif area != areas.REPLAYS:
            found += in_area(area, known[area])
        elif blobs.held():
            found.append((Garbage(blobs.location(), blobs.num_bytes(""), REPLAY, True), blobs.clear))
    return found + _orphaned_keys(context, known)


def _garbage_in_area(
    context: Context,
    directory: Path,
    dropped: frozenset[str],
    waiting: frozenset[str],
    area: str,
    known: frozenset[str],
) -> list[_Item]:
    """Return garbage in a storage area; the ledger lists the `known` names."""
    blobs = context.stores.blobs[area]
    found: list[_Item] = []
    for entry in sorted(blobs.held()):
        if entry in dropped:
            found.append(_item(directory, blobs, entry, RETIRED))
        elif entry in known:
            if area in (areas.CHECKPOINTS, areas.PATCHES):
                surplus = _surplus(context, blobs, area, entry)
                found += [_item(directory, blobs, f"{entry}/{name}", SURPLUS) for name in surplus]
        elif area == areas.CHECKPOINTS and entry in waiting:
            found.append(_item(directory, blobs, entry, WAITING, removable=False))
        else:
            ours = entry.startswith(files.TEMPORARY_PREFIX)
            found.append(_item(directory, blobs, entry, TEMPORARY if ours else UNKNOWN_FILE))
    return found


def _orphaned_keys(context: Context, known: Mapping[str, frozenset[str]]) -> list[_Item]:
    """Return keys without a file; `remove_garbage` destroys them."""
    found: list[_Item] = []
    for area in (*AREAS, areas.REPLAYS):
        needed = known.get(area, frozenset()) | _names_with_files(context.stores.blobs[area], area)
        for name in sorted(context.stores.keyring.held(area) - needed):
            path = Path(context.stores.keyring.location(area, name))
            found.append((Garbage(str(path), files.num_bytes(path), ORPHAN, True), lambda: None))
    return found


def _names_with_files(blobs: BlobStore, area: str) -> frozenset[str]:
    """Return the names whose files are in an area; a replay's files are one folder deeper."""
    names = blobs.held()
    if area != areas.REPLAYS:
        return names
    plain = {each.removeprefix(files.TEMPORARY_PREFIX) for each in names}
    return frozenset[str]().union(*(blobs.below(each).held() for each in names | plain))


def _item(directory: Path, blobs: BlobStore, name: str, reason: str, *, removable: bool = True) -> _Item:
    """Return a blob as garbage; its path is relative if it is in the model directory."""
    root = local_root(blobs)
    where = blobs.location(name)
    if root is not None and directory in (root, root.parent):
        where = (root / name).relative_to(directory).as_posix()  # as the user named the directory
    garbage = Garbage(where, blobs.num_bytes(name), reason, removable)
    return garbage, lambda: blobs.erase([name])


def _waiting(context: Context) -> frozenset[str]:
    """Return whole checkpoints of current targets that an interrupted run stored but did not record."""
    known = {each.key for each in context.stores.ledger.checkpoints()}
    unknown = context.stores.checkpoints.held() - known
    found = set()
    for plan in open_plans(context):
        for key in unknown & plan.stages.keys():
            with contextlib.suppress(IntegrityError):
                found.add(context.stores.checkpoints.describe(key).key)
    return frozenset(found)


def _surplus(context: Context, blobs: BlobStore, area: str, known: str) -> list[str]:
    """Return files in a known checkpoint or patch that its manifest does not name; none if damaged."""
    try:
        sealed = SealedArea(blobs, context.stores.keyring, area)
        found = parse_manifest(sealed.plaintext(f"{known}/{MANIFEST_FILE}", "manifest"))
    except IntegrityError:
        return []
    return sorted(blobs.parts(known) - found[1].keys() - {MANIFEST_FILE}) if found else []


def remove_garbage(context: Context, directory: Path) -> tuple[Garbage, ...]:
    """Remove what is removable and return it; the caller holds the writer lock."""
    found = [each for each in _listed(context, directory) if each[0].removable]
    gone = [garbage for garbage, _ in found]
    if dropped := [each.path.rpartition("/")[2] for each in gone if each.reason == RETIRED]:
        commit(context, Change(dropped=dropped))
    kept = {**known_by_area(context), areas.REPLAYS: frozenset[str]()}
    kept[areas.CHECKPOINTS] |= _waiting(context)
    for area, names in kept.items():
        context.stores.keyring.destroy(area, sorted(context.stores.keyring.held(area) - names))
    with all_tried() as tried:
        for _, erase in found:
            with tried():
                erase()
    return tuple(gone)


def collect_garbage(model: ModelDirectory, *, dry_run: bool, lost_exports: bool = False) -> Collected:
    """List garbage, and remove it unless `dry_run`, with lost exports if asked. Raise Busy."""
    if dry_run:
        with model.context() as context:
            items = list_garbage(context, model.directory)
            return Collected(True, items, 0, 0, old_versions_kept=purge(context, dry_run=True))
    with model_lock(model.directory), model.context(locked=True) as context:
        items = list_garbage(context, model.directory)
        removed = remove_garbage(context, model.directory)
        given_up = give_up_lost(context) if lost_exports else ()
        kept = purge(context)
    removed_bytes = sum(each.num_bytes for each in removed)
    return Collected(False, items, len(removed), removed_bytes, given_up, kept)


@contextlib.contextmanager
def undisturbed(directory: Path) -> Iterator[bool]:
    """Keep writers out of the block, without creating a file; yield False if one is running."""
    if isinstance(place := ledger_place(directory), str):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_beside(place))
                free = True
            except Busy:
                free = False
            yield free
        return
    try:
        file = (directory / LOCK).open("rb")
    except OSError:  # no writer was ever here, or none can write here
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
