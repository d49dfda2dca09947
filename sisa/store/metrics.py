"""Metrics at rest: a file of JSON lines for each run, `metrics/RUN.jsonl`, of numbers alone.

A line is appended whole; a last line without its end, from a killed process, is not read. Lines are
those of `sisa/core/measured.py`, and anything else is an IntegrityError. When a stage's checkpoint is
erased, its losses are, too: the files are written anew. Files are never encrypted, since they hold
nothing to hide. Old runs are the user's to remove.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     metrics = FileMetrics(Path(folder) / "metrics")
...     run = "20261125T213749Z-3f9a1c2b"
...     metrics.append({"at": "2026-11-25T21:37:49.123+00:00", "run": run, "event": "erasure_failed",
...                     "num_requests": 2})
...     metrics.runs() == [run], metrics.read(run)[0]["num_requests"]
(True, 2)
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError
from sisa.core.measured import is_line, is_run, without
from sisa.store.blobs import files

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class FileMetrics:
    """Metrics in a directory; several processes may write there, each in files of its own runs."""

    root: Path

    def append(self, line: Mapping[str, Any]) -> None:
        path = self._path(str(line["run"]))
        with files.disk_errors(path):
            files.make_directory(self.root)
            with _alone(self.root):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(canonical_json(line) + b"\n")

    def runs(self) -> list[str]:
        return sorted(name.removesuffix(SUFFIX) for name in run_files(self.root))

    def read(self, run: str) -> list[dict[str, Any]]:
        path = self._path(run)
        return parsed(files.read_whole(path, "file of metrics"), str(path))

    def keep_losses(self, stages: Collection[str]) -> None:
        names = run_files(self.root)
        if not names:
            return
        with files.disk_errors(self.root), _alone(self.root):
            for path in (self.root / name for name in sorted(names)):
                data = path.read_bytes()
                found = parsed(data, str(path))
                kept = [without(line, stages) for line in found]
                if kept != found or not data.endswith(b"\n"):
                    whole = b"".join(canonical_json(line) + b"\n" for line in kept)
                    files.write_atomic(path, whole)

    def _path(self, run: str) -> Path:
        if not is_run(run):  # it becomes part of a path
            raise IntegrityError(
                "that is not the name of a run", expected="a name that `sisa metrics` lists"
            )
        return self.root / f"{run}{SUFFIX}"


def run_files(root: Path) -> frozenset[str]:
    """Return the names of the files of runs; other files in the directory are ignored."""
    names = files.held_names(root)
    return frozenset(n for n in names if n.endswith(SUFFIX) and is_run(n.removesuffix(SUFFIX)))


def parsed(data: bytes, where: str) -> list[dict[str, Any]]:
    """Return the lines of a file without an unfinished last one. Raises IntegrityError."""
    found = []
    for number, each in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            value = json.loads(each)
        except (ValueError, RecursionError):
            value = None
        if not is_line(value):
            raise IntegrityError(
                "a line of metrics is not in the form that is written",
                where=f"{where}, line {number}",
                expected="a known event with its numbers",
                next_step="remove the file: nothing else needs it",
            )
        found.append(value)
    return found


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Lock the directory, so that no file is rewritten while a line is appended to it."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.take_lock(handle, root, "keeps the metrics of this model locked")
        yield
    finally:
        os.close(handle)
