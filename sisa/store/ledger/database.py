"""Open the ledger's SQLite file, read checked rows from snapshots of it, and write in transactions.

WAL lets readers and a writer work at the same time. `secure_delete` zeroes what is removed, but not the
copies that balancing leaves in a page's unused part; after a deletion `scrub` therefore searches for
them and rewrites the file if it finds one. It also empties the write-ahead log (SQLite reports a busy
log in a result row and does not raise). A file that can't be written is opened for reading only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError
from sqlalchemy.util import LRUCache

from sisa.core.domain import RecordRow, parse_patch_job
from sisa.core.errors import Busy, EnvironmentFault, IntegrityError, SisaError
from sisa.store.blobs.files import disk_errors
from sisa.store.ledger import rows
from sisa.store.ledger.rows import SCHEMA_VERSION, UPGRADED, schema

SCRUB_PATIENCE_S = 10.0
FEW_ROWS = 4  # up to which removed rows are searched for; for more, rewriting the file is faster
PIECE_BYTES = 16
SCAN_BYTES = 1 << 22
PATIENCE_S = 10.0  # for SQLite's own locks, which are held briefly
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SURROUNDINGS = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT),
}

_T = TypeVar("_T")
_PARSED: dict[str, Callable[[Any], Any]] = {  # values of columns that a row holds in another form
    "prefix": lambda text: tuple(map(int, json.loads(text))),
    "patches": lambda text: tuple(json.loads(text)),
    "job": lambda text: parse_patch_job(json.loads(text)),
    "report": json.loads,
    "held": bool,
}


class _Statements(LRUCache[Any, Any]):
    """Statements that were compiled for any ledger of this process, without their values. A key begins
    with the dialect's object, which is another one in each engine, but always SQLite's."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[1:], value)


_STATEMENTS = _Statements(capacity=500)


class Database:
    """One SQLite file. With `create=False`, a missing file is an IntegrityError."""

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
        shared = {"execution_options": {"compiled_cache": _STATEMENTS}}
        if is_read_only(path):
            reading = {"creator": lambda: open_readonly(path), "poolclass": sa.QueuePool}
            self._engine = sa.create_engine("sqlite://", **reading, **shared)
        else:
            url = sa.URL.create("sqlite", database=str(path))
            self._engine = sa.create_engine(url, connect_args={"timeout": PATIENCE_S}, **shared)
            sa.event.listen(self._engine, "connect", _set_pragmas)
        self._snapshot: sa.Connection | None = None
        self._unscrubbed: set[str] = set()  # keys of identities that this object removed
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
        step = "restore it from a backup, or use the version that wrote it"
        if version in UPGRADED and is_read_only(self._path):
            step = "open it once where it can be written, for example with `sisa status`"
        elif version in UPGRADED:
            version = self._upgraded()
        if version != SCHEMA_VERSION:
            raise IntegrityError(
                "the ledger is empty or was written by another version",
                where=str(self._path),
                expected=f"schema {SCHEMA_VERSION}",
                got=f"schema {version}",
                next_step=step,
            )

    def _upgraded(self) -> int:
        """Add what an earlier version did not have, unless another process just did."""
        with self._guard(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            if connection.exec_driver_sql("PRAGMA user_version").scalar_one() in UPGRADED:
                schema.create_all(connection)
                rows.begin_counts(connection, upgraded=True)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.commit()
        return SCHEMA_VERSION

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, sqlite3.DatabaseError) as error:
            raise self._refused(getattr(error, "orig", error)) from error  # the bare cursor has no orig
        except UnicodeDecodeError as error:
            raise self._corrupt("text that is not UTF-8") from error
        except rows.Damaged as error:
            raise self._corrupt(str(error)) from error

    def _refused(self, error: Any) -> SisaError:
        """Return the typed error for SQLite's; an unknown error counts as damage."""
        return sqlite_fault(error, self._path) or self._corrupt(str(error))

    def _corrupt(self, cause: str) -> IntegrityError:
        return IntegrityError(
            "the ledger is damaged",
            where=str(self._path),
            got=cause,
            next_step="restore the model directory from a backup",
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._guard():
            if self._snapshot is not None:
                yield self._snapshot
                return
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")  # so that all comparisons use one snapshot
                yield connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._guard():
                connection = stack.enter_context(self._engine.connect())
                connection.exec_driver_sql("BEGIN")
            self._snapshot = connection
            stack.callback(setattr, self, "_snapshot", None)
            yield

    def _all(
        self,
        kind: type[_T],
        table: sa.Table,
        *order: Any,
        shard: int | None = None,
        slice_: int | None = None,
    ) -> list[_T]:
        """Return all rows of a table, a shard or a slice as objects."""
        with self._reading() as connection:
            return made(kind, table, rows.read_all(connection, table, shard, slice_, order))

    def scrub(self, removed: Collection[RecordRow] | None = ()) -> None:
        self._empty_log()  # works even if the disk is too full to rewrite the ledger
        gone = len(removed or ()) + len(self._unscrubbed)
        if removed is None or gone > FEW_ROWS or self._holds(removed):
            with self._guard(), self._engine.connect() as connection:
                alone = connection.execution_options(isolation_level="AUTOCOMMIT")
                alone.exec_driver_sql("VACUUM")
            self._empty_log()
        self._unscrubbed.clear()

    def _holds(self, removed: Collection[RecordRow]) -> bool:
        """Return whether any part of the file holds a row's piece: of its digest, or its vector's id."""
        wanted = [row.record_digest[:PIECE_BYTES].encode() for row in removed]
        wanted += [row.vector_id.to_bytes(8, "big")[2:] for row in removed]  # small ones take 6 bytes
        wanted += [key[:PIECE_BYTES].encode() for key in self._unscrubbed]
        if not wanted:
            return False
        self._engine.dispose()  # closing the file would end the locks that a connection has on it
        before = b""
        with disk_errors(self._path), self._path.open("rb") as file:
            while block := file.read(SCAN_BYTES):
                block = before + block
                if any(each in block for each in wanted):
                    return True
                before = block[-PIECE_BYTES:]
        return False

    def _empty_log(self) -> None:
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


def sqlite_fault(error: Any, path: Path) -> SisaError | None:
    """Return the typed error for a lock or the surroundings of a SQLite file; None for damage."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code not in _BUSY | _SURROUNDINGS:
        return None
    kind = Busy if code in _BUSY else EnvironmentFault
    return kind(
        f"the database can't be used: {error}",
        where=str(path),
        next_step="repair the disk or wait for the other process, then run the command again",
    )


def is_read_only(path: Path) -> bool:
    """Return whether this process can't write a file, or the files that SQLite puts beside it."""
    return not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open a SQLite file for reading only.

    Raise sqlite3.Error; reading from it may raise UnicodeDecodeError, too, when SQLite quotes a damaged
    schema.

    SQLite reads a file with a write-ahead log through files beside it. If these can't be written, a file
    without a log is opened as immutable; with one, the log is read through the index beside it.
    """
    log = path.with_name(f"{path.name}-wal")
    in_log = log.is_file() and log.stat().st_size > 0
    return _existing(path, "immutable=1" if is_read_only(path) and not in_log else "mode=ro")


def open_journaled(path: Path) -> sqlite3.Connection:
    """Open a SQLite file without a write-ahead log for reading.

    What a killed writer left in its journal is rolled back, if the file can be written.
    """
    return open_readonly(path) if is_read_only(path) else _existing(path, "mode=rw")


def _existing(path: Path, form: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?{form}"
    return sqlite3.connect(uri, uri=True, timeout=PATIENCE_S, check_same_thread=False)


def made(kind: type[_T], table: sa.Table, found: Sequence[tuple[Any, ...]]) -> list[_T]:
    """Return rows as objects of a dataclass, by the names of its fields. Raise Damaged."""
    columns = table.columns.keys()
    try:
        for at, parsed in ((at, _PARSED[name]) for at, name in enumerate(columns) if name in _PARSED):
            found = [(*row[:at], parsed(row[at]), *row[at + 1 :]) for row in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise rows.Damaged(f"a row of {table.name} that can't be read") from error
    pick = itemgetter(*(columns.index(each.name) for each in fields(kind)))  # type: ignore[arg-type]
    return [kind(*pick(row)) for row in found]


def having(
    connection: sa.Connection,
    kind: type[_T],
    column: sa.Column[Any],
    values: Sequence[Any],
    *,
    full_scan: bool = False,
) -> list[_T]:
    """Return rows with one of these values in a column, by its index; with `full_scan`, also without."""
    table: Any = column.table
    found = []
    for chunk in rows.chunks(values):
        found += made(kind, table, rows.read(connection, table, column.in_(chunk)))
    allowed = set(values)
    if any(getattr(each, column.name) not in allowed for each in found):
        raise rows.Damaged(f"an index of {table.name} that names another row")
    if full_scan:
        rows.check_hidden(connection, column, values, len(found))
    return found


def _set_pragmas(connection: Any, _record: Any) -> None:
    # Pragmas belong to a connection, not to the file: they are set on every connect.
    for pragma in ("journal_mode=WAL", "secure_delete=ON", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
