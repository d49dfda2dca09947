"""Open the ledger's database, read checked rows from snapshots of it, and write in transactions.

A ledger is one SQLite file, or the tables of one PostgreSQL schema (`postgres.py`, imported when it is
needed). Each is a `Backend`; everything above is the same for both.

SQLite: WAL lets readers and a writer work at the same time. `secure_delete` zeroes what is removed, but
not the copies that balancing leaves in a page's unused part; after a deletion `scrub` therefore searches
for them and rewrites the file if it finds one. It also empties the write-ahead log (SQLite reports a
busy log in a result row and does not raise). A file that can't be written is opened for reading only.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     database = Database(Path(folder) / "ledger.sqlite", create=True)
...     with database.watch() as wait:
...         woken = wait(0.0)
...     database.close()
...     woken, database.read_only
(False, False)
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError
from sqlalchemy.util import LRUCache

from sisa.core.domain import RecordRow, parse_patch_job
from sisa.core.errors import Busy, EnvironmentFault, IntegrityError, SisaError
from sisa.store.blobs.files import (
    database_in_use,
    disk_errors,
    num_bytes,
    read_beside,
    writer_lock,
)
from sisa.store.ledger import rows
from sisa.store.ledger.rows import SCHEMA_VERSION, UPGRADED, schema

COMMIT_LOCK = "commit.lock"  # beside the file: who commits, decides about what was read, or both
SCRUB_PATIENCE_S = 10.0
FEW_ROWS = 4  # up to which removed rows are searched for; for more, rewriting the file is faster
PIECE_BYTES = 16
SCAN_BYTES = 1 << 22
WATCH_POLL_S = 0.05  # a question takes microseconds
PATIENCE_S = 10.0  # for SQLite's own locks, which are held briefly
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SURROUNDINGS = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT),
}

_T = TypeVar("_T")
Watch = Callable[[float], bool]  # wait so many seconds; return early, and True, after a commit
_PARSED: dict[str, Callable[[Any], Any]] = {  # values of columns that a row holds in another form
    "prefix": lambda text: tuple(map(int, json.loads(text))),
    "patches": lambda text: tuple(json.loads(text)),
    "job": lambda text: parse_patch_job(json.loads(text)),
    "report": json.loads,
    "held": bool,
}


class Statements(LRUCache[Any, Any]):
    """Statements that were compiled for any ledger of one kind in this process, without their values.

    A key begins with the dialect's object, which is another one in each engine.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[1:], value)


_STATEMENTS = Statements(capacity=500)


class Backend(Protocol):
    """What one kind of database does in its own way."""

    where: str  # for messages, without a password
    engine: sa.Engine
    errors: tuple[type[Exception], ...]  # of the driver, also as SQLAlchemy wraps them
    upgrades: bool  # whether opening brings up an older schema
    upgrade_step: str  # what does so otherwise

    @property
    def read_only(self) -> bool:
        """Return whether nothing can be committed here."""

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """Provide a connection whose queries all see one state."""

    def writing(self, num_rows: int = 0, /) -> AbstractContextManager[sa.Connection]:
        """Provide the connection of the only writer; commit when the block ends without an error.

        `num_rows` is about how many rows it adds.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the lock of all who commit. Raise Busy."""

    def close(self) -> None:
        """Close all connections."""

    def version(self, connection: sa.Connection) -> int:
        """Return the version of the schema; 0 without one."""

    def create(self, connection: sa.Connection) -> None:
        """Create the tables of the present schema."""

    def upgrade(self, connection: sa.Connection, version: int) -> None:
        """Bring up the tables of an older schema."""

    def stamp(self, connection: sa.Connection, version: int) -> None:
        """Write the version of the schema."""

    def watch(self) -> AbstractContextManager[Watch]:
        """Provide a function that waits for another's commit."""

    def fault(self, error: Any) -> SisaError | None:
        """Return the typed error for a lock or the surroundings; None for damage."""

    def num_bytes(self) -> int:
        """Return the size of everything stored."""

    def scrub(self, removed: Collection[RecordRow] | None, keys: Collection[str]) -> None:
        """See `Ledger.scrub`; `keys` are those of removed identities."""

    def erase(self) -> None:
        """Remove all tables."""


def backend_at(place: Path | str, *, create: bool = False) -> Backend:
    """Return the backend of a SQLite file, by its path, or of a PostgreSQL schema, by its URL."""
    if isinstance(place, Path):
        return Sqlite(place, create=create)
    from sisa.store.ledger.postgres import Postgres

    return Postgres(place)


@contextlib.contextmanager
def typed_errors(backend: Backend) -> Iterator[None]:
    """Turn the driver's errors, and damage, into typed errors."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise damaged_ledger(backend.where, "text that is not UTF-8") from error
    except rows.Damaged as error:
        raise damaged_ledger(backend.where, str(error)) from error
    except backend.errors as error:
        cause = getattr(error, "orig", None) or error  # the bare cursor's errors have no orig
        raise backend.fault(cause) or damaged_ledger(backend.where, message_of(cause)) from error


class Database:
    """A ledger's database. With `create=False`, a missing one is an IntegrityError."""

    def __init__(self, place: Path | str, *, create: bool = False) -> None:
        """Open a SQLite file by its path, or a PostgreSQL schema by its URL."""
        self.backend = backend_at(place, create=create)
        self._snapshot: sa.Connection | None = None
        self.unscrubbed: set[str] = set()  # keys of identities that this object removed
        self._alone, self._is_exclusive = threading.RLock(), False  # of `exclusive`
        try:
            self._open(create)
        except BaseException:
            self.close()
            raise

    def _open(self, create: bool) -> None:
        backend = self.backend
        with self._guard():
            with backend.reading() as connection:
                version = backend.version(connection)
            if (create and version == 0) or (backend.upgrades and version in UPGRADED):
                _create_or_upgrade(backend)
                version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise IntegrityError(
                "the ledger is empty or was written by another version",
                where=backend.where,
                expected=f"schema {SCHEMA_VERSION}",
                got=f"schema {version}",
                next_step=backend.upgrade_step
                if version in UPGRADED
                else "restore it from a backup, or use the version that wrote it",
            )

    @property
    def read_only(self) -> bool:
        with self._guard():
            return self.backend.read_only

    @property
    def where(self) -> str:
        return self.backend.where

    def num_bytes(self) -> int:
        with self._guard():
            return self.backend.num_bytes()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Provide a function that waits for a commit of another, and returns whether it saw one.

        Its argument is the most seconds to wait. It may return True for nothing.
        """
        with contextlib.ExitStack() as stack:
            with self._guard():
                wait = stack.enter_context(self.backend.watch())

            def typed_wait(timeout_s: float) -> bool:
                with self._guard():
                    return wait(timeout_s)

            yield typed_wait

    def close(self) -> None:
        self.backend.close()

    def _guard(self) -> AbstractContextManager[None]:
        return typed_errors(self.backend)

    def _corrupt(self, cause: str) -> IntegrityError:
        return damaged_ledger(self.backend.where, cause)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._guard():
            if self._snapshot is not None:
                yield self._snapshot
                return
            with self.backend.reading() as connection:
                yield connection

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._alone:  # other threads wait here; in this one, blocks nest
            if self._is_exclusive:
                yield
                return
            with self.backend.exclusive():
                self._is_exclusive = True
                try:
                    yield
                finally:
                    self._is_exclusive = False

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._guard():
                self._snapshot = stack.enter_context(self.backend.reading())
            try:
                yield
            finally:
                self._snapshot = None

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
            return as_objects(kind, table, rows.read_all(connection, table, shard, slice_, order))

    def scrub(self, removed: Collection[RecordRow] | None = ()) -> None:
        with self._guard():
            self.backend.scrub(removed, self.unscrubbed)
        self.unscrubbed.clear()


class Sqlite:
    """A Backend in one file; it is created empty if asked."""

    errors: tuple[type[Exception], ...] = (DatabaseError, sqlite3.DatabaseError)

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path, self.where = path, str(path)
        if create:
            # SQLite gives this mode to the write-ahead log and the shared memory beside it, too.
            with disk_errors(path):
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        elif not path.exists():
            raise IntegrityError("the ledger is missing", where=str(path))
        elif path.is_file() and path.stat().st_size == 0:  # SQLite would write a header into it
            raise damaged_ledger(str(path), "an empty file")
        self.read_only = is_read_only(path)
        self.upgrades = not self.read_only
        self.upgrade_step = "open it once where it can be written, for example with `sisa status`"
        shared = {"execution_options": {"compiled_cache": _STATEMENTS}}
        if self.read_only:
            reading = {"creator": lambda: open_readonly(path), "poolclass": sa.QueuePool}
            self.engine = sa.create_engine("sqlite://", **reading, **shared)
        else:
            url = sa.URL.create("sqlite", database=str(path))
            self.engine = sa.create_engine(url, connect_args={"timeout": PATIENCE_S}, **shared)
            sa.event.listen(self.engine, "connect", _set_pragmas)
        self._used = contextlib.ExitStack()
        self._used.enter_context(database_in_use(path))

    def exclusive(self) -> AbstractContextManager[None]:
        return writer_lock(self._path.with_name(COMMIT_LOCK), patience_s=None)

    def close(self) -> None:
        self.engine.dispose()
        self._used.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")  # so that all comparisons use one snapshot
            yield connection

    @contextlib.contextmanager
    def writing(self, num_rows: int = 0, /) -> Iterator[sa.Connection]:
        with self.engine.connect() as connection:
            cache_kib = LARGE_CACHE_KIB if num_rows >= rows.MANY_ROWS else CACHE_KIB
            connection.exec_driver_sql(f"PRAGMA cache_size=-{cache_kib}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def version(self, connection: sa.Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    def create(self, connection: sa.Connection) -> None:
        schema.create_all(connection)

    def upgrade(self, connection: sa.Connection, version: int) -> None:
        from sisa.store.ledger.migrations import upgrade

        upgrade(connection, version)

    def stamp(self, connection: sa.Connection, version: int) -> None:
        connection.exec_driver_sql(f"PRAGMA user_version = {version}")

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        with contextlib.closing(open_readonly(self._path)) as connection:

            def seen() -> int:  # SQLite counts the commits of other connections
                return int(connection.execute("PRAGMA data_version").fetchone()[0])

            last = seen()

            def wait(timeout_s: float) -> bool:
                nonlocal last
                deadline = time.monotonic() + timeout_s
                while (before := last) == (last := seen()):
                    if (left := deadline - time.monotonic()) <= 0:
                        return False
                    time.sleep(min(WATCH_POLL_S, left))
                return last != before

            yield wait

    def fault(self, error: Any) -> SisaError | None:
        return sqlite_fault(error, self._path)

    def num_bytes(self) -> int:
        return num_bytes(self._path)

    def scrub(self, removed: Collection[RecordRow] | None, keys: Collection[str]) -> None:
        self._empty_log()  # works even if the disk is too full to rewrite the ledger
        gone = len(removed or ()) + len(keys)
        if removed is None or gone > FEW_ROWS or self.holds(removed, keys):
            with self.engine.connect() as connection:
                alone = connection.execution_options(isolation_level="AUTOCOMMIT")
                alone.exec_driver_sql("VACUUM")
            self._empty_log()

    def erase(self) -> None:
        with self.writing() as connection:
            schema.drop_all(connection)
            self.stamp(connection, 0)

    def holds(self, removed: Collection[RecordRow], keys: Collection[str] = ()) -> bool:
        """Return whether any part of the file holds a row's piece: of its digest, or its vector's id."""
        wanted = [row.record_digest[:PIECE_BYTES].encode() for row in removed]
        wanted += [row.vector_id.to_bytes(8, "big")[2:] for row in removed]  # small ones take 6 bytes
        wanted += [key[:PIECE_BYTES].encode() for key in keys]
        if not wanted:
            return False
        before = b""
        with disk_errors(self._path), read_beside(self._path) as file:
            while block := file.read(SCAN_BYTES):
                block = before + block
                if any(each in block for each in wanted):
                    return True
                before = block[-PIECE_BYTES:]
        return False

    def _empty_log(self) -> None:
        deadline = time.monotonic() + SCRUB_PATIENCE_S
        while True:
            with self.engine.connect() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            if not busy:
                return
            if time.monotonic() > deadline:
                raise Busy(
                    "a reader keeps the ledger's write-ahead log open",
                    where=self.where,
                    next_step="end the process that reads this model, then run the command again",
                )
            time.sleep(0.1)


def upgrade_ledger(place: Path | str) -> bool:
    """Bring the schema of a ledger up to the present one; return whether it was older.

    Older programs can't open the ledger afterwards. So what several nodes share is brought up on request
    alone. Raise IntegrityError for a ledger that is empty or of a later version.
    """
    with contextlib.closing(backend_at(place)) as backend, typed_errors(backend):
        with backend.reading() as connection:
            older = backend.version(connection) in UPGRADED
        if older:
            _create_or_upgrade(backend)
    Database(place).close()
    return older


def ledger_version(place: Path | str) -> int:
    """Return the version of a ledger's schema; 0 if there are no tables."""
    with (
        contextlib.closing(backend_at(place)) as backend,
        typed_errors(backend),
        backend.reading() as connection,
    ):
        return backend.version(connection)


def _create_or_upgrade(backend: Backend) -> None:
    """Make the tables, or those that an older schema lacks, unless another process just did."""
    with backend.writing() as connection:
        version = backend.version(connection)
        if version == 0:
            backend.create(connection)
            rows.begin_counts(connection)
        elif version in UPGRADED:
            backend.upgrade(connection, version)
        if version == 0 or version in UPGRADED:
            backend.stamp(connection, SCHEMA_VERSION)


def damaged_ledger(where: str, cause: str) -> IntegrityError:
    """Return the error for rows or files that are not the ones that were written."""
    return IntegrityError(
        "the ledger is damaged",
        where=where,
        got=cause,
        next_step="restore the model directory from a backup",
    )


def message_of(error: Any) -> str:
    """Return a driver's message without the values of rows, which PostgreSQL adds as a detail."""
    diagnosis = getattr(error, "diag", None)
    return str(getattr(diagnosis, "message_primary", None) or error)


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


def as_objects(kind: type[_T], table: sa.Table, found: Sequence[tuple[Any, ...]]) -> list[_T]:
    """Return rows as objects of a dataclass, by the names of its fields. Raise Damaged."""
    columns = table.columns.keys()
    try:
        for at, parsed in ((at, _PARSED[name]) for at, name in enumerate(columns) if name in _PARSED):
            found = [(*row[:at], parsed(row[at]), *row[at + 1 :]) for row in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise rows.Damaged(f"a row of {table.name} that can't be read") from error
    pick = itemgetter(*(columns.index(each.name) for each in fields(kind)))  # type: ignore[arg-type]
    return [kind(*pick(row)) for row in found]


def rows_having(
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
        found += as_objects(kind, table, rows.read(connection, table, column.in_(chunk)))
    allowed = set(values)
    if any(getattr(each, column.name) not in allowed for each in found):
        raise rows.Damaged(f"an index of {table.name} that names another row")
    if full_scan:
        rows.check_hidden(connection, column, values, len(found))
    return found


_SAFE = ("journal_mode=WAL", "secure_delete=ON", "synchronous=FULL", "foreign_keys=ON")
# At most. Rows meet the pages of indexes at random: a page that leaves the cache is written once more.
CACHE_KIB, LARGE_CACHE_KIB = 65_536, 524_288


def _set_pragmas(connection: Any, _record: Any) -> None:
    # Pragmas belong to a connection, not to the file: they are set on every connect.
    for pragma in (*_SAFE, f"cache_size=-{CACHE_KIB}"):
        connection.execute(f"PRAGMA {pragma}").close()
