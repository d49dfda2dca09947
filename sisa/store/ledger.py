"""The ledger: SQLite through SQLAlchemy, the only authority on where records are.

Rules: one `commit` is one transaction with one sequence number. Rows hold keyed digests, places,
counts and digests of files; never an id, a subject or text. WAL keeps readers out of a writer's way;
`secure_delete` zeroes what is removed, and `scrub` empties the write-ahead log (SQLite reports a busy
log in a result row and does not raise: the flag is checked). All values are bound parameters. Every
question is answered out of one snapshot, from checked rows, and compared with the number of rows that
there should be (`rows.py`); that something is not there is confirmed without an index.

Not covered: other databases; the writer lock (`files.writer_lock`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from sisa.domain import (
    Export,
    Head,
    HeldCheckpoint,
    IndexFile,
    Probed,
    RecordRow,
    Request,
    RequestEvent,
    SliceFile,
    Tombstone,
    WitnessHead,
)
from sisa.errors import Busy, EnvironmentFault, IntegrityError, SisaError
from sisa.ports import Change
from sisa.store import changes, rows
from sisa.store.files import disk_errors
from sisa.store.schema import (
    CHECKPOINTS,
    EVENTS,
    EXPORTS,
    HEADS,
    INDEXES,
    META,
    NAMED,
    RECORDS,
    REQUESTS,
    SCHEMA_VERSION,
    SLICES,
    TOMBSTONES,
    schema,
)

SCRUB_PATIENCE_S = 10.0
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SURROUNDINGS = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT),
}

T = TypeVar("T")


class SqlLedger:
    """A Ledger in one SQLite file. `create=False` refuses a file that is not there."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path = path
        if create:
            # SQLite gives this mode to the write-ahead log and the shared memory beside it, too.
            with disk_errors(path):
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        elif not path.exists():
            raise IntegrityError("the ledger is missing", where=str(path))
        elif path.is_file() and path.stat().st_size == 0:
            raise self._corrupt("an empty file")  # SQLite would write a header into it
        url = sa.URL.create("sqlite", database=str(path))
        self._engine = sa.create_engine(url, connect_args={"timeout": 10.0})
        sa.event.listen(self._engine, "connect", _set_pragmas)
        try:
            self._open(create)
        except BaseException:
            self.close()
            raise

    def _open(self, create: bool) -> None:
        with self._guard(), self._engine.begin() as connection:
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            if create and version == 0:
                schema.create_all(connection)
                rows.begin_counts(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
                version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise IntegrityError(
                "the ledger is empty or was written by another version",
                where=str(self._path),
                expected=f"schema {SCHEMA_VERSION}",
                got=f"schema {version}",
                next_step="restore it from a backup, or use the version that wrote it",
            )

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, sqlite3.DatabaseError) as error:
            raise self._refused(getattr(error, "orig", error)) from error  # of the bare cursor, too
        except UnicodeDecodeError as error:
            raise self._corrupt("text that is not UTF-8") from error
        except rows.Damaged as error:
            raise self._corrupt(str(error)) from error

    def _refused(self, error: Any) -> SisaError:
        """What SQLite's error means; one that is not known to be of the surroundings is damage."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code not in _BUSY | _SURROUNDINGS:
            return self._corrupt(str(error))
        kind = Busy if code in _BUSY else EnvironmentFault
        return kind(
            f"the ledger can't be used: {error}",
            where=str(self._path),
            next_step="mend the disk or wait for the other process, then run the command again",
        )

    def _corrupt(self, cause: str) -> IntegrityError:
        return IntegrityError(
            "the ledger is damaged",
            where=str(self._path),
            got=cause,
            next_step="restore the model directory from a backup",
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._guard(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")  # all that is compared is of one snapshot
            yield connection

    def _some(self, kind: type[T], table: sa.Table, *where: Any, order: Sequence[Any] = ()) -> list[T]:
        with self._reading() as connection:
            return _made(kind, table, rows.read(connection, table, *where, order=order))

    def _whole(self, kind: type[T], table: sa.Table, shard: int | None, *order: Any) -> list[T]:
        """All rows of a table, or a shard's."""
        where = [] if shard is None else [table.c.shard == shard]
        with self._reading() as connection:
            found = rows.read(connection, table, *where, order=order)
            if shard is None:
                expected = rows.expected_rows(connection, table)
            else:
                expected = rows.expected_places(connection, table, shard)
            rows.refuse_loss(table, expected, len(found))
        return _made(kind, table, found)

    def seq(self) -> int:
        return int(self.meta().get(changes.SEQ, "0"))

    def meta(self) -> dict[str, str]:
        with self._reading() as connection:
            found = rows.read(connection, META)
            rows.refuse_loss(META, rows.expected_rows(connection, META), len(found))
        return {key: value for key, value, _ in found}

    def commit(self, change: Change) -> int:
        with self._guard(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            seq = changes.apply(connection, change)
            connection.commit()
        return seq

    def scrub(self) -> None:
        deadline = time.monotonic() + SCRUB_PATIENCE_S
        while True:
            with self._guard(), self._engine.connect() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            if not busy:
                return
            if time.monotonic() > deadline:
                raise Busy(
                    "a reader keeps the ledger's write-ahead log open",
                    where=str(self._path),
                    next_step="end the process that reads this model, then run the command again",
                )
            time.sleep(0.1)

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        asked = list(dict.fromkeys(id_digests))
        with self._reading() as connection:
            live = _having(connection, RecordRow, RECORDS.c.id_digest, asked)
            found: dict[str, RecordRow | Tombstone] = {each.id_digest: each for each in live}
            asked = [each for each in asked if each not in found]
            rows.refuse_hidden(connection, RECORDS.c.id_digest, asked, 0)
            dead = _having(connection, Tombstone, TOMBSTONES.c.id_digest, asked)
            found |= {each.id_digest: each for each in dead}
            asked = [each for each in asked if each not in found]
            rows.refuse_hidden(connection, TOMBSTONES.c.id_digest, asked, 0)
        return found

    def by_subject(self, subject_digest: str, shard: int) -> tuple[list[RecordRow], list[Tombstone]]:
        held, gone, asked = RECORDS.c.subject_digest, TOMBSTONES.c.subject_digest, [subject_digest]
        with self._reading() as connection:
            live = _having(connection, RecordRow, held, asked)
            rows.refuse_hidden(connection, held, asked, len(live), shard=shard)
            dead = _having(connection, Tombstone, gone, asked, sure=True)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        found: dict[int, RecordRow] = {}
        for chunk in rows.chunks(list(vector_ids)):
            here = (RECORDS.c.shard == shard, RECORDS.c.vector_id.in_(chunk))
            found.update({each.vector_id: each for each in self._some(RecordRow, RECORDS, *here)})
        missing = set(vector_ids) - found.keys()
        if missing and any(row.vector_id in missing for row in self.rows(shard)):
            raise self._corrupt("a record that is not found by its vector")
        return found

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        where = [RECORDS.c.shard == shard]
        where += [] if slice_ is None else [RECORDS.c.slice == slice_]
        with self._reading() as connection:
            found = rows.read(connection, RECORDS, *where, order=[RECORDS.c.id_digest])
            expected = rows.expected_places(connection, RECORDS, shard, slice_)
            rows.refuse_loss(RECORDS, expected, len(found))
        return _made(RecordRow, RECORDS, found)

    def counts(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for file in self.slices():
            found[file.shard] = found.get(file.shard, 0) + file.num_records
        return found

    def kinds(self) -> dict[str, int]:
        with self._reading() as connection:
            return {kind: count for kind, count in rows.expected_kinds(connection).items() if count}

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        return self._whole(SliceFile, SLICES, shard, SLICES.c.shard, SLICES.c.slice)

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        return self._whole(IndexFile, INDEXES, shard, INDEXES.c.shard)

    def heads(self) -> list[Head]:
        return self._whole(Head, HEADS, None, HEADS.c.shard)

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        order = (CHECKPOINTS.c.shard, CHECKPOINTS.c.slice, CHECKPOINTS.c.key)
        return self._whole(HeldCheckpoint, CHECKPOINTS, shard, *order)

    def by_text(
        self, text_digests: Collection[str], *, sure: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        asked = sorted(text_digests)
        with self._reading() as connection:
            live = _having(connection, RecordRow, RECORDS.c.text_digest, asked, sure=sure)
            dead = _having(connection, Tombstone, TOMBSTONES.c.text_digest, asked, sure=sure)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def named_by(self, request_id: str) -> list[str]:
        with self._reading() as connection:
            found = rows.read(connection, NAMED, NAMED.c.request_id == request_id)
            request = rows.read(connection, REQUESTS, REQUESTS.c.request_id == request_id)
            for _, _, num_named, _, _ in request:
                rows.refuse_loss(NAMED, num_named, len(found))
        return sorted(id_digest for _, id_digest, _ in found)

    def events(self) -> list[RequestEvent]:
        return self._whole(RequestEvent, EVENTS, None, EVENTS.c.position)

    def exports(self) -> list[Export]:
        return self._whole(Export, EXPORTS, None, EXPORTS.c.path, EXPORTS.c.key)

    def requests(self) -> list[Request]:
        order = (REQUESTS.c.seq, REQUESTS.c.request_id)
        with self._reading() as connection:
            found = rows.read(connection, REQUESTS, order=order)
            rows.refuse_loss(REQUESTS, rows.expected_rows(connection, REQUESTS), len(found))
        try:
            return [_request(json.loads(body)) for _, _, _, body, _ in found]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt("a request that can't be read") from error

    def num_tombstones(self) -> int:
        with self._reading() as connection:
            found = rows.actual_rows(connection, TOMBSTONES)
            rows.refuse_loss(TOMBSTONES, rows.expected_rows(connection, TOMBSTONES), found)
        return found

    def tombstones(self) -> list[Tombstone]:
        return self._whole(Tombstone, TOMBSTONES, None, TOMBSTONES.c.id_digest)

    def event_head(self) -> WitnessHead:
        latest = sa.select(sa.func.max(EVENTS.c.position)).scalar_subquery()
        with self._reading() as connection:
            found = rows.read(connection, EVENTS, EVENTS.c.position == latest)
            position, link = (found[0][0], found[0][-2]) if found else (0, "")
            rows.refuse_loss(EVENTS, rows.expected_rows(connection, EVENTS), position)
        return WitnessHead(link, position)

    def has_event(self, link: str) -> bool:
        with self._reading() as connection:
            return bool(rows.read(connection, EVENTS, EVENTS.c.link == link))

    def lost(self) -> list[str]:
        with self._reading() as connection:
            return rows.lost_rows(connection)


_BY_ID = attrgetter("id_digest")


def _request(body: dict[str, Any]) -> Request:
    shards = tuple(tuple(each) for each in body["shards"])
    probed = body.get("probed")
    return Request(**{**body, "shards": shards, "probed": Probed(**probed) if probed else None})


def _made(kind: type[T], table: sa.Table, found: Sequence[tuple[Any, ...]]) -> list[T]:
    columns = table.columns.keys()
    pick = itemgetter(*(columns.index(each.name) for each in fields(kind)))  # type: ignore[arg-type]
    return [kind(*pick(row)) for row in found]


def _having(
    connection: sa.Connection,
    kind: type[T],
    column: sa.Column[Any],
    values: Sequence[Any],
    *,
    sure: bool = False,
) -> list[T]:
    """Rows with one of these values in a column, by its index; `sure`: also looked for without it."""
    table: Any = column.table
    found = []
    for chunk in rows.chunks(values):
        found += _made(kind, table, rows.read(connection, table, column.in_(chunk)))
    allowed = set(values)
    if any(getattr(each, column.name) not in allowed for each in found):
        raise rows.Damaged(f"an index of {table.name} that names another row")
    if sure:
        rows.refuse_hidden(connection, column, values, len(found))
    return found


def _set_pragmas(connection: Any, _record: Any) -> None:
    # Pragmas belong to a connection, not to the file: they are set on every connect.
    for pragma in ("journal_mode=WAL", "secure_delete=ON", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
