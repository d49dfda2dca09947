"""What the ledger needs of one kind of database: `sqlite.py` and `postgres.py` provide it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.util import LRUCache

from sisa.core.domain import RecordRow
from sisa.core.errors import IntegrityError, SisaError

PATIENCE_S = 10.0  # for a database's own locks, which are held briefly
SCRUB_PATIENCE_S = 10.0
Watch = Callable[[float], bool]  # wait so many seconds; return early, and True, after a commit


class Statements(LRUCache[Any, Any]):
    """Compiled statements, without values, that all ledgers of one kind in this process share.

    A key begins with the dialect, an object that differs from engine to engine, so it is left out.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[1:], value)


class Backend(Protocol):
    """What one kind of database does in its own way."""

    where: str  # for messages, without a password
    engine: sa.Engine
    errors: tuple[type[Exception], ...]  # of the driver, also as SQLAlchemy wraps them
    upgrades: bool  # whether opening upgrades an older schema
    upgrade_step: str  # what the user does otherwise

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
        """Hold the lock that everyone who commits takes. Raise Busy."""

    def close(self) -> None:
        """Close all connections."""

    def version(self, connection: sa.Connection) -> int:
        """Return the version of the schema; 0 without one."""

    def create(self, connection: sa.Connection) -> None:
        """Create the tables of the present schema."""

    def upgrade(self, connection: sa.Connection, version: int) -> None:
        """Upgrade the tables of an older schema."""

    def stamp(self, connection: sa.Connection, version: int) -> None:
        """Write the version of the schema."""

    def watch(self) -> AbstractContextManager[Watch]:
        """Provide a function that waits for a commit by another connection."""

    def fault(self, error: Any) -> SisaError | None:
        """Return the typed error for a lock or the surroundings; None for damage."""

    def num_bytes(self) -> int:
        """Return the size of everything stored."""

    def scrub(self, removed: Collection[RecordRow] | None, keys: Collection[str]) -> None:
        """See `Ledger.scrub`; `keys` are those of removed identities."""


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
