"""Diagnose a model directory: what is wrong, how severe it is, and which repair fixes it.

    writer, disk, clock       a running writer, a full or read-only disk, a clock that ran backwards
    ledger, key, keyring      missing, damaged, of another version, not matching: can't be derived again
    witness                   damaged; or ahead of the ledger after a restored backup: delete again
    storage                   out of reach, or with old versions of erased objects: purge
    files of the model        `findings.py` examines them, each with its repair

Nothing is changed and torch is not imported. A healthy model has no findings. Findings name files,
shards and digests, never a record. An `error` makes some command fail; a `warning` does not.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sisa.audit.findings import Finding, examine, summary_of
from sisa.audit.garbage import AREAS, undisturbed
from sisa.config.config import RunConfig
from sisa.core.digest import KEY_BYTES, Keyed
from sisa.core.errors import SisaError, TransientError
from sisa.core.event_chain import key_names
from sisa.core.events import silent
from sisa.flows.context.commit import is_behind
from sisa.flows.context.context import Context
from sisa.flows.context.served import restrictions
from sisa.flows.context.slices import held_rows
from sisa.flows.restored_backup import unknown_deletions
from sisa.flows.wiring import moving, wiring
from sisa.flows.wiring.description import model_id, named
from sisa.flows.wiring.keys import PARTITION_KEY, key_path, stored_secret
from sisa.flows.wiring.ledger_place import LEDGER, LEDGER_URL, ledger_name, no_model, open_ledger
from sisa.flows.wiring.resources import Resources
from sisa.store.areas import CHECKPOINTS
from sisa.store.blobs import files
from sisa.store.blobs.sqlite_files import open_readonly
from sisa.store.ledger.tables import SCHEMA_VERSION, UPGRADED

LEAST_FREE_BYTES = 64 * 2**20
CLOCK_TOLERANCE_S = 1.0


@dataclass(frozen=True)
class Diagnosis:
    """Hold the findings of a model directory; `ok` if none is an error, `healthy` if there are none."""

    directory: str
    ok: bool
    healthy: bool
    findings: tuple[Finding, ...]

    @property
    def unopenable(self) -> bool:
        """Return whether the ledger or the key prevents opening, and so repairing, the model."""
        return any(
            each.severity == "error" and each.kind.partition("_")[0] in ("key", "ledger")
            for each in self.findings
        )


def diagnosis(directory: Path, findings: list[Finding]) -> Diagnosis:
    """Return the diagnosis that follows from the findings."""
    ok = all(each.severity != "error" for each in findings)
    return Diagnosis(str(directory), ok, not findings, tuple(findings))


def diagnose(directory: Path, now: datetime | None = None) -> Diagnosis:
    """Examine the model in a directory. Raise InvalidInput if the directory holds none."""
    if not any((directory / each).exists() for each in (LEDGER, LEDGER_URL, PARTITION_KEY, *AREAS)):
        raise no_model(directory)
    with undisturbed(directory) as free:
        if not free:
            what = "another process is writing to this model, so its files can't be checked now"
            step = "wait until it has finished, then run the same command again"
            found = [Finding("writer", "warning", str(directory), what, step=step)]
            return diagnosis(directory, found)
        found = [*surroundings(directory), *_ledger(directory)]
        if diagnosis(directory, found).unopenable:
            return diagnosis(directory, found)
        found += clock(directory, now or datetime.now(UTC))
        found += _opened(directory)
    return diagnosis(directory, found)


def surroundings(directory: Path) -> Iterator[Finding]:
    """Find faults of the disk, and a write-ahead log that a killed process left."""
    for path in (directory, *(directory / area for area in AREAS)):
        if path.is_dir() and not _writable(path):
            step = "make it writable; the model still answers questions"
            what = "can't be written: nothing can be trained, added or deleted"
            yield Finding("read_only", "error", str(path), what, step=step)
    free = shutil.disk_usage(directory).free
    sizes = map(files.num_bytes, (directory / CHECKPOINTS).glob("*"))
    if free < (needed := LEAST_FREE_BYTES + max(sizes, default=0)):
        step = "free disk space before the next train, add or forget"
        what = f"{free:,} bytes are free, {needed:,} should be"
        yield Finding("disk", "warning", str(directory), what, step=step)
    on_server = ledger_name(directory) == LEDGER_URL
    if not on_server and (kind := files.network_file_system(directory)):
        step = "move the model to a disk of this machine, or its ledger to a server (`sisa ledger move`)"
        what = f"the ledger is on a network file system ({kind}), where SQLite is not safe"
        yield Finding("network_disk", "warning", str(directory), what, step=step)
    if moving.is_unfinished(directory):
        what = "a move of the ledger was cut short, and what it left still holds rows"
        step = "the next train, add or forget erases it"
        yield Finding("ledger_left", "warning", moving.LEDGERS_LEFT, what, step=step)
    log = directory / f"{LEDGER}-wal"
    if log.is_file() and (size := log.stat().st_size):
        what = f"holds {size:,} bytes: a process was killed, or one is reading now"
        yield Finding("log", "warning", log.name, what, "scrub")


def _writable(path: Path) -> bool:
    """Return whether a nameless file can be created; permissions do not bind every user."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def _query(path: Path, statement: str) -> list[Any]:
    with closing(open_readonly(path)) as connection:
        return connection.execute(statement).fetchall()


def _ledger(directory: Path) -> Iterator[Finding]:
    """Find a ledger file that is missing, damaged or of another version."""
    if ledger_name(directory) == LEDGER_URL:
        yield from _on_server(directory)
        return
    path = directory / LEDGER
    if not path.is_file():
        yield Finding("ledger_missing", "error", LEDGER, "the ledger is missing")
        return
    try:
        answers = [str(row[0]) for row in _query(path, "PRAGMA integrity_check(20)")]
        version = int(_query(path, "PRAGMA user_version")[0][0])
        known = version in (SCHEMA_VERSION, *UPGRADED)
        committed = known and bool(_query(path, "SELECT 1 FROM meta WHERE key = 'config'"))
    except sqlite3.OperationalError as error:
        step = "give this user access to the directory, and end the processes that use it"
        yield Finding("ledger_unreadable", "error", LEDGER, f"can't be read: {error}", step=step)
        return
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # SQLite's own message quotes a damaged schema, which may not even be text.
        what = "its schema is not text" if isinstance(error, UnicodeDecodeError) else error
        yield Finding("ledger_damaged", "error", LEDGER, f"the ledger is damaged: {what}")
        return
    if answers != ["ok"]:
        what = f"the ledger is damaged: {len(answers)} faults, the first: {answers[0][:200]}"
        yield Finding("ledger_damaged", "error", LEDGER, what)
    elif version != 0 and not known:
        what = f"written by another version (schema {version}, expected {SCHEMA_VERSION})"
        yield Finding("ledger_schema", "error", LEDGER, what, step="use the version that wrote it")
    elif not committed:
        step = "run `sisa train` with the run file again"
        what = "the first training was never committed"
        yield Finding("ledger_empty", "error", LEDGER, what, step=step)


def _on_server(directory: Path) -> Iterator[Finding]:
    """Find a ledger that can't be reached, is empty, damaged or of another version."""
    try:
        with open_ledger(directory) as ledger:
            committed = "config" in ledger.meta()
    except SisaError as error:
        kind = "ledger_unreadable" if isinstance(error, TransientError) else "ledger_damaged"
        yield Finding(kind, "error", error.where, summary_of(error), step=error.next_step)
        return
    if not committed:
        step, what = "run `sisa train` with the run file again", "the first training was never committed"
        yield Finding("ledger_empty", "error", LEDGER_URL, what, step=step)


def clock(directory: Path, now: datetime) -> Iterator[Finding]:
    """Find a clock that is behind the newest time in the ledger."""
    try:
        with open_ledger(directory) as ledger:
            newest = ledger.newest_time()
    except SisaError:
        return  # reported elsewhere
    try:
        ahead_s = (datetime.fromisoformat(newest) - now).total_seconds() if newest else 0.0
    except (ValueError, TypeError):
        return
    if ahead_s > CLOCK_TOLERANCE_S:
        what = f"the clock is {ahead_s:,.0f} s behind the newest event of the ledger ({newest})"
        step = "set the clock: due dates and the order of events depend on it"
        yield Finding("clock", "warning", "system clock", what, step=step)


def _opened(directory: Path) -> list[Finding]:
    """Return findings about the key, and those that need an open ledger."""
    try:
        with open_ledger(directory) as ledger:
            meta = ledger.meta()
    except SisaError as error:
        return [Finding("ledger_damaged", "error", LEDGER, error.what)]
    try:
        config = RunConfig.from_canonical(meta["config"])
        base, embedder = named(meta, "base"), named(meta, "embedder")
        model = model_id(meta)
    except (SisaError, ValueError, KeyError, TypeError):
        what = "the ledger's description of the model can't be parsed"
        return [Finding("ledger_meta", "error", LEDGER, what)]
    found, secret = _key(directory, config, model, meta.get("key", ""))
    resources, keyed = Resources(config, base, embedder), Keyed(secret or bytes(KEY_BYTES))
    opened = False
    try:
        with wiring.open_context(directory, resources, keyed, model, "serial", silent) as context:
            opened = True
            found += [*_witness(context), *_restrictions(context)]
            return found + examine(context, directory, with_key=secret is not None)
    except TransientError as error:
        return [
            *found,
            Finding("storage", "error", error.where, summary_of(error), step=error.next_step),
        ]
    except SisaError as error:
        if opened:
            return [*found, Finding("ledger_damaged", "error", LEDGER, error.what)]
        step = error.next_step
        return [*found, Finding("ledger_unreadable", "error", LEDGER, error.what, step=step)]


def _witness(context: Context) -> list[Finding]:
    """Find deletions and restrictions that the ledger lacks, or that it records differently."""
    where, own = context.stores.witness.location(), restrictions(context.stores.ledger)
    try:
        testimony = context.stores.witness.read()
        newer = testimony.restrictions.number - own.number
        if not is_behind(context):
            if not newer and testimony.restrictions != own:
                what = "restrictions are recorded differently than in the witness"
                return [Finding("ledger_damaged", "error", LEDGER, what)]
            known = {each.id_digest: each for each in context.stores.ledger.tombstones()}
            wrong = [k for k, each in testimony.tombstones.items() if known.get(k, each) != each]
            what = f"{len(wrong)} deletions are recorded differently than in the witness"
            return [Finding("ledger_damaged", "error", LEDGER, what)] if wrong else []
    except SisaError as error:
        return [Finding("witness", "error", where, error.what, step=error.next_step)]
    live = len(held_rows(context, unknown_deletions(context.stores.ledger, testimony)))
    what = f"the ledger is behind its witness: {live} deleted records are held again"
    what += ", and restrictions are not as they were" if newer > 0 else ""
    step = "any other command deletes and restricts them again"
    return [Finding("behind", "error", where, what, "sweep", step=step)]


def _restrictions(context: Context) -> Iterator[Finding]:
    """Find restrictions of subjects without held records."""
    ledger = context.stores.ledger
    if count := sum(not ledger.by_subject(each)[0] for each in restrictions(ledger).since):
        what = f"{count} restrictions are of subjects without records"
        step = "a rectification was cut short: run it again; or `sisa release` ends the restriction"
        yield Finding("restriction", "warning", LEDGER, what, step=step)


def _key(
    directory: Path, config: RunConfig, model: str, name: str
) -> tuple[list[Finding], bytes | None]:
    path = key_path(directory, config, model)
    try:
        secret = stored_secret(directory, config, model)
    except SisaError as error:
        return [Finding("key", "error", str(path), error.what)], None
    if name not in key_names(Keyed(secret)):
        return [Finding("key", "error", str(path), "the partition key is not this model's")], None
    if not path.is_file():
        right = "it belongs in the keyring of an encrypted model, else in the model directory"
        what = f"the partition key is in the wrong place: {right}"
        step = "the next train, add or forget moves it there"
        return [Finding("key_place", "warning", str(path), what, step=step)], secret
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if path != directory / PARTITION_KEY and mode & 0o077:
        what = f"others may read the partition key (mode {mode:o})"
        return [Finding("mode", "warning", str(path), what, step=f"chmod 600 {path}")], secret
    return [], secret
