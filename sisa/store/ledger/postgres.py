"""A ledger in PostgreSQL: the tables of one schema, for commands, workers and replicas on several nodes.

A URL is libpq's, without a password: that comes from libpq's own sources (`~/.pgpass`, `PGPASSWORD`,
`service=`, certificates). The schema is the first of the search path, so several models can share a
database:

    postgresql://sisa@db.example/models?options=-csearch_path%3Dsupport

Readers have a snapshot (REPEATABLE READ, read only). Writers follow one another, by an advisory lock
that a transaction holds. The locks of a model are advisory locks of a session, so they need a direct
connection or a pool that keeps sessions. A commit wakes whoever watches the ledger (LISTEN/NOTIFY).

`scrub` rewrites the tables that lost rows; nothing of a row is kept in the planner's statistics. What
was written to PostgreSQL's own log stays until its segments are used again, and in archives, replicas
and backups for as long as these are kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from sisa.core.domain import RecordRow
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, InvalidInput, SisaError, extra
from sisa.store.ledger.backend import PATIENCE_S, SCRUB_PATIENCE_S, Statements, Watch, message_of
from sisa.store.ledger.tables import (
    IDENTITIES_TABLE,
    NAMED_TABLE,
    RECORDS_TABLE,
    TOMBSTONES_TABLE,
    schema,
)

with extra("postgres"):
    import psycopg

CHANNEL = "sisa_ledger"
REWRITING_S = 120.0  # most that a reader waits while `scrub` rewrites a table
POLL_S = 0.05  # between two attempts to take a lock
_STATEMENTS = Statements(capacity=500)
# A lock, a conflict, a deadlock, a statement that ran too long.
_BUSY = ("55P03", "40001", "40P01", "57014")
_SURROUNDINGS = ("08", "25", "28", "3D", "3F", "42501", "53", "54", "57", "58")  # SQLSTATE begins with
_KEEP_ALIVE = (
    "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"
)
# By URL: the sessions of this process that hold locks.
_held: dict[str, list[psycopg.Connection[Any]]] = {}


def _connected(
    url: str, *, autocommit: bool = False, patience_s: float = REWRITING_S
) -> psycopg.Connection[Any]:
    connection = psycopg.connect(url, connect_timeout=int(PATIENCE_S), autocommit=True)
    connection.execute(f"SET lock_timeout = {int(patience_s * 1000)}")
    connection.autocommit = autocommit
    return connection


def _lock_number(name: str) -> str:
    """Return the SQL for the number of an advisory lock of this schema."""
    return f"hashtextextended('sisa {name} ' || current_schema(), 0)"


class Postgres:
    """A Backend in one schema."""

    upgrades = False  # programs on other nodes may be of the older version
    upgrade_step = "end what uses it on any node, then run `sisa ledger upgrade -m DIR`"

    errors: tuple[type[Exception], ...] = (sa.exc.DBAPIError, psycopg.Error)

    def __init__(self, url: str) -> None:
        self.where = url
        self.engine = sa.create_engine(
            "postgresql+psycopg://",
            creator=lambda: _connected(url),
            use_native_hstore=False,
            isolation_level="READ COMMITTED",
            execution_options={"compiled_cache": _STATEMENTS},
        )
        self._readers = self.engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    @property
    def read_only(self) -> bool:
        query = (
            "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool "
            "OR NOT has_table_privilege('meta', 'INSERT')"
        )
        with self.reading() as connection:
            return bool(connection.exec_driver_sql(query).scalar_one())

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._readers.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, _num_rows: int = 0, /) -> Iterator[sa.Connection]:
        for each in _held.get(self.where, ()):
            each.execute("SELECT 1")  # a lost session has lost its lock: nothing is committed without it
        with self.engine.begin() as connection:
            connection.exec_driver_sql(
                f"SET LOCAL lock_timeout = {int(SCRUB_PATIENCE_S * 1000)}; "
                f"SELECT pg_advisory_xact_lock({_lock_number('transaction')}); "
                f"SET LOCAL lock_timeout = {int(REWRITING_S * 1000)}"
            )
            yield connection
            connection.exec_driver_sql(f"SELECT pg_notify('{CHANNEL}', current_schema())")

    def exclusive(self) -> AbstractContextManager[None]:
        return advisory_lock(self.where, "commit", PATIENCE_S)

    def close(self) -> None:
        self.engine.dispose()

    def version(self, connection: sa.Connection) -> int:
        query = (
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() "
            "ORDER BY tablename <> 'alembic_version'"
        )
        tables = connection.exec_driver_sql(query).scalars().all()
        if not tables:
            return 0
        if tables[0] == "alembic_version":
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
            if len(found) == 1 and found[0].isdecimal():
                return int(found[0])
        raise ConfigConflict(
            "the schema holds tables that are not a ledger's",
            where=self.where,
            next_step="give the ledger a database or a schema of its own",
        )

    def create(self, connection: sa.Connection) -> None:
        self.upgrade(connection, 0)

    def upgrade(self, connection: sa.Connection, version: int) -> None:
        from sisa.store.ledger.migrations import upgrade

        upgrade(connection, version)
        for column in (each for table in schema.sorted_tables for each in table.columns):
            if isinstance(column.type, sa.Text):  # else ANALYZE would copy values into the catalogue
                alter = f"ALTER TABLE {column.table} ALTER COLUMN {column.name} SET STATISTICS 0"
                connection.exec_driver_sql(alter)

    def stamp(self, connection: sa.Connection, version: int) -> None:
        table = "alembic_version (version_num varchar(32) PRIMARY KEY)"
        connection.exec_driver_sql(f"CREATE TABLE IF NOT EXISTS {table}")
        connection.exec_driver_sql("DELETE FROM alembic_version")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES (%s)", (f"{version:04}",))

    def fault(self, error: Any) -> SisaError | None:
        return postgres_fault(error, self.where)

    def num_bytes(self) -> int:
        query = (
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        )
        with self.reading() as connection:
            return int(connection.exec_driver_sql(query).scalar_one())

    def scrub(self, removed: Collection[RecordRow] | None, keys: Collection[str]) -> None:
        """Rewrite the tables; those that may be large only if they lost rows, and readers wait."""
        spared = {TOMBSTONES_TABLE, NAMED_TABLE}
        spared |= (set() if removed else {RECORDS_TABLE}) | (set() if keys else {IDENTITIES_TABLE})
        if removed is None:
            spared = set()
        tables = ", ".join(table.name for table in schema.sorted_tables if table not in spared)
        notices: list[psycopg.errors.Diagnostic] = []
        with _connected(self.where, autocommit=True, patience_s=SCRUB_PATIENCE_S) as connection:
            connection.add_notice_handler(notices.append)
            connection.execute(f"VACUUM (FULL) {tables}".encode())
        if notices:  # PostgreSQL leaves out the tables of other roles, and does not raise
            raise EnvironmentFault(
                f"the ledger's tables can't be rewritten: {notices[0].message_primary}",
                where=self.where,
                next_step="connect as the role that owns the tables, then run the command again",
            )

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        with _connected(self.where, autocommit=True) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            (own,) = connection.execute("SELECT current_schema()").fetchone() or ("",)

            def wait(timeout_s: float) -> bool:
                deadline = time.monotonic() + timeout_s
                while (left := deadline - time.monotonic()) > 0:
                    for note in connection.notifies(timeout=left, stop_after=1):
                        if note.payload == own:
                            return True
                return False

            yield wait


def postgres_fault(error: Any, where: str) -> SisaError | None:
    """Return the typed error for a lock, the connection or the server; None for damage."""
    state = getattr(error, "sqlstate", None) or ""
    if state in _BUSY:
        kind: type[SisaError] = Busy
        step = "wait for the other process, then run the command again"
    elif state.startswith(_SURROUNDINGS) or (not state and isinstance(error, psycopg.OperationalError)):
        kind, step = (
            EnvironmentFault,
            "restore the database or the connection, then run the command again",
        )
    elif isinstance(error, psycopg.DataError):
        kind, step = InvalidInput, "leave out what PostgreSQL can't store, such as the character NUL"
    else:
        return None
    return kind(f"the database can't be used: {message_of(error)}", where=where, next_step=step)


@contextlib.contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turn the driver's errors into typed ones."""
    try:
        yield
    except psycopg.Error as error:
        raise postgres_fault(error, where) or EnvironmentFault(message_of(error), where=where) from error


@contextlib.contextmanager
def advisory_lock(url: str, name: str, patience_s: float = 0) -> Iterator[None]:
    """Hold a lock of a model by name, in a session of its own. Raise Busy if another holds it."""
    with guarded(url):
        connection = _connected(url, autocommit=True)
    with contextlib.closing(connection):
        with guarded(url):
            connection.execute(_KEEP_ALIVE)
            deadline = time.monotonic() + patience_s
            while not _try_lock(connection, name):
                if time.monotonic() >= deadline:
                    raise Busy(
                        "another process is writing to this model",
                        where=url,
                        next_step="wait until it has finished, then run the same command again",
                    )
                time.sleep(POLL_S)
        held = _held.setdefault(url, [])
        held.append(connection)
        try:
            yield
        finally:
            held.remove(connection)
            with contextlib.suppress(psycopg.Error):  # closing alone would release it a moment later
                connection.execute(f"SELECT pg_advisory_unlock({_lock_number(name)})".encode())


def _try_lock(connection: psycopg.Connection[Any], name: str) -> bool:
    found = connection.execute(f"SELECT pg_try_advisory_lock({_lock_number(name)})".encode()).fetchone()
    return bool(found and found[0])
