"""Scan for anything that a deleted record touched, for `sisa sweep`.

    what is read                     what must hold
    checkpoints, anywhere            bytes as recorded; made of records that are all still held
    rows of Parquet, Arrow and JSON  of held records; a row with a tombstone's keyed id is residue;
                                     elsewhere ids are in `id` and the columns of the run file's sources
    vectors of index files           of held records
    adapters exported elsewhere      of a current head (of another stage or clean export: outdated)
    exports that a deletion marked   erased; one that can't be found can't be excluded
    patches, anywhere                bytes as recorded; served or trained over
    files of metrics                 numbers only; losses and tokens of held checkpoints only
    identities in the ledger         of held records, or of those that the Delete Act keeps out
    vault sets, unfinished patches   as recorded and sealed; kept by consent, so not searched
    an object store                  as in a directory; without old versions of erased objects
    all bytes (`ids`, `texts`)       without the strings that the caller gives

Nothing is changed. Anything that can't be read or judged is residue as well: absence is either proven or
not. The scan covers the model directory and storage, this program's files in the cache and the temporary
directory, the exports that the ledger lists, and the paths in `also`. A link is residue unless it leads
into a scanned place, and so is a given place without any file. Findings name paths, rows and offsets,
never an id or a text. An index file is parsed only if its bytes have the digest in its name. A sealed
file that the model's keys don't open is *shredded*: it is counted, and is residue only if the ledger
relies on it.

Out of reach: compressed copies, copies that others encrypted, copies of the keyring, other machines,
backups, replicas and access logs of a bucket, freed disk blocks. Optimizer states copied out of a
checkpoint directory are found by their manifest alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from sisa.audit.foreign_files import (
    BATCH_ROWS,
    OWN_ID,
    Ids,
    SealedFiles,
    Shredded,
    Unreadable,
    arrow_ids,
    json_ids,
    parquet_ids,
    vector_ids,
)
from sisa.audit.garbage import SURPLUS, UNKNOWN_FILE, list_garbage, undisturbed
from sisa.audit.lineage import NO_FAULT, FilesMatch, GroupJudge, Verdict
from sisa.audit.own_files import resolved
from sisa.audit.search_strings import PARQUET_MAGIC, SearchStrings
from sisa.config.fields import is_uri
from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.digest import file_sha256, sha256_hex
from sisa.core.domain import Export, HeldCheckpoint, Tombstone
from sisa.core.errors import IntegrityError, InvalidInput, SisaError
from sisa.core.ports import BlobStore
from sisa.flows.context.areas import known_by_area
from sisa.flows.context.context import Context
from sisa.flows.rights.drop import stray_identities
from sisa.flows.status import export_statuses
from sisa.flows.wiring.ledger_place import LEDGER, ledger_place, open_ledger
from sisa.flows.wiring.model_directory import ModelDirectory
from sisa.lm.base.model_cache import cache_dir
from sisa.store.areas import CHECKPOINTS, INDEX, LOG, METRICS, PATCHES, RECORDS, RUNS, VAULT
from sisa.store.blobs.files import walk
from sisa.store.blobs.keyring import is_sealed
from sisa.store.blobs.local_blobs import local_root
from sisa.store.blobs.sqlite_files import read_beside
from sisa.store.blobs.temporary_directories import DIRECTORY_PREFIX
from sisa.store.metrics import STAGE_DIGITS, parse_lines, without_losses

SCANNED = (
    *("files", "bytes", "checkpoints", "rows", "vectors", "adapters", "unreadable"),
    *("shredded", "patches", "kept_by_consent"),
)
VOCABULARY_FILE = "vocab.json"  # of a tokenizer: an object of tokens and their numbers
NOT_RECORDED = "not the recorded file, so its content proves nothing"
LEFT_OVER_PREFIXES = (".partial-", ".wheel-", ".incoming-")  # of models being fetched
TEMPORARY_PATTERNS = (f"{DIRECTORY_PREFIX}*", "sisa-*/r")  # the second is of Ray (`ray/session.py`)


@dataclass(frozen=True, slots=True)
class Residue:
    """Describe one thing that is left or can't be excluded: `kind` for programs, `what` for people."""

    kind: str
    where: str
    position: str
    what: str


@dataclass(frozen=True, slots=True)
class Scan:
    """Hold the result of a scan: what was read, and what was found."""

    clean: bool
    places: tuple[str, ...]
    scanned: dict[str, int]
    residue: tuple[Residue, ...]
    outdated_exports: tuple[str, ...]


def sweep_model(
    model: ModelDirectory,
    *,
    also: Sequence[Path] = (),
    ids: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Scan:
    """Scan a model's directory, storage and exports. Raise Busy while another process writes."""
    with undisturbed(model.directory) as free:
        if not free:
            raise model.busy()
        with model.context(locked=True) as context:
            return scan_residue(context, model.directory, also=also, ids=ids, texts=texts)


def scan_residue(
    context: Context,
    directory: Path,
    *,
    also: Sequence[Path] = (),
    ids: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Scan:
    """Scan for traces of deleted records, and for ids and texts. Raise InvalidInput for absent paths."""
    missing = [number for number, path in enumerate(also, start=1) if not path.exists()]
    if missing:
        raise InvalidInput(
            f"{len(missing)} of the paths to scan do not exist",
            expected="paths of files or directories",
            got=", ".join(f"path {number} of {len(also)}" for number in missing),
        )
    exports = [Path(each.path) for each in context.stores.ledger.exports()]
    exports = [each for each in dict.fromkeys(exports) if each.is_dir()]
    scanner = _Scanner(context, directory, SearchStrings(list(texts), list(ids)))
    named = resolved([*scanner.own, *also, *exports])
    scanner.places = resolved([*named, *owned_temporary_files()])
    places = list(map(str, scanner.places))
    for place in scanner.places:
        scanner.scan(place, models=place in named)
    for place in (scanner.own[0], *resolved(also)):
        if place in scanner.empty:  # a disk may not be mounted
            scanner.report("nothing_read", place, "holds no file, so it proves nothing")
    for area, blobs in sorted(context.stores.blobs.items()):
        if local_root(blobs) is None:
            scanner.scan_objects(area, blobs)
            places.append(blobs.location())
    server = ledger_place(directory)
    if isinstance(server, str):
        scanner.scan_ledger(server, directory)
        places.append(server)
    scanner.report_unknown_files()
    scanner.report_missing_exports()
    if strays := len(stray_identities(context)):
        what = f"identities of {strays} records that are not held"
        scanner.report("identities", directory / LEDGER, what)
    return Scan(
        not scanner.residue,
        tuple(map(scanner.strings.hidden, places)),
        scanner.counts,
        tuple(scanner.residue),
        tuple(scanner.outdated),
    )


class _Scanner:
    """Scan places one after another, and collect what is left of deleted records in `residue`.

    own         the model's directory and storage: an unknown row is residue here
    places      all that is scanned: a link between two of them is none
    proven      files that were proven clean, which may be unknown to the ledger
    empty       places without any file
    """

    def __init__(self, context: Context, directory: Path, strings: SearchStrings) -> None:
        self.context = context
        self.directory = directory
        blobs = context.stores.blobs
        roots = {area: local_root(each) or directory / area for area, each in blobs.items()}
        self.roots = {area: Path(os.path.realpath(root)) for area, root in roots.items()}
        beside = {root.parent for root in roots.values() if root.parent != directory}
        self.own = resolved([directory, *sorted(beside), *self.roots.values()])
        self.places = self.own
        self.strings = strings
        self.residue: list[Residue] = []
        self.outdated: list[str] = []
        self.counts = dict.fromkeys(SCANNED, 0)
        self.counts |= {"strings": len(strings), "strings_too_short_for_raw_bytes": strings.num_short}
        self.proven: set[Path] = set()
        self.empty: list[Path] = []
        self._sealed = SealedFiles(context.stores.keyring)
        sources = context.settings.config.datasets
        self._id_columns = tuple(dict.fromkeys((*OWN_ID, *(each.id_column for each in sources))))
        self._heads = {head.key for head in context.stores.ledger.heads()}
        self._groups = GroupJudge(context)
        self._exports = context.stores.ledger.exports()
        self._known = known_by_area(context)
        held = [each for each in context.stores.ledger.vault() if each.held]
        self._sets = {self.roots[VAULT] / each.name: each for each in held}
        self._digests = {
            **{self.roots[RECORDS] / each.name: each.sha256 for each in context.stores.ledger.slices()},
            **{self.roots[INDEX] / each.name: each.sha256 for each in context.stores.ledger.indexes()},
        }

    def report(self, kind: str, where: Path | str, what: str, position: str = "") -> None:
        self.residue.append(Residue(kind, self.strings.hidden(str(where)), position, what))

    def scan(self, place: Path, *, models: bool) -> None:
        """Read every file below a path; without `models`, of any model, judge rows alone."""
        before = self.counts["files"]
        for path in walk(place, self._report_unreadable):
            self._search_name(path.name, path.parent)
            try:
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    self._check_file(path, models=models)
                elif stat.S_ISLNK(mode):
                    self._check_link(path)
            except FileNotFoundError:
                continue  # its owner has removed the temporary file
            except OSError as error:
                self._report_unreadable(path, error)
        if self.counts["files"] == before:
            self.empty.append(place)

    def _report_unreadable(self, path: Path, error: OSError) -> None:
        self.counts["unreadable"] += 1
        self.report("unreadable", path, f"can't be read: {error.strerror}")

    def _check_link(self, path: Path) -> None:
        """Report a link that leads out of the scanned directories; a target inside is read there."""
        target = Path(os.path.realpath(path))
        if not target.exists() or not any(target.is_relative_to(each) for each in self.places):
            what = "a link to something that was not read: add its target with --also"
            self.report("link", path, what)

    def _search_name(self, name: str, where: Path | str) -> None:
        for number in self.strings.in_value(name):
            self.report("string", where, f"string {number + 1} occurs in a name here", "name")

    def _check_file(self, path: Path, *, models: bool) -> None:
        self.counts["files"] += 1
        self.counts["bytes"] += path.stat().st_size
        if self._kept_by_consent(path):
            return
        try:
            plain = self._sealed.plaintext(path)
        except Shredded:
            self._search(path, path, None)
            self._check_shredded(path)
            return
        self._search(path, path, plain)
        if expected := self._digests.get(path):
            sha256 = file_sha256(path) if plain is None else sha256_hex(plain)
            if sha256 != expected:
                self.report("damaged", path, NOT_RECORDED)
                return
        with read_beside(path) if plain is None else io.BytesIO(plain) as file:
            head = file.read(len(PARQUET_MAGIC))
        ids, ours = None, any(each in path.parents for each in self.own)
        columns = OWN_ID if ours else self._id_columns
        if head == PARQUET_MAGIC:
            ids = parquet_ids(path if plain is None else io.BytesIO(plain), columns)
        elif path.suffix == ".arrow":
            ids = arrow_ids(path, columns)
        elif _has_json_lines(path, ours) and path.parent != self.roots[METRICS]:
            ids = json_ids(path, columns)
        if ids is not None:
            if self._check_rows(path, ids, ours=ours):
                self.proven.add(path)
        elif path.parent == self.roots[METRICS]:
            self._check_metrics(path)
        elif not models:
            return
        elif path.suffix == ".faiss":
            self._check_vectors(path)
        elif path.name == MANIFEST_FILE:
            self._check_group(path.parent)
        elif path.name == ADAPTER_FILE and not (path.parent / MANIFEST_FILE).exists():
            self._check_adapter(path)

    def _kept_by_consent(self, path: Path) -> bool:
        """Return whether a file is a vault set, or part of an unfinished patch, as recorded."""
        what = ""
        if path in self._sets:
            try:
                self.context.stores.vault.check(self._sets[path])
            except SisaError as error:
                what = error.what
        elif self.roots[RUNS] != path.parent.parent or path.parent.name not in self._known[RUNS]:
            return False
        elif not is_sealed(path.read_bytes()):
            what = "a part of an unfinished patch that is not encrypted"
        if what:
            self.report("damaged", path, what)
            return False
        self.counts["kept_by_consent"] += 1
        self.proven.add(path)
        return True

    def _search(self, where: Path | str, path: Path, plain: bytes | None) -> None:
        for place in self.strings.in_file(path, plain):
            what = f"string {place.number + 1} of {len(self.strings)} is here"
            self.report("string", where, what, place.position)

    def _check_shredded(self, path: Path) -> None:
        """Count a sealed file that no key opens as erased, unless the ledger relies on it."""
        held = {self.roots[CHECKPOINTS] / key for key in self._groups.checkpoints}
        held |= {self.roots[PATCHES] / key for key in self._groups.patches}
        if path in self._digests or path.parent in held:
            self.report("damaged", path, "encrypted under a key that is not held")
        else:
            self.counts["shredded"] += 1
            self.proven.add(path)

    def _check_metrics(self, path: Path) -> None:
        """Check that a file of metrics holds numbers only, and losses and tokens of held stages only."""
        try:
            found = parse_lines(path.read_bytes(), str(path))
        except IntegrityError as error:
            self.report("unreadable", path, error.what)
            return
        stages = {key[:STAGE_DIGITS] for key in self._groups.checkpoints}
        if any(without_losses(line, stages) != line for line in found):
            self.report("stale_loss", path, "a loss or tokens of a checkpoint that is no longer held")
        self.proven.add(path)

    def _check_rows(self, where: Path | str, ids: Iterator[Ids], *, ours: bool) -> bool:
        """Check rows, and return whether all could be read and have an id.

        A tombstone's row is residue anywhere, an unknown id's in the model's own places (`ours`).
        """
        whole, numbered = True, enumerate(ids)
        while True:
            batch: list[tuple[int, Ids]] = []
            try:  # what comes before a row that can't be read is kept
                batch.extend(islice(numbered, BATCH_ROWS))
            except Unreadable:
                whole = False
                if ours:
                    self.report("unreadable", where, "can't be decoded, so its rows prove nothing")
            self.counts["rows"] += len(batch)
            id_digest = self.context.settings.assigner.id_digest
            digests = [(at, id_digest(each)) for at, its in batch for each in its]
            whole = whole and all(its for _, its in batch)  # a row without an id proves nothing
            rows = self.context.stores.ledger.lookup(digest for _, digest in digests)
            for at, digest in digests:
                row = rows.get(digest)
                if isinstance(row, Tombstone):
                    what = f"a row of a record that request {row.request_id} deleted"
                    self.report("deleted_row", where, what, f"row {at}")
                elif row is None and ours:
                    what = "a row that belongs to no held record"
                    self.report("unknown_row", where, what, f"row {at}")
            if len(batch) < BATCH_ROWS:
                return whole

    def _check_vectors(self, path: Path) -> None:
        data = self._sealed.read(path)
        shard, _, digest = path.stem.removeprefix("shard-").partition("-")
        if not shard.isdigit() or sha256_hex(data) != digest:
            self.report("unreadable", path, "its bytes are not those of its name: not parsed")
            return
        try:
            found = vector_ids(data)
        except (RuntimeError, AttributeError):
            self.report("unreadable", path, "can't be parsed, so its vectors prove nothing")
            return
        self.counts["vectors"] += len(found)
        held = self.context.stores.ledger.by_vector(int(shard), found)
        for at, each in enumerate(found):
            if each not in held:
                what = "a vector that belongs to no held record"
                self.report("deleted_vector", path, what, f"vector {at}")
        self.proven.add(path)

    def _check_group(self, path: Path) -> None:
        manifest = self._sealed.read(path / MANIFEST_FILE)
        found = self._judge(path, manifest, partial(self._files_match, path))
        if found.fault == NO_FAULT:
            self.proven |= {path, *(path / each for each in (*found.files, MANIFEST_FILE))}

    def _judge(self, where: Path | str, manifest: bytes, files_match: FilesMatch) -> Verdict:
        """Judge a checkpoint or a patch, and report its fault."""
        found = self._groups.judge(manifest, files_match)
        self.counts[found.area] += 1
        if found.fault != NO_FAULT:
            kind, what = found.fault
            self.report(kind, where, what)
        return found

    def _files_match(self, directory: Path, digests: Mapping[str, str]) -> bool:
        try:
            return all(
                (directory / name).is_file() and self._sealed.sha256(directory / name) == sha256
                for name, sha256 in digests.items()
            )
        except Shredded:
            return False

    def _check_adapter(self, path: Path) -> None:
        self.counts["adapters"] += 1
        sha256 = file_sha256(path)
        if any(each.adapter_sha256 == sha256 for each in self._groups.patches.values()):
            return
        clean = [each for each in self._exports if not each.stale]
        sources: list[HeldCheckpoint | Export] = [*self._groups.checkpoints.values(), *clean]
        keys = {each.key for each in sources if each.adapter_sha256 == sha256}
        if not keys:
            what = "an adapter of no held checkpoint: from before a deletion, or of another model"
            self.report("stale_adapter", path, what)
        elif self._heads.isdisjoint(keys):
            self.outdated.append(self.strings.hidden(str(path)))

    def report_unknown_files(self) -> None:
        """Report files that the ledger does not know and that the scan did not prove clean."""
        for each in list_garbage(self.context, self.directory):
            if is_uri(each.path):
                continue  # reported by the scan of its store
            path = self.directory / each.path
            path = Path(os.path.realpath(path.parent), path.name)
            inside = [p for p in walk(path) if not p.is_dir() or p.is_symlink()]
            if not inside or any(p not in self.proven for p in inside):
                self.report("unknown_file", path, each.reason)

    def report_missing_exports(self) -> None:
        """Report exports that a deletion marked and that can't be found; others are stale adapters."""
        for each in export_statuses(self.context):
            if each.standing not in (None, "held"):
                what = f"an export that request {each.request_id} made stale is {each.standing}"
                self.report("missing_export", each.path, what)

    def scan_objects(self, area: str, blobs: BlobStore) -> None:
        """Scan a storage area in an object store, a blob or a group at a time in memory."""
        for name in sorted(blobs.held()):
            where = blobs.location(name)
            if area != LOG and name not in self._known.get(area, frozenset()):
                self.report("unknown_file", where, UNKNOWN_FILE)
            parts = sorted(blobs.parts(name)) or [""]
            plain = {part: self._read_object(area, blobs, name, part) for part in parts}
            if area == RECORDS:
                self._check_object_slice(name, where, plain.get(""))
            elif area in (CHECKPOINTS, PATCHES):
                self._check_object_group(area, name, where, plain)
        for kept in blobs.purge(dry_run=True) if area != LOG else ():
            self.report("old_versions", kept.where, f"kept by the bucket: {kept.why}")

    def scan_ledger(self, server: str, directory: Path) -> None:
        """Search the rows of a ledger on a server, whose files are out of reach."""
        with open_ledger(directory) as ledger:
            for table, value in ledger.values() if len(self.strings) else ():
                for number in self.strings.in_value(value):
                    what = f"string {number + 1} of {len(self.strings)} is here"
                    self.report("string", server, what, f"table {table}")

    def _read_object(self, area: str, blobs: BlobStore, group: str, part: str) -> bytes | None:
        """Search an object for strings, and return its plaintext; None if no held key opens it."""
        name = f"{group}/{part}" if part else group
        data = blobs.get(name, "object")
        self.counts["files"] += 1
        self.counts["bytes"] += len(data)
        plain = None
        try:
            plain = self.context.stores.keyring.unseal(area, group, part, data)
        except IntegrityError:
            self.counts["shredded"] += is_sealed(data)
        self._search_name(name, blobs.location())
        self._search(blobs.location(name), Path(name), plain or b"")
        return plain

    def _check_object_slice(self, name: str, where: str, data: bytes | None) -> None:
        recorded = self._digests.get(self.roots[RECORDS] / name)
        if data is not None and recorded in (None, sha256_hex(data)):
            self._check_rows(where, parquet_ids(io.BytesIO(data)), ours=True)
        elif recorded:
            self.report("damaged", where, NOT_RECORDED)

    def _check_object_group(
        self, area: str, key: str, where: str, plain: Mapping[str, bytes | None]
    ) -> None:
        manifest = plain.get(MANIFEST_FILE)
        if manifest is None:
            return  # shredded: reported above if unknown
        digests = {part: sha256_hex(data) for part, data in plain.items() if data is not None}
        found = self._judge(where, manifest, lambda named: named.items() <= digests.items())
        if found.fault == NO_FAULT and (found.area, found.key) != (area, key):
            self.report("damaged", where, "its bytes are not those of its name")
        surplus = plain.keys() - found.files.keys() - {MANIFEST_FILE} if found.key else ()
        for part in sorted(surplus):
            self.report("unknown_file", f"{where}/{part}", SURPLUS)


def _has_json_lines(path: Path, ours: bool) -> bool:
    """Return whether a file may hold rows; in a model, no `.json` does."""
    suffix = path.suffix.lower()
    rowless = ours or path.name in (MANIFEST_FILE, VOCABULARY_FILE)
    return suffix == ".jsonl" or (suffix == ".json" and not rowless)


def owned_temporary_files() -> list[Path]:
    """Return this user's incomplete caches and temporary directories outside the model."""
    cached = (path for depth in ("*", "*/*", "*/*/*") for path in cache_dir().glob(depth))
    found = [path for path in cached if path.name.startswith(LEFT_OVER_PREFIXES)]
    for pattern in TEMPORARY_PATTERNS:
        for path in Path(tempfile.gettempdir()).glob(pattern):
            with contextlib.suppress(OSError):  # removed meanwhile
                if path.lstat().st_uid == os.getuid():
                    found.append(path)
    return sorted(found)
