"""Record the files that Python code opens below a directory.

    with opened_files(model.directory) as opened:
        model.find(text="...")
    assert all(path.suffix != ".parquet" for path in opened)

An audit hook stays for the life of a process, so there is one, which records only while it is asked to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_recording: list[tuple[str, set[Path]]] = []
_hooked: list[bool] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _recording and isinstance(arguments[0], str | bytes):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        for below, found in _recording:
            if path.startswith(below):
                found.add(Path(path))


@contextmanager
def opened_files(directory: Path) -> Iterator[set[Path]]:
    """Collect the files below a directory that are opened while the block runs."""
    if not _hooked:
        sys.addaudithook(_note)
        _hooked.append(True)
    found: set[Path] = set()
    _recording.append((f"{directory.absolute()}{os.sep}", found))
    try:
        yield found
    finally:
        _recording.pop()
