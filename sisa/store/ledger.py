"""The ledger: SQLite through SQLAlchemy, the only authority on where records are.

Rules: one `commit` is one transaction with one sequence number. Rows hold keyed digests, places,
counts and digests of files; never an id, a subject or text. WAL keeps readers out of a writer's way;
`secure_delete` zeroes what is removed, and `scrub` empties the write-ahead log (SQLite reports a busy
log in a result row and does not raise: the flag is checked). All values are bound parameters.

Not covered: other databases; the writer lock (`files.writer_lock`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, OperationalError

from sisa.domain import (
    Head,
    HeldCheckpoint,
    IndexFile,
    RecordRow,
    Request,
    RequestEvent,
    SliceFile,
    Tombstone,
    WitnessHead,
)
from sisa.errors import Busy, EnvironmentFault, IntegrityError
from sisa.ports import Change
from sisa.requests import chained
from sisa.store.files import disk_errors
from sisa.store.schema import (
    CHECKPOINTS,
    EVENTS,
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
SIGNS_OF_DAMAGE = ("malformed", "corrupt", "no such table", "no such column")
_IN_CHUNK = 500  # SQLite's limit of bound parameters is far above, on every build

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
        except OperationalError as error:
            cause = str(error.orig)
            if any(
                sign in cause for sign in ("malformed", "corrupt", "no such table", "no such column")
            ):
                raise self._corrupt(cause) from error
            kind = Busy if "locked" in cause else EnvironmentFault
            raise kind(
                f"the ledger can't be used: {cause}",
                where=str(self._path),
                next_step="mend the disk or wait for the other process, then run the command again",
            ) from error
        except DatabaseError as error:
            raise self._corrupt(str(error.orig)) from error
        except UnicodeDecodeError as error:
            raise self._corrupt("text that is not UTF-8") from error

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
            yield connection

    def _all(self, kind: type[T], query: sa.Select[Any]) -> list[T]:
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        with self._reading() as connection:
            found = connection.execute(query)
            keys = list(found.keys())
            pick = itemgetter(*(keys.index(name) for name in names))
            rows = [pick(row) for row in found]
        for name, values in zip(names, zip(*rows, strict=True), strict=False):
            column = query.selected_columns[name]
            allowed = {column.type.python_type, *([type(None)] if column.nullable else [])}
            if not set(map(type, values)) <= allowed:
                raise self._corrupt(f"a value of another type in {column}")
        return [kind(*row) for row in rows]

    def seq(self) -> int:
        return int(self.meta().get("seq", "0"))

    def meta(self) -> dict[str, str]:
        with self._reading() as connection:
            return {row.key: row.value for row in connection.execute(sa.select(META))}

    def commit(self, change: Change) -> int:
        with self._guard(), self._engine.begin() as connection:
            row = connection.execute(sa.select(META.c.value).where(META.c.key == "seq")).scalar()
            seq = int(row or 0) + 1
            _apply(connection, change, seq)
            _upsert(connection, META, [{"key": "seq", "value": str(seq)}])
        return seq

    def scrub(self) -> None:
        deadline = time.monotonic() + SCRUB_PATIENCE_S
        while True:
            with self._reading() as connection:
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
        found: dict[str, RecordRow | Tombstone] = {}
        for chunk in _chunks(list(id_digests)):
            query = sa.select(TOMBSTONES).where(TOMBSTONES.c.id_digest.in_(chunk))
            found.update({each.id_digest: each for each in self._all(Tombstone, query)})
            query = sa.select(RECORDS).where(RECORDS.c.id_digest.in_(chunk))
            found.update({each.id_digest: each for each in self._all(RecordRow, query)})
        return found

    def by_subject(self, subject_digest: str) -> tuple[list[RecordRow], list[Tombstone]]:
        live = sa.select(RECORDS).where(RECORDS.c.subject_digest == subject_digest)
        dead = sa.select(TOMBSTONES).where(TOMBSTONES.c.subject_digest == subject_digest)
        return (
            self._all(RecordRow, live.order_by(RECORDS.c.id_digest)),
            self._all(Tombstone, dead.order_by(TOMBSTONES.c.id_digest)),
        )

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        found: dict[int, RecordRow] = {}
        for chunk in _chunks(list(vector_ids)):
            query = sa.select(RECORDS).where(RECORDS.c.shard == shard, RECORDS.c.vector_id.in_(chunk))
            found.update({each.vector_id: each for each in self._all(RecordRow, query)})
        return found

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        query = sa.select(RECORDS).where(RECORDS.c.shard == shard)
        if slice_ is not None:
            query = query.where(RECORDS.c.slice == slice_)
        return self._all(RecordRow, query.order_by(RECORDS.c.id_digest))

    def counts(self) -> dict[int, int]:
        query = sa.select(SLICES.c.shard, sa.func.sum(SLICES.c.num_records))
        with self._reading() as connection:
            found = connection.execute(query.group_by(SLICES.c.shard))
            return {int(shard): int(count) for shard, count in found}

    def kinds(self) -> dict[str, int]:
        query = sa.select(RECORDS.c.kind, sa.func.count()).group_by(RECORDS.c.kind)
        with self._reading() as connection:
            return {str(kind): int(count) for kind, count in connection.execute(query)}

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        query = sa.select(SLICES).order_by(SLICES.c.shard, SLICES.c.slice)
        return self._all(SliceFile, _of_shard(query, SLICES, shard))

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        query = sa.select(INDEXES).order_by(INDEXES.c.shard)
        return self._all(IndexFile, _of_shard(query, INDEXES, shard))

    def heads(self) -> list[Head]:
        return self._all(Head, sa.select(HEADS).order_by(HEADS.c.shard))

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        order = (CHECKPOINTS.c.shard, CHECKPOINTS.c.slice, CHECKPOINTS.c.key)
        query = sa.select(CHECKPOINTS).order_by(*order)
        return self._all(HeldCheckpoint, _of_shard(query, CHECKPOINTS, shard))

    def by_text(self, text_digests: Collection[str]) -> tuple[list[RecordRow], list[Tombstone]]:
        live: list[RecordRow] = []
        dead: list[Tombstone] = []
        for chunk in _chunks(sorted(text_digests)):
            held = sa.select(RECORDS).where(RECORDS.c.text_digest.in_(chunk))
            live += self._all(RecordRow, held)
            gone = sa.select(TOMBSTONES).where(TOMBSTONES.c.text_digest.in_(chunk))
            dead += self._all(Tombstone, gone)
        key = attrgetter("id_digest")
        return sorted(live, key=key), sorted(dead, key=key)

    def named_by(self, request_id: str) -> list[str]:
        query = sa.select(NAMED.c.id_digest).where(NAMED.c.request_id == request_id)
        with self._reading() as connection:
            return list(connection.execute(query.order_by(NAMED.c.id_digest)).scalars())

    def events(self) -> list[RequestEvent]:
        return self._all(RequestEvent, sa.select(EVENTS).order_by(EVENTS.c.position))

    def requests(self) -> list[Request]:
        query = sa.select(REQUESTS.c.body).order_by(REQUESTS.c.seq, REQUESTS.c.request_id)
        with self._reading() as connection:
            bodies = list(connection.execute(query).scalars())
        try:
            return [_request(json.loads(body)) for body in bodies]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt("a request that can't be read") from error

    def num_tombstones(self) -> int:
        with self._reading() as connection:
            query = sa.select(sa.func.count()).select_from(TOMBSTONES)
            return int(connection.execute(query).scalar_one())

    def tombstones(self) -> list[Tombstone]:
        return self._all(Tombstone, sa.select(TOMBSTONES).order_by(TOMBSTONES.c.id_digest))

    def event_head(self) -> WitnessHead:
        last = sa.select(EVENTS.c.link, EVENTS.c.position).order_by(EVENTS.c.position.desc()).limit(1)
        with self._reading() as connection:
            found = connection.execute(last).first()
        return WitnessHead("", 0) if found is None else WitnessHead(found.link, found.position)

    def has_event(self, link: str) -> bool:
        query = sa.select(EVENTS.c.position).where(EVENTS.c.link == link)
        with self._reading() as connection:
            return connection.execute(query).first() is not None


def _request(body: dict[str, Any]) -> Request:
    return Request(**{**body, "shards": tuple(tuple(each) for each in body["shards"])})


def _of_shard(query: sa.Select[Any], table: sa.Table, shard: int | None) -> sa.Select[Any]:
    return query if shard is None else query.where(table.c.shard == shard)


def _set_pragmas(connection: Any, _record: Any) -> None:
    # Pragmas belong to a connection, not to the file: they are set on every connect.
    for pragma in ("journal_mode=WAL", "secure_delete=ON", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), _IN_CHUNK):
        yield values[start : start + _IN_CHUNK]


def _upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        connection.execute(sa.insert(table).prefix_with("OR REPLACE"), rows)


def _remove(connection: sa.Connection, column: sa.Column[Any], values: Sequence[Any]) -> None:
    for chunk in _chunks(values):
        connection.execute(sa.delete(column.table).where(column.in_(chunk)))


def _apply(connection: sa.Connection, change: Change, seq: int) -> None:
    _remove(connection, RECORDS.c.id_digest, [each.id_digest for each in change.removed])
    _remove(connection, CHECKPOINTS.c.key, list(change.dropped))
    _remove(connection, INDEXES.c.shard, change.unindexed)
    _remove(connection, HEADS.c.shard, change.headless)
    for shard, slice_ in change.emptied:
        place = (SLICES.c.shard == shard, SLICES.c.slice == slice_)
        connection.execute(sa.delete(SLICES).where(*place))
    added = [{**asdict(row), "seq": seq} for row in change.added]
    if added:
        connection.execute(sa.insert(RECORDS), added)
    for table, values in (
        (TOMBSTONES, change.tombstones),
        (SLICES, change.slices),
        (INDEXES, change.indexes),
        (HEADS, change.heads),
        (CHECKPOINTS, change.checkpoints),
    ):
        _upsert(connection, table, [asdict(each) for each in values])
    _upsert(connection, META, [{"key": k, "value": v} for k, v in change.meta.items()])
    for request in change.requests:
        known = sa.select(REQUESTS.c.seq).where(REQUESTS.c.request_id == request.request_id)
        first = connection.execute(known).scalar()
        row = {
            "request_id": request.request_id,
            "seq": seq if first is None else first,
            "body": json.dumps(asdict(request), sort_keys=True),
        }
        _upsert(connection, REQUESTS, [row])
    named = [{"request_id": request, "id_digest": record} for request, record in change.named]
    _upsert(connection, NAMED, named)
    _append_events(connection, change.events)


def _append_events(connection: sa.Connection, events: Sequence[RequestEvent]) -> None:
    last = sa.select(EVENTS.c.link).order_by(EVENTS.c.position.desc()).limit(1)
    link = connection.execute(last).scalar() or ""
    for event in events:
        link = chained(link, event)
        connection.execute(sa.insert(EVENTS), [{**asdict(event), "link": link}])
