"""Temporary files outside the model that may hold text: scratch in caches and temporary directories.

Only files that this project named and this user owns are listed; links are not followed. A killed
process's scratch is erased by the next process that reads a data set or writes to a model.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     (Path(folder) / "b").mkdir()
...     (Path(folder) / "b" / "c").touch()
...     [path.relative_to(folder).as_posix() for path in walk(Path(folder))]
['.', 'b', 'b/c']
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sisa.lm.base.packages import cache_dir

LEFT_OVER_PREFIXES = (".partial-", ".wheel-", ".incoming-")  # of `packages.py` and `shared_base.py`
SCRATCH_PREFIX = "sisa-scratch-"
TEMPORARY_PATTERNS = (f"{SCRATCH_PREFIX}*", "sisa-*/r")  # of `scratch` and `ray_session.py`
LEAST_AGE_S = 60.0  # of unlocked scratch: younger scratch may not be locked yet


def owned_temporary_files() -> list[Path]:
    """Return this user's scratch outside the model: incomplete caches and temporary directories."""
    cache = cache_dir()
    found = [
        path
        for depth in ("*", "*/*", "*/*/*")
        for path in cache.glob(depth)
        if path.name.startswith(LEFT_OVER_PREFIXES)
    ]
    for pattern in TEMPORARY_PATTERNS:
        for path in Path(tempfile.gettempdir()).glob(pattern):
            with contextlib.suppress(OSError):  # removed meanwhile
                if path.lstat().st_uid == os.getuid():
                    found.append(path)
    return sorted(found)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Provide a temporary directory for this process and its children; erase abandoned ones first."""
    erase_abandoned()
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as folder, keep(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def keep(folder: Path) -> Iterator[None]:
    """Mark a directory as in use while the block runs."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def erase_abandoned() -> None:
    """Erase this user's scratch that no living process keeps: it may hold texts."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or already removed
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < LEAST_AGE_S:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(handle)


def walk(place: Path, unlisted: Callable[[Path, OSError], None] | None = None) -> Iterator[Path]:
    """Yield a path and everything below it, in order, without following links.

    `unlisted` receives each directory that can't be listed, and the reason.
    """
    yield place
    if place.is_dir() and not place.is_symlink():
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            if unlisted and not isinstance(error, FileNotFoundError):
                unlisted(place, error)
            return
        for name in names:
            yield from walk(place / name, unlisted)
