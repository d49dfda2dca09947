"""Temporary directories of this user, outside the model: they may hold text.

A killed process's directory is erased by the next process that reads a data set or writes to a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sisa.store.blobs.files import opened_directory

DIRECTORY_PREFIX = "sisa-scratch-"
LEAST_AGE_S = 60.0  # of an unlocked directory: a younger one may not be locked yet


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Provide a temporary directory for this process and its children; erase abandoned ones first."""
    erase_abandoned()
    with tempfile.TemporaryDirectory(prefix=DIRECTORY_PREFIX) as folder, in_use(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Mark a directory as in use while the block runs."""
    with opened_directory(folder) as handle:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def erase_abandoned() -> None:
    """Erase this user's temporary directories that no living process uses: they may hold texts."""
    for path in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or already removed
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < LEAST_AGE_S:
                continue
            with opened_directory(path, follow=False) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
