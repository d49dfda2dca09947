"""Keep MODEL/evidence.sqlite, which holds what evidence needs beside the ledger.

    drafts        what can't be named any more, by request, until its certificate is logged
    commitments   sorted commitments to a request's records, from which receipts are made
    given         files handed to people, and not stated yet: the sha256 of each, and numbers
    signed        the statement that is signed and not yet logged
    logged        what the log's statements are about: a copy, made again from the log if it is lost
    adapters      those that were held and are not revoked: which slices, as of which commit

`membership.py` keeps the tree of records in the same file. It holds keyed digests and labels of a
verifiable random function, never an id. One transaction at a time: a crash leaves the state before it.
`secure_delete` zeroes what is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json, digest_of, sha256_hex
from sisa.core.domain import ANY_SHARD, Export, HeldCheckpoint
from sisa.core.errors import IntegrityError
from sisa.evidence import statements
from sisa.evidence.log.log import Log, statement_in
from sisa.evidence.statements import ACCESS, APPROX_REPORT, RESTRICTION, Draft
from sisa.store.blobs.files import disk_errors
from sisa.store.blobs.sqlite_files import database_in_use, open_journaled, sqlite_fault
from sisa.store.ledger.backend import PATIENCE_S
from sisa.verifier.certificate import CERTIFICATES, CHAINED
from sisa.verifier.envelope import Refused

_SCHEMA = """
CREATE TABLE IF NOT EXISTS drafts (request TEXT PRIMARY KEY, draft TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS commitments (request TEXT PRIMARY KEY, hashes BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS given (sha256 TEXT PRIMARY KEY, predicate TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS signed (sequence INTEGER, kind TEXT, envelope BLOB) STRICT;
CREATE TABLE IF NOT EXISTS logged (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, sha256 TEXT NOT NULL, about TEXT NOT NULL,
    before TEXT NOT NULL, after TEXT NOT NULL, subject TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS adapters (
    sha256 TEXT PRIMARY KEY, shard INTEGER NOT NULL, prefix TEXT NOT NULL, seq INTEGER NOT NULL,
    anew TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS adapters_of_shard ON adapters (shard);
"""
VERSION = 1
NEXT_STEP = "build it again from the slice files: `sisa doctor --repair`"


def damaged_database(path: Path, got: str) -> IntegrityError:
    """Return the error for a file that is not as it was written."""
    return IntegrityError("the evidence is damaged", where=str(path), got=got, next_step=NEXT_STEP)


@contextlib.contextmanager
def transaction(
    path: Path,
    schema: str,
    *,
    write: bool = True,
    damaged: Callable[[Path, str], IntegrityError] = damaged_database,
) -> Iterator[sqlite3.Connection]:
    """Run a block in one transaction, on tables that `schema` creates where they are missing.

    Raise IntegrityError (that of `damaged`) for a damaged file or one of another version, and if there
    is none to read; Busy and EnvironmentFault for the surroundings.
    """
    try:
        with database_in_use(path), contextlib.closing(_connected(path, write)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if write and version == 0:
                connection.execute(f"PRAGMA user_version = {VERSION}")
                version = VERSION
            if version != VERSION:
                raise damaged(path, f"schema {version}, not {VERSION}")
            if write:
                connection.executescript(schema)
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        # SQLite's own words are kept; Python's, of text that it can't decode, quote the cell.
        got = str(error) if getattr(error, "sqlite_errorname", None) else "text that is not UTF-8"
        raise sqlite_fault(error, path) or damaged(path, got) from error
    except UnicodeDecodeError as error:
        raise damaged(path, "text that is not UTF-8") from error


def _connected(path: Path, write: bool) -> sqlite3.Connection:
    if not write:
        if not path.is_file():
            raise IntegrityError("the model has no evidence", where=str(path), next_step=NEXT_STEP)
        return open_journaled(path)
    if not path.exists():  # closing it ends locks that this process has on it
        with disk_errors(path):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)
    for pragma in ("secure_delete=ON", "synchronous=FULL", "cache_size=-65536"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


@dataclass(frozen=True)
class Logged:
    """A statement in the log: its entry, its type, its sha256, and what it is about."""

    sequence: int
    kind: str
    sha256: str
    about: str = ""  # request id, the patch's key, or the sha256 of a file that was handed out
    before: str = ""  # root of the tree of records with which the statement before ended
    after: str = ""  # root of the tree of records now
    subject: str = ""  # digest of what was served; of a restriction, of what it says


class EvidenceTables:
    """The tables of one model's evidence, beside its tree of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _tables(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return transaction(self.path, _SCHEMA)

    def put_drafts(self, drafts: Sequence[Draft]) -> None:
        """Note drafts and their commitments, in place of earlier ones of the same requests.

        The commitments of a certificate stay: of a restored backup, a draft may name fewer records.
        """
        with self._tables() as db:
            for each in drafts:
                request, hashes = each.request_id, bytes.fromhex("".join(each.commitments))
                text = canonical_json({**asdict(each), "commitments": []}).decode()
                db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?)", (request, text))
                if not db.execute("SELECT 1 FROM logged WHERE about = ?", (request,)).fetchone():
                    db.execute("INSERT OR REPLACE INTO commitments VALUES (?, ?)", (request, hashes))

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query, without creating the tables; none if there are no tables."""
        if not self.path.is_file():
            return []
        with transaction(self.path, "", write=False) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'drafts'").fetchone():
                return []
            return db.execute(query, values).fetchall()

    def is_certified(self, request_id: str) -> bool:
        """Return whether a certificate of a request was noted as logged; nothing is written."""
        found = self._read("SELECT kind FROM logged WHERE about = ?", request_id)
        return any(kind in CERTIFICATES for (kind,) in found)

    def drafts(self) -> dict[str, Draft]:
        """Return the drafts by request; nothing is written."""
        rows = self._read("SELECT request, draft, hashes FROM drafts JOIN commitments USING (request)")
        drafts = {}
        for request, text, hashes in rows:
            parsed = json.loads(text)
            listed = (tuple(parsed[name]) for name in ("erased", "touched", "revokes"))
            drafts[request] = Draft(request, _split(hashes), *listed)
        return drafts

    def commitments(self, request_id: str) -> tuple[str, ...]:
        """Return the commitments of a request, sorted; none if it has none."""
        with self._tables() as db:
            query = "SELECT hashes FROM commitments WHERE request = ?"
            found = db.execute(query, (request_id,)).fetchone()
        return _split(found[0]) if found else ()

    def drop_drafts(self, requests: Sequence[str], *, commitments: bool) -> None:
        """Drop the drafts of requests, and their commitments if no certificate names them."""
        named = [(each,) for each in requests]
        with self._tables() as db:
            db.executemany("DELETE FROM drafts WHERE request = ?", named)
            if commitments:
                db.executemany("DELETE FROM commitments WHERE request = ?", named)

    def note_adapters(self, held: Iterable[HeldCheckpoint], seq: int, anew: str) -> None:
        """Note adapters that are held.

        Those that were noted before the model was trained `anew` as a whole may have seen any record of
        the ledger at commit `seq`.
        """
        with self._tables() as db:
            db.execute(
                "UPDATE adapters SET shard = ?, prefix = '[]', seq = ?, anew = ? WHERE anew != ?",
                (ANY_SHARD, seq, anew, anew),
            )
            db.executemany(
                "INSERT INTO adapters VALUES (?, ?, ?, ?, ?) ON CONFLICT (sha256) DO UPDATE "
                "SET (shard, prefix, seq) = (excluded.shard, excluded.prefix, excluded.seq) "
                "WHERE seq != excluded.seq",
                [(e.adapter_sha256, e.shard, json.dumps(e.prefix), e.seq, anew) for e in held],
            )

    def adapters(self, shards: Collection[int], seq: int, anew: str) -> list[Export]:
        """Return the adapters of shards that were ever held and are not revoked, as exports."""
        with self._tables() as db:
            rows = db.execute(
                "SELECT sha256, shard, prefix, seq, anew FROM adapters "
                "WHERE anew != ? OR shard IN (SELECT value FROM json_each(?))",
                (anew, json.dumps([ANY_SHARD, *shards])),
            )
            return [
                _as_export(sha256, noted_seq, shard, json.loads(prefix))
                if noted_anew == anew
                else _as_export(sha256, seq, ANY_SHARD, [])
                for sha256, shard, prefix, noted_seq, noted_anew in rows
            ]

    def drop_adapters(self, revoked: Iterable[str]) -> None:
        """Drop adapters that a certificate in the log revokes."""
        with self._tables() as db:
            db.executemany("DELETE FROM adapters WHERE sha256 = ?", [(each,) for each in revoked])

    def put_given(self, sha256: str, predicate: Mapping[str, Any]) -> None:
        """Note a file that was handed to a person; the next `issue` states it."""
        with self._tables() as db:
            text = canonical_json(dict(predicate)).decode()
            db.execute("INSERT OR REPLACE INTO given VALUES (?, ?)", (sha256, text))

    def given(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the files that were handed out and not stated yet, each with its predicate."""
        with self._tables() as db:
            rows = db.execute("SELECT sha256, predicate FROM given ORDER BY rowid").fetchall()
        return [(sha256, json.loads(text)) for sha256, text in rows]

    def put_signed(self, sequence: int, kind: str, envelope: bytes) -> None:
        """Note a signed statement that is to be logged as this entry."""
        with self._tables() as db:
            db.execute("DELETE FROM signed")
            db.execute("INSERT INTO signed VALUES (?, ?, ?)", (sequence, kind, envelope))

    def signed(self) -> tuple[int, str, bytes] | None:
        """Return the statement that is signed and not yet known to be logged."""
        with self._tables() as db:
            found = db.execute("SELECT sequence, kind, envelope FROM signed").fetchone()
        return found and (found[0], found[1], bytes(found[2]))

    def put_logged(self, found: Logged) -> None:
        """Note a statement that is in the log; drop what was signed for this entry or an earlier one."""
        with self._tables() as db:
            values = tuple(asdict(found).values())
            db.execute("INSERT OR REPLACE INTO logged VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            db.execute("DELETE FROM given WHERE sha256 = ?", (found.about,))
            db.execute("DELETE FROM signed WHERE sequence <= ?", (found.sequence,))

    def drop_logged(self) -> None:
        """Drop what was noted of a log that has ended: evidence begins anew with another one."""
        if self.path.is_file():
            with self._tables() as db:
                db.execute("DELETE FROM logged")
                db.execute("DELETE FROM signed")

    def logged(self, log: Log) -> list[Logged]:
        """Return what the statements of the log are about, in order; note those that are new."""
        with self._tables() as db:
            noted = [Logged(*row) for row in db.execute("SELECT * FROM logged ORDER BY sequence")]
        for each in log.entries(len(noted)):
            found = parse_logged(each.index, each.predicate_type, log.statement(each.sha256))
            self.put_logged(found)
            noted.append(found)
        return noted


def _as_export(sha256: str, seq: int, shard: int, prefix: Sequence[int]) -> Export:
    return Export("", shard, tuple(prefix), seq, key="", adapter_sha256=sha256, made_at="")


def _split(hashes: bytes) -> tuple[str, ...]:
    return tuple(hashes[at : at + 32].hex() for at in range(0, len(hashes), 32))


def parse_logged(sequence: int, kind: str, envelope: bytes) -> Logged:
    """Return what a logged statement is about; only statements that the hook makes are parsed."""
    found = Logged(sequence, kind, sha256_hex(envelope))
    if kind not in (*CHAINED, APPROX_REPORT, ACCESS, RESTRICTION):
        return found
    try:
        statement = statement_in(envelope)
        statements.check_facts(kind, statement["predicate"], "the statement")
    except Refused as error:
        raise IntegrityError(
            "a statement of the log is of another form",
            where=f"entry {sequence}, {found.sha256}",
            got=error.what,
            next_step="`sisa log check` checks the log; restore it from where it is published",
        ) from None
    predicate = statement["predicate"]
    if kind == APPROX_REPORT:
        return replace(found, about=predicate["patch"]["key"])
    if kind == ACCESS:
        return replace(found, about=statement["subject"][0]["digest"]["sha256"])
    if kind == RESTRICTION:
        return replace(found, subject=statements.restriction_digest(predicate))
    roots, served = predicate["membership"], digest_of(statement["subject"])
    name = predicate["request"]["id"] if kind in CERTIFICATES else ""
    return replace(found, about=name, before=roots["before"], after=roots["after"], subject=served)
