"""Read the deletion lists of California's DROP, and write the responses to them.

Data brokers download a ZIP of lists from the Delete Request and Opt-out Platform, one CSV a list. A row
is a *work item*: DROP's id of it and the hash of an identifier. A broker hashes its own identifiers
(`identifiers.py`), compares, and answers each work item with a status.

>>> upload_name("20260312_4821_Email", "part01")
'20260312_4821_Email_part01.csv'
>>> responses({"A7kP2xQ9Lm4R": 5})
b'Id,Status\\nA7kP2xQ9Lm4R,5\\n'

`read_download` returns a whole ZIP or raises InvalidInput with every problem. Problems name files and
lines, never an id or a hash.

Source: privacy.ca.gov, "DROP for data brokers", technical specifications, version 1.2.0 (2 July 2026):
"Working with the data" (columns), "Reference" (statuses, file names) and the DROP Data Broker API
(patterns of ids, hashes and names).
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO

from sisa.config.sources import SourceLimits
from sisa.core.errors import Problems
from sisa.data.identifiers import LISTS
from sisa.data.record_rules import Broken

REMOVED = "Removed"  # a file of withdrawn work items, not a list
EXEMPTED, DELETED, OPTED_OUT, NOT_FOUND = 2, 3, 4, 5
STATUSES = {EXEMPTED: "exempted", DELETED: "deleted", OPTED_OUT: "opted out", NOT_FOUND: "not found"}
CYCLE_DAYS = 45  # between two downloads, and from a download to its responses, at most

DOWNLOAD_AGAIN = "download the lists again; if the problem stays, report it to DROP"
MAX_FILES, MAX_LINE_BYTES = 64, 256  # of a ZIP, and of a line in it
_NAME = re.compile(rf"(\d{{8}})_(\d{{4}})_({'|'.join(LISTS)}|{REMOVED})\.csv")
_ITEM = re.compile(r"[A-Za-z0-9]{12}")
_HASH = re.compile(r"[A-Za-z0-9+/]{43}=")
_SUFFIX = re.compile(r"[A-Za-z0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of a list: DROP's id of a work item, the list, and the hash of an identifier."""

    item: str
    list_name: str
    hash: str = field(repr=False)


@dataclass(frozen=True)
class Download:
    """The lists of one ZIP: day and broker of its names, and the rows by file, without `.csv`."""

    day: date
    broker: str
    lists: Mapping[str, Sequence[Listed]]
    removed: Sequence[Listed] = ()
    removed_file: str = ""


def list_of(file: str) -> str:
    """Return the list of a file's name: `Email` of `20260312_4821_Email`."""
    return file.split("_")[2]


def day_of(file: str) -> date:
    """Return the day of a file's name."""
    return datetime.strptime(file[:8], "%Y%m%d").date()


def due_day(file: str) -> date:
    """Return the last day for the responses to a file."""
    return day_of(file) + timedelta(days=CYCLE_DAYS)


def read_download(path: Path, limits: SourceLimits = SourceLimits()) -> Download:  # noqa: B008 - frozen
    """Return the lists of a ZIP as DROP gives it. Raise InvalidInput with every problem."""
    reading = _Reading(Problems(limits.max_problems), limits)
    try:
        with zipfile.ZipFile(path) as archive:
            reading.take(archive)
    except OSError as error:
        reading.problems.add(path.name, f"can't be read: {error.strerror or 'corrupt or truncated'}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        reading.problems.add(path.name, "not a readable ZIP; corrupt, truncated or encrypted")
    except Broken as error:
        reading.problems.add(path.name, str(error))
    reading.problems.refuse("in the download; nothing was imported", DOWNLOAD_AGAIN)
    day, broker = next(iter(reading.names.values()))
    removed = next((each for each in reading.rows if list_of(each) == REMOVED), "")
    rows = reading.rows.pop(removed, [])
    return Download(day_of(day), broker, reading.rows, rows, removed)


class _Reading:
    """Rows and problems so far, and where each work item first occurred."""

    def __init__(self, problems: Problems, limits: SourceLimits) -> None:
        self.problems = problems
        self.limits = limits
        self.names: dict[str, tuple[str, str]] = {}  # file -> day, broker
        self.rows: dict[str, list[Listed]] = {}
        self._first: dict[str, str] = {}
        self._left = limits.max_bytes

    def take(self, archive: zipfile.ZipFile) -> None:
        entries = archive.infolist()
        if len(entries) > MAX_FILES:
            raise Broken(f"{len(entries)} files, more than {MAX_FILES}")
        for number, entry in enumerate(entries, start=1):
            parts = _NAME.fullmatch(entry.filename)
            if parts is None or not _is_day(parts[1]):
                what = f"expected YYYYMMDD_BROKER_LIST.csv with a list of {', '.join((*LISTS, REMOVED))}"
                self.problems.add(f"file {number} of {len(entries)}", what)
            elif (file := entry.filename.removesuffix(".csv")) in self.rows:
                self.problems.add(entry.filename, "two files of one name")
            else:
                self.names[file], self.rows[file] = (parts[1], parts[2]), []
                with archive.open(entry) as stream:
                    self._file(file, stream)
        if not entries:
            self.problems.add("the ZIP", "holds no file")
        if len(set(self.names.values())) > 1:
            self.problems.add("the ZIP", "holds files of several days or brokers")

    def _file(self, file: str, stream: IO[bytes]) -> None:
        list_name, name = list_of(file), f"{file}.csv"
        columns = ["ID", "Hash", "ListType"] if list_name == REMOVED else ["ID", "Hash"]
        lines = self._lines(name, stream)
        if next(lines, ("", None))[1] != columns:
            self.problems.add(f"{name}, line 1", f"expected the header {','.join(columns)}")
            return
        for number, (where, cells) in enumerate(lines, start=1):
            if number > self.limits.max_records:
                raise Broken(f"more than limits.max_records {self.limits.max_records} in {name}")
            if cells is not None:
                self._row(where, cells, columns, list_name, self.rows[file])

    def _lines(self, name: str, stream: IO[bytes]) -> Iterator[tuple[str, list[str] | None]]:
        """Yield the cells of each line; None after a line that can't be read. Raise Broken."""
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{name}, line {number}"
            self._left -= len(line)
            if self._left < 0:  # however small the ZIP is, and whatever size it states
                raise Broken(f"more than limits.max_bytes {self.limits.max_bytes} at {where}")
            if len(line) > MAX_LINE_BYTES:
                self.problems.add(where, f"longer than {MAX_LINE_BYTES} bytes; the rest was not read")
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                (cells,) = csv.reader([line.decode("ascii")], strict=True)
            except (UnicodeDecodeError, ValueError, csv.Error):
                self.problems.add(where, "not a line of CSV")
                yield where, None
                continue
            yield where, cells

    def _row(
        self, where: str, cells: list[str], columns: list[str], list_name: str, rows: list[Listed]
    ) -> None:
        if len(cells) != len(columns):
            self.problems.add(where, f"expected {len(columns)} columns, got {len(cells)}")
            return
        item, hashed, list_name = cells[0], cells[1], cells[2] if list_name == REMOVED else list_name
        before = self.problems.count
        add = partial(self.problems.add, where)
        if not _ITEM.fullmatch(item):
            add("ID: expected 12 letters and digits")
        elif (first := self._first.setdefault(item, where)) != where:
            add(f"the ID of {first} again")
        if not _HASH.fullmatch(hashed) or b64encode(b64decode(hashed)).decode() != hashed:
            add(f"Hash: expected 44 characters of base64, a SHA-256; got {len(hashed)} characters")
        if list_name not in LISTS:
            add(f"ListType: expected one of {', '.join(LISTS)}")
        if self.problems.count == before:
            rows.append(Listed(item, list_name, hashed))


def _is_day(text: str) -> bool:
    try:
        day_of(text)
    except ValueError:
        return False
    return True


def is_suffix(text: str) -> bool:
    """Return whether a text may be the suffix of a response's name: up to 10 letters and digits."""
    return _SUFFIX.fullmatch(text) is not None


def upload_name(file: str, suffix: str = "") -> str:
    """Return the name of a response to a list; further responses to it need suffixes of their own."""
    return f"{file}_{suffix}.csv" if suffix else f"{file}.csv"


def responses(statuses: Mapping[str, int]) -> bytes:
    """Return the CSV that reports the status of each work item."""
    return "\n".join(["Id,Status", *(f"{item},{n}" for item, n in statuses.items()), ""]).encode()
