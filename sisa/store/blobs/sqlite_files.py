"""SQLite files: how they are opened, what their errors mean, and how to read the bytes of an open one.

Closing any handle of a file ends every POSIX lock that the process has on it, SQLite's too: another
process would take an open database for unused and delete the log to which this one writes. So
`read_beside` closes a handle with the last connection of this process, and uses it again until then.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from sisa.core.errors import Busy, EnvironmentFault, SisaError
from sisa.store.blobs.files import LOCK_PATIENCE_S

SQLITE_FILES = ("", "-wal", "-shm", "-journal")  # suffixes of a database and of the files beside it
_databases: dict[str, list[BinaryIO]] = {}  # open in this process: handles that are still to be closed
_users = Counter[str]()  # of each of them
_using = threading.Lock()
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SURROUNDINGS = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT),
}


@contextlib.contextmanager
def database_in_use(path: Path) -> Iterator[None]:
    """Note that this process has a SQLite database open while the block runs; see `read_beside`."""
    name = os.path.realpath(path)
    with _using:
        _users[name] += 1
    try:
        yield
    finally:
        with _using:
            _users[name] -= 1
            if not _users[name]:
                del _users[name]
                for each in _databases.pop(name, ()):
                    each.close()


@contextlib.contextmanager
def read_beside(path: Path) -> Iterator[BinaryIO]:
    """Open a file, which may be a database's, to read its bytes beside connections of this process."""
    name = os.path.realpath(path)
    for suffix in SQLITE_FILES:
        name = name.removesuffix(suffix)
    with database_in_use(Path(name)):
        with _using:
            open_files = _databases.setdefault(name, [])
            same = (e for e in open_files if os.path.samestat(os.fstat(e.fileno()), path.stat()))
            if file := next(same, None):
                open_files.remove(file)  # no other thread reads it meanwhile
            else:
                file = path.open("rb")
        file.seek(0)
        try:
            yield file
        finally:
            with _using:
                open_files.append(file)
                for each in [e for e in open_files if not os.fstat(e.fileno()).st_nlink]:
                    open_files.remove(each)  # nobody locks a deleted file
                    each.close()


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
    """Open a SQLite file for reading only. Raise sqlite3.Error.

    SQLite reads a file with a write-ahead log through files beside it. If these can't be written, a file
    without a log is opened as immutable; with one, the log is read through the index beside it. Queries
    may also raise UnicodeDecodeError, when SQLite quotes a damaged schema.
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
    return sqlite3.connect(uri, uri=True, timeout=LOCK_PATIENCE_S, check_same_thread=False)
