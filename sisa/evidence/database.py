"""Open MODEL/evidence.sqlite, which holds what evidence needs beside the ledger.

It holds keyed digests and labels of a verifiable random function, never an id. One transaction at a
time: a crash leaves the state before it. `secure_delete` zeroes what is removed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from sisa.core.errors import IntegrityError
from sisa.store.blobs.files import database_in_use, disk_errors
from sisa.store.ledger.database import PATIENCE_S, open_journaled, sqlite_fault

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
        raise sqlite_fault(error, path) or damaged(path, str(error)) from error
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
