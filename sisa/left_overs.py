"""Where traces of records may lie besides the model: our scratch in caches and temporary directories.

Rules: only what is named as ours and belongs to this user is listed; nothing is changed. Links are not
followed.

Not covered: what is looked for in them (`residue.py`).

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     (Path(folder) / "b").mkdir()
...     (Path(folder) / "b" / "c").touch()
...     [path.relative_to(folder).as_posix() for path in walk(Path(folder))]
['.', 'b', 'b/c']
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sisa.model.packages import cache_dir

LEFT_OVER_PREFIXES = (".partial-", ".wheel-", ".incoming-")  # of `packages.py` and `shared_base.py`
TEMPORARY_PATTERNS = ("sisa-scratch-*", "sisa-*/r")  # of `reader.py` and `ray_session.py`


def owned_left_overs() -> list[Path]:
    """Scratch of ours outside the model: half-filled caches and temporary directories of this user."""
    cache = cache_dir()
    found = [
        path
        for depth in ("*", "*/*", "*/*/*")
        for path in cache.glob(depth)
        if path.name.startswith(LEFT_OVER_PREFIXES)
    ]
    for pattern in TEMPORARY_PATTERNS:
        for path in Path(tempfile.gettempdir()).glob(pattern):
            with contextlib.suppress(OSError):  # of a process that ends just now
                if path.lstat().st_uid == os.getuid():
                    found.append(path)
    return sorted(found)


def walk(place: Path, unlisted: Callable[[Path, OSError], None] | None = None) -> Iterator[Path]:
    """A place and all below it, in order; links are named and not followed. `unlisted` is given each
    directory that can't be listed, with the reason."""
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
