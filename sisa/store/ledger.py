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
    SliceFile,
    Tombstone,
)
from sisa.errors import Busy, EnvironmentFault, IntegrityError
from sisa.ports import Change
from sisa.store.files import disk_errors

SCHEMA_VERSION = 1
SCRUB_PATIENCE_S = 10.0
SIGNS_OF_DAMAGE = ("malformed", "corrupt", "no such table", "no such column")
_IN_CHUNK = 500  # SQLite's limit of bound parameters is far above, on every build

_schema = sa.MetaData()


def _text(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, **options)


def _integer(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, **options)


_meta = sa.Table("meta", _schema, _text("key", primary_key=True), _text("value", nullable=False))
_records = sa.Table(
    "records",
    _schema,
    _text("id_digest", primary_key=True),
    _text("subject_digest", index=True),
    _text("record_digest", nullable=False),
    _text("kind", nullable=False),
    _integer("shard", nullable=False),
    _integer("slice", nullable=False),
    _integer("vector_id", nullable=False),
    _integer("num_tokens", nullable=False),
    _integer("seq", nullable=False),
    sa.Index("records_by_place", "shard", "slice"),
    sa.UniqueConstraint("shard", "vector_id"),
)
_tombstones = sa.Table(
    "tombstones",
    _schema,
    _text("id_digest", primary_key=True),
    _text("subject_digest", index=True),
    _integer("shard", nullable=False),
    _integer("slice", nullable=False),
    _text("request_id", nullable=False),
    _text("deleted_at", nullable=False),
    _integer("checkpoints_erased", nullable=False),
)
_slices = sa.Table(
    "slices",
    _schema,
    _integer("shard", primary_key=True),
    _integer("slice", primary_key=True),
    _text("root", nullable=False),
    _integer("num_records", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
_indexes = sa.Table(
    "indexes",
    _schema,
    _integer("shard", primary_key=True),
    _text("root", nullable=False),
    _integer("num_vectors", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
_heads = sa.Table(
    "heads",
    _schema,
    _integer("shard", primary_key=True),
    _text("key"),
    _integer("depth", nullable=False),
    _text("target"),
)
_checkpoints = sa.Table(
    "checkpoints",
    _schema,
    _text("key", primary_key=True),
    _integer("shard", nullable=False, index=True),
    _integer("slice", nullable=False),
    _integer("seq", nullable=False),
    _text("fingerprint", nullable=False),
    _text("manifest_sha256", nullable=False),
    _text("adapter_sha256", nullable=False),
    _integer("num_bytes", nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    _integer("record_epochs", nullable=False),
)
_requests = sa.Table(
    "requests",
    _schema,
    _text("request_id", primary_key=True),
    _integer("seq", nullable=False),
    _text("state", nullable=False),
    _text("body", nullable=False),
)

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
                _schema.create_all(connection)
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
            return [
                kind(**{name: row[name] for name in names})
                for row in connection.execute(query).mappings()
            ]

    def seq(self) -> int:
        return int(self.meta().get("seq", "0"))

    def meta(self) -> dict[str, str]:
        with self._reading() as connection:
            return {row.key: row.value for row in connection.execute(sa.select(_meta))}

    def commit(self, change: Change) -> int:
        with self._guard(), self._engine.begin() as connection:
            row = connection.execute(sa.select(_meta.c.value).where(_meta.c.key == "seq")).scalar()
            seq = int(row or 0) + 1
            _apply(connection, change, seq)
            _upsert(connection, _meta, [{"key": "seq", "value": str(seq)}])
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
            query = sa.select(_tombstones).where(_tombstones.c.id_digest.in_(chunk))
            found.update({each.id_digest: each for each in self._all(Tombstone, query)})
            query = sa.select(_records).where(_records.c.id_digest.in_(chunk))
            found.update({each.id_digest: each for each in self._all(RecordRow, query)})
        return found

    def by_subject(self, subject_digest: str) -> tuple[list[RecordRow], list[Tombstone]]:
        live = sa.select(_records).where(_records.c.subject_digest == subject_digest)
        dead = sa.select(_tombstones).where(_tombstones.c.subject_digest == subject_digest)
        return (
            self._all(RecordRow, live.order_by(_records.c.id_digest)),
            self._all(Tombstone, dead.order_by(_tombstones.c.id_digest)),
        )

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        found: dict[int, RecordRow] = {}
        for chunk in _chunks(list(vector_ids)):
            query = sa.select(_records).where(_records.c.shard == shard, _records.c.vector_id.in_(chunk))
            found.update({each.vector_id: each for each in self._all(RecordRow, query)})
        return found

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        query = sa.select(_records).where(_records.c.shard == shard)
        if slice_ is not None:
            query = query.where(_records.c.slice == slice_)
        return self._all(RecordRow, query.order_by(_records.c.id_digest))

    def counts(self) -> dict[int, int]:
        query = sa.select(_slices.c.shard, sa.func.sum(_slices.c.num_records))
        with self._reading() as connection:
            found = connection.execute(query.group_by(_slices.c.shard))
            return {int(shard): int(count) for shard, count in found}

    def kinds(self) -> dict[str, int]:
        query = sa.select(_records.c.kind, sa.func.count()).group_by(_records.c.kind)
        with self._reading() as connection:
            return {str(kind): int(count) for kind, count in connection.execute(query)}

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        query = sa.select(_slices).order_by(_slices.c.shard, _slices.c.slice)
        return self._all(SliceFile, _of_shard(query, _slices, shard))

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        query = sa.select(_indexes).order_by(_indexes.c.shard)
        return self._all(IndexFile, _of_shard(query, _indexes, shard))

    def heads(self) -> list[Head]:
        return self._all(Head, sa.select(_heads).order_by(_heads.c.shard))

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        order = (_checkpoints.c.shard, _checkpoints.c.slice, _checkpoints.c.key)
        query = sa.select(_checkpoints).order_by(*order)
        return self._all(HeldCheckpoint, _of_shard(query, _checkpoints, shard))

    def requests(self) -> list[Request]:
        query = sa.select(_requests.c.body).order_by(_requests.c.seq)
        with self._reading() as connection:
            bodies = [json.loads(body) for body in connection.execute(query).scalars()]
        for body in bodies:
            body["shards"] = tuple(tuple(each) for each in body["shards"])
        return [Request(**body) for body in bodies]

    def num_tombstones(self) -> int:
        with self._reading() as connection:
            query = sa.select(sa.func.count()).select_from(_tombstones)
            return int(connection.execute(query).scalar_one())


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
    _remove(connection, _records.c.id_digest, [each.id_digest for each in change.removed])
    _remove(connection, _checkpoints.c.key, list(change.dropped))
    _remove(connection, _indexes.c.shard, change.unindexed)
    _remove(connection, _heads.c.shard, change.headless)
    for shard, slice_ in change.emptied:
        place = (_slices.c.shard == shard, _slices.c.slice == slice_)
        connection.execute(sa.delete(_slices).where(*place))
    added = [{**asdict(row), "seq": seq} for row in change.added]
    if added:
        connection.execute(sa.insert(_records), added)
    for table, values in (
        (_tombstones, change.tombstones),
        (_slices, change.slices),
        (_indexes, change.indexes),
        (_heads, change.heads),
        (_checkpoints, change.checkpoints),
    ):
        _upsert(connection, table, [asdict(each) for each in values])
    _upsert(connection, _meta, [{"key": k, "value": v} for k, v in change.meta.items()])
    if change.request is not None:
        request = change.request
        known = sa.select(_requests.c.seq).where(_requests.c.request_id == request.request_id)
        first = connection.execute(known).scalar()
        row = {
            "request_id": request.request_id,
            "seq": seq if first is None else first,
            "state": request.state,
            "body": json.dumps(asdict(request), sort_keys=True),
        }
        _upsert(connection, _requests, [row])
