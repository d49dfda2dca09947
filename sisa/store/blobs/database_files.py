"""Read the bytes of a SQLite database while this process has it open, without ending its locks.

Closing any handle of a file ends every POSIX lock that the process has on it, SQLite's too: another
process would take an open database for unused and delete the log to which this one writes. So a handle
is closed with the last connection, and used again until then.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SQLITE_FILES = ("", "-wal", "-shm", "-journal")  # suffixes of a database and of the files beside it
_databases: dict[str, list[BinaryIO]] = {}  # open in this process: handles that are still to be closed
_users = Counter[str]()  # of each of them
_using = threading.Lock()


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
