"""A directory that can not be written, for a process that root starts, too."""

from __future__ import annotations

import os
from pathlib import Path

# Root may write whatever the modes say, unless it gives that up.
BOUND = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def freeze(directory: Path, *, writable: bool = False) -> None:
    for path in [directory, *directory.rglob("*")]:
        path.chmod((0o500 if path.is_dir() else 0o400) | (0o200 if writable else 0))
