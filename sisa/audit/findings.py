"""Examine an opened model: every file that the ledger lists, every head, every unknown file.

Nothing is changed. `Finding.repair` names the repair; it is empty if nothing can be derived again. A
checkpoint is judged by its digests alone. `doctor.py` examines the disk, the ledger file and the key.

>>> Finding("disk", "warning", "model", "little room").lost, Finding("slice", "error", "f", "gone").lost
(False, True)
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from sisa.audit.garbage import KEPT_FILES, STRAY, list_garbage
from sisa.config.config import RunConfig
from sisa.config.fields import is_uri
from sisa.core.checkpoint_files import MANIFEST_FILE
from sisa.core.domain import Head, IndexFile, SliceFile
from sisa.core.errors import IntegrityError, SisaError, TransientError
from sisa.core.event_chain import contradicted
from sisa.core.ports import BlobStore
from sisa.flows.context.areas import known_by_area, purge
from sisa.flows.context.consistency import check_rows
from sisa.flows.context.context import Context
from sisa.flows.context.plans import plan_of, plans_of, view_shard, view_shards
from sisa.flows.rights.drop import stray_identities
from sisa.flows.status import export_statuses
from sisa.flows.wiring.description import model_id
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.planning.layout import slice_root
from sisa.planning.plan import gaps
from sisa.store import areas
from sisa.store.blobs.files import walk
from sisa.store.blobs.keyring import MAGIC, RESTORE, FileKeyring, is_sealed
from sisa.store.blobs.local_blobs import local_root
from sisa.store.blobs.sealed_area import SealedArea
from sisa.store.blobs.sqlite_files import open_journaled
from sisa.store.checkpoints import parse_manifest
from sisa.store.metrics import run_files

OTHERS, OTHERS_WRITE = 0o077, 0o022
Severity = Literal["error", "warning"]
RepairKind = Literal[
    "",
    "reindex",
    "retrain",
    "heads",
    "patches",
    "sweep",
    "mode",
    "scrub",
    "reseal",
    "purge",
    "evidence",
    "identities",
]

REPAIR_STEPS: dict[RepairKind, str] = {
    "": "restore it from a backup: it can't be derived again",
    "reindex": "`sisa doctor --repair` builds it again from the slice files",
    "retrain": "`sisa doctor --repair` trains it again, to the same bytes",
    "heads": "`sisa doctor --repair` derives it again from the held checkpoints",
    "patches": "`sisa doctor --repair` gives it up; `sisa approx unlearn` makes it again",
    "sweep": "`sisa gc`, `sisa doctor --repair` or the next train, add or forget removes it",
    "mode": "`sisa doctor --repair` makes it readable by its owner only",
    "purge": "`sisa gc` purges them; if that is refused, allow s3:ListBucketVersions and "
    "s3:DeleteObjectVersion, or remove the object lock",
    "reseal": "`sisa doctor --repair` rewrites it as `encrypt:` in the run file says",
    "evidence": "`sisa doctor --repair` makes it again from the slice files and the log, without what "
    "receipts of earlier deletions are made from; to keep these, restore it from a backup",
    "identities": "`sisa doctor --repair` removes them",
    "scrub": "`sisa doctor --repair` or the next train, add or forget empties it",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Describe one defect: its kind, its severity, where it is, what it is, and its repair."""

    kind: str
    severity: Severity
    where: str
    what: str
    repair: RepairKind = ""
    step: str = ""  # the next one, if it is not that of the repair
    shard: int | None = None
    key: str = ""  # key of a damaged checkpoint, patch or set of texts

    @property
    def next_step(self) -> str:
        return self.step or REPAIR_STEPS[self.repair]

    @property
    def lost(self) -> bool:
        """Return whether something is missing that can't be derived again."""
        return self.severity == "error" and not self.repair


def summary_of(error: SisaError) -> str:
    """Return an error about a file in one line."""
    return f"{error.what} (got {error.got})" if error.got else error.what


def examine(context: Context, directory: Path, *, with_key: bool = True) -> list[Finding]:
    """Return all findings of an opened model; `with_key=False` skips checks that need the right key."""
    found = [*_rows(context, with_key=with_key), *_modes(context, directory), *_keyring(context)]
    found += [*_evidence_keys(context), *forms(context)]
    for each in purge(context, dry_run=True):  # old versions may hold deleted text
        what = f"kept by the bucket: {each.why}"
        found.append(Finding("old_versions", "warning", each.where, what, "purge"))
    for finding, check in checks(context, partial(_check_group, context), with_key=with_key):
        if what := _damage(check):
            found.append(replace(finding, what=what))
    if strays := len(stray_identities(context)):
        what = f"identities are kept of {strays} records that are not held"
        found.append(Finding("identities", "error", LEDGER, what, "identities"))
    found += [*_unindexed(context), *_exports(context), *wrong_heads(context), *_gaps(context)]
    damaged = {each.key for each in found if each.key}
    return [*found, *_evidence(directory), *_unknown(context, directory, damaged)]


def checks(
    context: Context, group: Callable[[str, str, str], object], *, with_key: bool = True
) -> Iterator[tuple[Finding, Callable[[], object]]]:
    """Yield a check of each file or group that the ledger names, and the finding to report if it raises.

    `group` checks a checkpoint or a patch, given its area, its key and the digest of its manifest.
    """
    ledger = context.stores.ledger
    for file in ledger.slices():
        found = Finding("slice", "error", f"{areas.RECORDS}/{file.name}", "", shard=file.shard)
        yield found, partial(check_slice, context, file, with_key=with_key)
    for index in ledger.indexes():
        place = f"{areas.INDEX}/{index.name}"
        found = Finding("index", "error", place, "", "reindex", shard=index.shard)
        yield found, partial(check_index, context, index)
    for held in ledger.checkpoints():
        place = f"{areas.CHECKPOINTS}/{held.key}"
        found = Finding("checkpoint", "error", place, "", "retrain", shard=held.shard, key=held.key)
        yield found, partial(group, areas.CHECKPOINTS, held.key, held.manifest_sha256)
    needed = known_by_area(context)[areas.PATCHES]
    for patch in ledger.patches():
        if patch.key in needed:
            place = f"{areas.PATCHES}/{patch.key}"
            found = Finding("patch", "error", place, "", "patches", key=patch.key)
            yield found, partial(group, areas.PATCHES, patch.key, patch.manifest_sha256)
    for texts in ledger.vault():
        if texts.held:
            place = f"{areas.VAULT}/{texts.name}"
            found = Finding("vault", "error", place, "", "patches", key=texts.name)
            yield found, partial(context.stores.vault.check, texts)


def _evidence(directory: Path) -> Iterator[Finding]:
    """Find a damaged file of evidence; its content is checked whenever it is used."""
    if (path := directory / EVIDENCE).exists():
        try:
            with closing(open_journaled(path)) as connection:
                answers = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
        except (sqlite3.Error, UnicodeDecodeError) as error:
            answers = [type(error).__name__]
        if answers != ["ok"]:
            what = f"the evidence is damaged: {answers[0][:200]}"
            yield Finding("evidence_damaged", "error", EVIDENCE, what, "evidence")


def _rows(context: Context, *, with_key: bool) -> Iterator[Finding]:
    if what := _damage(lambda: check_rows(context.stores.ledger)):
        yield Finding("ledger_damaged", "error", LEDGER, what)
    ledger, chain = context.stores.ledger, context.settings.chain if with_key else None
    with ledger.snapshot():
        requests, events = ledger.requests(), ledger.events()
    if contradicted(requests, events, chain):
        what = "the requests' events do not form one chain that leads to their states"
        yield Finding("ledger_damaged", "error", LEDGER, what)


def _damage(check: Callable[[], object]) -> str:
    """Return what is wrong; empty if nothing is. Raise the error of a store that can't be reached."""
    try:
        check()
    except SisaError as error:
        if isinstance(error, TransientError) and is_uri(error.where):
            raise
        return summary_of(error)
    return ""


def _modes(context: Context, directory: Path) -> Iterator[Finding]:
    """Find files and directories that others than their owner may use."""
    if (mode := _mode(directory)) & OTHERS_WRITE:
        yield Finding("mode", "warning", ".", f"others may write to it (mode {mode:o})", "mode")
    kept = [*(directory / name for name in KEPT_FILES), Path(context.stores.witness.location())]
    yield from _open_to_others((path for path in kept if path.is_file()), directory)
    known = {**known_by_area(context), areas.METRICS: run_files(directory / areas.METRICS)}
    for area, place in sorted(context.stores.blobs.items()):
        if area == areas.LOG or (root := local_root(place)) is None or not root.is_dir():
            continue  # the log is there to be published
        held = [root, *(each for name in sorted(known.get(area, ())) for each in walk(root / name))]
        modes = [_mode(each) for each in held if each.exists()]
        if wide := [mode for mode in modes if mode & OTHERS]:
            what = f"others may use {len(wide)} files and directories (mode {max(wide):o})"
            yield Finding("mode", "warning", _inside(root, directory), what, "mode")


def _evidence_keys(context: Context) -> Iterator[Finding]:
    """Find keys of evidence that others than their owner may use."""
    meta = context.stores.ledger.meta()
    place = evidence_keys_dir(RunConfig.from_canonical(meta["config"]), model_id(meta))
    if place.is_dir():
        yield from _open_to_others(walk(place))


def _open_to_others(paths: Iterable[Path], directory: Path | None = None) -> Iterator[Finding]:
    """Find paths that others than their owner may use."""
    for path in paths:
        if path.exists() and (mode := _mode(path)) & OTHERS:
            where = _inside(path, directory) if directory else str(path)
            yield Finding("mode", "warning", where, f"others may use it (mode {mode:o})", "mode")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _inside(path: Path, directory: Path) -> str:
    """Return a path, relative if it is in the directory."""
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)


def _keyring(context: Context) -> Iterator[Finding]:
    """Find a missing keyring, and keys that others than their owner may use."""
    keyring = context.stores.keyring
    if not isinstance(keyring, FileKeyring):
        return
    needed = [
        names for area, names in known_by_area(context).items() if keyring.seals or area == areas.VAULT
    ]
    if not keyring.root.is_dir() and any(needed):
        what = "the keyring is missing: sealed files can't be read"
        yield Finding("keyring", "error", str(keyring.root), what, step=RESTORE)
        return
    folders = [keyring.root / area for area in (*areas.FILE_AREAS, *areas.GROUP_AREAS)]
    keys = [folder / name for folder in folders for name in sorted(keyring.held(folder.name))]
    yield from _open_to_others([keyring.root, *folders, *keys])


def forms(context: Context) -> Iterator[Finding]:
    """Find plain files of an encrypted model, and encrypted files and keys of a plain one."""
    seals = context.stores.keyring.seals
    wrong = "encrypted, or still with a key, although the model is not encrypted"
    if seals:
        wrong = "not encrypted, although the model is"
    for area, names in known_by_area(context).items():
        if area in areas.ALWAYS_SEALED or area not in context.stores.blobs:
            continue
        keys = frozenset() if seals else context.stores.keyring.held(area)
        for name in sorted(names):
            place = context.stores.blobs[area]
            inside = [f"{name}/{part}" for part in place.parts(name)] or [name]
            if name in keys or any(_sealed(place, each, seals) != seals for each in inside):
                yield Finding("form", "warning", f"{area}/{name}", wrong, "reseal")


def _sealed(place: BlobStore, name: str, unreadable: bool) -> bool:
    """Return whether a file is sealed; `unreadable` if it can't be read (its own check reports that)."""
    try:
        return is_sealed(place.get(name, "file of the model", len(MAGIC)))
    except SisaError:
        return unreadable


def check_slice(context: Context, file: SliceFile, *, with_key: bool) -> None:
    """Raise IntegrityError unless a slice file holds exactly the records of its rows in the ledger."""
    rows = {row.id_digest: row for row in context.stores.ledger.rows(file.shard, file.slice)}
    if slice_root(rows.values()) != file.root:
        raise IntegrityError("the ledger's rows are not those of its slice file")
    for stored in context.stores.records.read(file):
        row = rows.pop(stored.id_digest, None)
        if row is None:
            raise IntegrityError("holds a record that the ledger does not")
        wrong = context.settings.assigner.differences(stored.record, row) if with_key else []
        if "record_digest" in wrong:
            raise IntegrityError("holds a record that is not the recorded one")
        if wrong:
            raise IntegrityError(f"holds a record whose row has another {', '.join(wrong)}")
    if rows:
        raise IntegrityError(f"lacks {len(rows)} records that the ledger holds")


def _unindexed(context: Context) -> Iterator[Finding]:
    indexed = {index.shard for index in context.stores.ledger.indexes()}
    for head in context.stores.ledger.heads():
        if context.stores.ledger.rows(head.shard) and head.shard not in indexed:
            what = "a shard with records has no index"
            yield Finding("index", "error", f"shard {head.shard}", what, "reindex", shard=head.shard)


def check_index(context: Context, file: IndexFile) -> None:
    """Raise IntegrityError unless an index holds exactly the vectors of its shard's records."""
    wanted = sorted(row.vector_id for row in context.stores.ledger.rows(file.shard))
    if len(wanted) != file.num_vectors:
        raise IntegrityError(f"holds {file.num_vectors} vectors for {len(wanted)} records")
    context.stores.index.vectors(file, wanted)


def _check_group(context: Context, area: str, key: str, manifest_sha256: str) -> None:
    """Check the files of a checkpoint or a patch. Surplus files are reported as unknown ones instead."""
    sealed = SealedArea(context.stores.blobs[area], context.stores.keyring, area)
    manifest = sealed.checked(f"{key}/{MANIFEST_FILE}", manifest_sha256, "checkpoint manifest")
    parsed = parse_manifest(manifest)
    if parsed is None or parsed[0].key != key:
        raise IntegrityError("a checkpoint manifest can't be parsed")
    for name, sha256 in parsed[1].items():
        sealed.checked(f"{key}/{name}", sha256, "checkpoint file")


def _exports(context: Context) -> Iterator[Finding]:
    for each in export_statuses(context):
        if each.standing == "held":
            yield Finding("export", "error", each.path, "stale, and not erased yet", "sweep")
        elif each.standing:
            step = "remove what is left of it, or put it back; the next train, add or forget erases it"
            yield Finding("export", "warning", each.path, f"stale, and {each.standing}", step=step)


def wrong_heads(context: Context) -> Iterator[Finding]:
    """Find heads that do not serve what they should."""
    held = {head.shard: head for head in context.stores.ledger.heads()}
    expected = range(context.settings.assigner.layout.num_shards)
    for shard in sorted({*expected, *held}):
        if shard not in held:
            what = "a shard has no head"
        elif shard not in expected:
            what = "a head of a shard that the layout does not have"
        else:
            what = _wrong_head(context, held[shard])
        if what:
            yield Finding("head", "error", f"shard {shard}", what, "heads", shard=shard)


def _wrong_head(context: Context, head: Head) -> str:
    view = view_shard(context, head.shard)
    should = plan_of(context, view).head
    held = {each.key: each for each in view.held}
    if head.key is not None and head.key not in held:
        return "serves a checkpoint that the ledger does not hold"
    if head.converged and head.target != should.target:
        return "is marked as finished, but does not serve the model of its records"
    if head.key == should.key and head.depth != should.depth:
        return f"is recorded with depth {head.depth}, but its checkpoint has depth {should.depth}"
    if head.key is None and should.key is not None:
        return "serves the base, although a clean checkpoint is held"
    return ""


def _gaps(context: Context) -> Iterator[Finding]:
    """Find missing stages before a held one: the head serves, but a deletion would retrain more."""
    if context.recipe.shard_budget is not None:
        return  # a budget leaves gaps on purpose
    views = view_shards(context, [head.shard for head in context.stores.ledger.heads()])
    for view, plan in zip(views, plans_of(context, views), strict=True):
        for job in gaps(plan, {each.key for each in view.held}):
            where = f"shard {job.shard}, slice {job.slice}"
            what = "a stage before the served one is not held: a deletion would retrain more"
            if job.fingerprint == context.compute.fingerprint:
                yield Finding("gap", "warning", where, what, "retrain", shard=job.shard)
            else:
                step = "nothing needs to be done; --repair closes it in the environment that trained it"
                yield Finding("gap", "warning", where, what, step=step, shard=job.shard)


def _unknown(context: Context, directory: Path, damaged: set[str]) -> Iterator[Finding]:
    for each in list_garbage(context, directory):
        if each.path.rpartition("/")[2] in damaged:
            continue
        if each.reason == STRAY:
            step = "move it away or remove it; `sisa gc` leaves it alone"
            yield Finding("stray", "warning", each.path, each.reason, step=step)
        elif each.removable:
            yield Finding("unknown", "warning", each.path, each.reason, "sweep")
