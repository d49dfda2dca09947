"""The log of an evaluation: a header and one JSON line per question, continued where it was cut short.

    {"log": "tofu", "version": 1, "model": digest, "questions": digest, "settings": {...}}
    {"set": "forget10", "idx": 0, "avg_gt_loss": 1.5, "avg_paraphrased_loss": 1.8, ...}

Lines are appended and flushed batch by batch; a torn last line is cut off and its question asked again.
A log of another model, of other questions or other settings is refused, and so is one with a damaged
line in its middle. Published logs (locuslab's `eval_log_aggregated.json`) are read, not continued. A log
holds the questions' answers and generated text: keep it as you keep the data.

>>> header, rows = read_log(Path("full.jsonl"))                               # doctest: +SKIP
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from approx.evaluation.tofu_row import LogRow, parse_row, published_rows
from sisa.core.digest import canonical_json
from sisa.core.errors import Busy, ConfigConflict, IntegrityError, InvalidInput
from sisa.store.blobs.files import disk_errors

KIND, VERSION = "tofu", 1
NEXT_STEP = "name another output directory, or remove the log"


@dataclass(frozen=True)
class Header:
    """What a log is of. Equal headers, equal measurements, up to the machine's arithmetic."""

    model: str
    questions: str
    settings: Mapping[str, Any]

    def line(self) -> bytes:
        return canonical_json({"log": KIND, "version": VERSION, **asdict(self)}) + b"\n"


def read_log(path: Path) -> tuple[Header | None, list[LogRow]]:
    """Return the header, None for a published log, and the rows of whole lines.

    Raises InvalidInput, IntegrityError.
    """
    with disk_errors(path):
        data = path.read_bytes()
    try:
        held = json.loads(data)
    except (ValueError, RecursionError):  # several lines: a log of ours
        held = None
    try:
        published = published_rows(held)
    except ValueError:
        raise IntegrityError(
            "a published log is damaged", where=str(path), next_step="fetch it again"
        ) from None
    if published is not None:
        return None, published
    return _parsed(data[: data.rfind(b"\n") + 1], path)


def _parsed(data: bytes, path: Path) -> tuple[Header | None, list[LogRow]]:
    lines = data.splitlines()
    header = _header(lines[0]) if lines else None
    rows: dict[tuple[str, int], LogRow] = {}
    for number, line in enumerate(lines[header is not None :], start=1 + (header is not None)):
        try:
            row = parse_row(line)
        except ValueError:
            raise IntegrityError(
                "a log is damaged", where=f"{path}, line {number}", next_step=NEXT_STEP
            ) from None
        if row.place in rows:
            raise IntegrityError(
                "a log holds a question twice", where=f"{path}, line {number}", next_step=NEXT_STEP
            )
        rows[row.place] = row
    return header, list(rows.values())


def _header(line: bytes) -> Header | None:
    try:
        held = json.loads(line)
        if held["log"] != KIND or held["version"] != VERSION:
            return None
        return Header(held["model"], held["questions"], held["settings"])
    except (ValueError, TypeError, KeyError):
        return None


class LogWriter:
    """A log that is being written; `rows` are those that it holds."""

    def __init__(self, path: Path, header: Header) -> None:
        """Begins a log, or opens one to continue it. Raises Busy, ConfigConflict, IntegrityError."""
        self._path = path
        self.rows: list[LogRow] = []
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            self._continue(header)
        except BaseException:
            self._file.close()
            raise

    def _continue(self, header: Header) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                "another process writes this log", where=str(self._path), next_step="wait for it"
            ) from None
        with disk_errors(self._path):
            held = self._file.read()
        whole = held[: held.rfind(b"\n") + 1]
        if whole:
            found, self.rows = _parsed(whole, self._path)
            _refuse_other(self._path, found, header)
        with disk_errors(self._path):
            self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
        if not whole:
            self._write([header.line()])

    def append(self, rows: Sequence[LogRow]) -> None:
        """Add rows; they are on the disk when this returns."""
        self._write(row.line() for row in rows)
        self.rows += rows

    def _write(self, lines: Iterable[bytes]) -> None:
        with disk_errors(self._path):
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _refuse_other(path: Path, found: Header | None, wanted: Header) -> None:
    if found is None:
        raise InvalidInput(
            "the file is not a log that can be continued",
            where=str(path),
            expected="a header in its first line",
            next_step=NEXT_STEP,
        )
    names = [name for name in ("model", "questions") if getattr(found, name) != getattr(wanted, name)]
    keys = {**found.settings, **wanted.settings}
    names += [key for key in sorted(keys) if found.settings.get(key) != wanted.settings.get(key)]
    if names:
        raise ConfigConflict(
            "the log is of another evaluation",
            where=str(path),
            expected="the same model, questions and settings",
            got="another " + ", ".join(names),
            next_step=NEXT_STEP,
        )
