"""Open the ledger's database, read checked rows from snapshots of it, and write in transactions.

A ledger is one SQLite file (`sqlite.py`) or the tables of one PostgreSQL schema (`postgres.py`, imported
when it is needed). Each is a `Backend`; everything above is the same for both.

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
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from sisa.core.domain import RecordRow
from sisa.core.errors import IntegrityError
from sisa.core.patches import parse_patch_job
from sisa.store.ledger import rows
from sisa.store.ledger.backend import Backend, Watch, damaged_ledger, message_of
from sisa.store.ledger.sqlite import Sqlite
from sisa.store.ledger.tables import SCHEMA_VERSION, UPGRADED

_T = TypeVar("_T")
_PARSED: dict[str, Callable[[Any], Any]] = {  # values of columns that a row holds in another form
    "prefix": lambda text: tuple(map(int, json.loads(text))),
    "patches": lambda text: tuple(json.loads(text)),
    "job": lambda text: parse_patch_job(json.loads(text)),
    "report": json.loads,
    "held": bool,
}


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
        """Provide a function that waits for another's commit, at most as many seconds as it is given.

        It returns whether it saw one; it may return True without one.
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


def upgrade_ledger(place: Path | str) -> bool:
    """Upgrade the schema of a ledger to the present one; return whether it was older.

    Older programs can't open the ledger afterwards, so one that several nodes share is upgraded only on
    request. Raise IntegrityError for a ledger that is empty or of a later version.
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
    """Create the tables, or upgrade older ones, unless another process has just done so."""
    with backend.writing() as connection:
        version = backend.version(connection)
        if version == 0:
            backend.create(connection)
            rows.begin_counts(connection)
        elif version in UPGRADED:
            backend.upgrade(connection, version)
        if version == 0 or version in UPGRADED:
            backend.stamp(connection, SCHEMA_VERSION)


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
    """Return rows with one of these values in a column, by its index.

    With `full_scan`, confirm without the index that none is missing. Raise rows.Damaged.
    """
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
