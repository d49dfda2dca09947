"""A ledger in one SQLite file: its transactions, and how it forgets what was removed.

WAL lets readers and a writer work at the same time. `secure_delete` zeroes what is removed, but not the
copies that balancing leaves in a page's unused part; after a deletion `scrub` therefore searches for
them and rewrites the file if it finds one. It also empties the write-ahead log (SQLite reports a busy
log in a result row and does not raise). A file that can't be written is opened for reading only.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from sisa.core.domain import RecordRow
from sisa.core.errors import Busy, IntegrityError, SisaError
from sisa.store.blobs.files import disk_errors, num_bytes, writer_lock
from sisa.store.blobs.sqlite_files import (
    database_in_use,
    is_read_only,
    open_readonly,
    read_beside,
    sqlite_fault,
)
from sisa.store.ledger import rows
from sisa.store.ledger.backend import PATIENCE_S, SCRUB_PATIENCE_S, Statements, Watch, damaged_ledger
from sisa.store.ledger.tables import schema

COMMIT_LOCK = "commit.lock"  # beside the file: who commits, decides about what was read, or both
FEW_ROWS = 4  # up to which removed rows are searched for; for more, rewriting the file is faster
PIECE_BYTES = 16
SCAN_BYTES = 1 << 22
WATCH_POLL_S = 0.05  # a question takes microseconds
_SAFE = ("journal_mode=WAL", "secure_delete=ON", "synchronous=FULL", "foreign_keys=ON")
# At most. Rows meet the pages of indexes at random: a page that leaves the cache is written once more.
CACHE_KIB, LARGE_CACHE_KIB = 65_536, 524_288
_STATEMENTS = Statements(capacity=500)


class Sqlite:
    """A Backend in one file; it is created empty if asked."""

    errors: tuple[type[Exception], ...] = (DatabaseError, sqlite3.DatabaseError)

    def __init__(self, path: Path, *, create: bool) -> None:
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


def _set_pragmas(connection: Any, _record: Any) -> None:
    # Pragmas belong to a connection, not to the file: they are set on every connect.
    for pragma in (*_SAFE, f"cache_size=-{CACHE_KIB}"):
        connection.execute(f"PRAGMA {pragma}").close()
