"""Search for given strings in bytes at rest: any file, decoded Parquet, decoded SQLite.

A string is searched as UTF-8, as JSON writes it and as UTF-16. The strings never leave this module: a
match gives a position and the string's number. Strings shorter than five bytes (eight, if a digest could
contain them) occur by chance, so they are compared with whole decoded values only. Text that is
compressed (other than in Parquet), encrypted, split over SQLite's overflow pages or paraphrased is not
found.

>>> strings = SearchStrings(["Ada L."], ["ada"])
>>> strings.in_block(b"..Ada L.."), strings.in_value("by Ada L. 1843"), strings.in_id("ada2")
([(2, 0)], [0], [])
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sisa.store.blobs.sqlite_files import open_readonly, read_beside

MIN_BYTES, MIN_HEX_BYTES = 5, 8
READ_BYTES = 2**22
PREFIX_BYTES = 4
SQLITE_MAGIC = b"SQLite format 3\0"
PARQUET_MAGIC = b"PAR1"
ID_COLUMNS = ("id", "subject_id")


@dataclass(frozen=True, slots=True)
class Match:
    """Hold a string's number and its position: `byte 12`, `row 3, column id`, `table requests`."""

    position: str
    number: int


class SearchStrings:
    """Search for texts, which match anywhere, and for ids, which must equal a value of an id column."""

    def __init__(self, texts: Sequence[str], ids: Sequence[str] = ()) -> None:
        self._values = [*texts, *ids]
        self._ids = {text: len(texts) + number for number, text in enumerate(ids)}
        self._texts = range(len(texts))
        self._by_prefix: dict[bytes, list[tuple[bytes, int]]] = {}
        # Which pairs of bytes a form may begin with, and which may come next: a quick filter.
        self._low = np.zeros(65536, dtype=bool)
        self._high = np.zeros(65536, dtype=bool)
        self._longest = 0
        for number, value in enumerate(self._values):
            for form in sorted(_forms(value)):
                self._by_prefix.setdefault(form[:PREFIX_BYTES], []).append((form, number))
                self._low[int.from_bytes(form[:2], "little")] = True
                self._high[int.from_bytes(form[2:PREFIX_BYTES], "little")] = True
                self._longest = max(self._longest, len(form))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_short(self) -> int:
        """Return the number of strings that are too short to be searched in raw bytes."""
        return sum(is_short(value) for value in self._values)

    def in_block(self, block: bytes) -> list[tuple[int, int]]:
        """Return (offset, number) for every occurrence of a string in a block of bytes."""
        if len(block) < PREFIX_BYTES or not self._longest:
            return []
        data = np.frombuffer(block, dtype=np.uint8).astype(np.uint16)
        pairs = data[:-1] | (data[1:] << 8)
        starts = np.flatnonzero(self._low[pairs[:-2]] & self._high[pairs[2:]])
        return [
            (start, number)
            for start in starts.tolist()
            for form, number in self._by_prefix.get(block[start : start + PREFIX_BYTES], ())
            if block.startswith(form, start)
        ]

    def in_value(self, value: str) -> list[int]:
        """Return the numbers of the strings that a decoded value contains (short ones: equals)."""
        return [number for number in range(len(self)) if self._is_in(number, value)]

    def _is_in(self, number: int, value: str) -> bool:
        each = self._values[number]
        return each == value if is_short(each) else each in value

    def in_id(self, value: str) -> list[int]:
        """Return the numbers of the texts that a decoded id contains and of the ids that it equals."""
        texts = [number for number in self._texts if self._is_in(number, value)]
        return texts + ([self._ids[value]] if value in self._ids else [])

    def hidden(self, path: str) -> str:
        """Return a path with the strings masked, since a file may be named like one."""
        for value in self._values:
            if value in path and not is_short(value):
                path = path.replace(value, "*")
        return path

    def in_file(self, path: Path, unsealed: bytes | None = None, *, tables: bool = True) -> list[Match]:
        """Return each string's first match in a file or, if given, in its `unsealed` bytes.

        Without `tables`, pages of SQLite are searched, and not each of their values for each string.
        """
        if not len(self):
            return []
        with read_beside(path) if unsealed is None else io.BytesIO(unsealed) as file:
            head = file.read(len(SQLITE_MAGIC))
            file.seek(0)
            raw = _firsts(self._in_stream(file))
        decoded: list[Match] = []
        explained: set[int] = set()
        if head.startswith(PARQUET_MAGIC):
            decoded, explained = self._in_parquet(path if unsealed is None else io.BytesIO(unsealed))
        elif head == SQLITE_MAGIC and tables:
            decoded = self._in_sqlite(path)
        return _firsts([*decoded, *(each for each in raw if each.number not in explained)])

    def _in_stream(self, file: BinaryIO) -> Iterator[Match]:
        carried, start = b"", 0  # `start` is the offset of what is carried over
        while fresh := file.read(READ_BYTES):
            block = carried + fresh
            yield from (Match(f"byte {start + at}", number) for at, number in self.in_block(block))
            carried = block[max(0, len(block) - self._longest + 1) :]
            start += len(block) - len(carried)

    def _in_parquet(self, path: Path | io.BytesIO) -> tuple[list[Match], set[int]]:
        """Return matches in decoded rows, and the strings that are merely parts of longer ids."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found: list[Match] = []
        explained: set[int] = set()
        row = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for values in batch.to_pylist():
                        for column, value in values.items():
                            for text in _strings(value):
                                whole = column in ID_COLUMNS
                                hits = self.in_id(text) if whole else self.in_value(text)
                                found += [Match(f"row {row}, column {column}", n) for n in hits]
                                if whole:
                                    explained |= set(self.in_value(text)) - set(hits)
                        row += 1
        except (pa.ArrowException, OSError):
            return found, set()  # raw bytes are searched anyway
        return found, explained

    def _in_sqlite(self, path: Path) -> list[Match]:
        found: list[Match] = []
        try:
            with closing(open_readonly(path)) as connection:
                for statement in connection.iterdump():
                    found += [Match(_table(statement), n) for n in self._in_statement(statement)]
        except (sqlite3.Error, UnicodeDecodeError):
            return found  # raw pages are searched anyway
        return found

    def _in_statement(self, statement: str) -> list[int]:
        text = statement.replace("''", "'")
        return [
            n for n, each in enumerate(self._values) if (f"'{each}'" if is_short(each) else each) in text
        ]


def _table(statement: str) -> str:
    """Return the table that a statement names; its other words are values.

    >>> _table('INSERT INTO "requests" VALUES(1)'), _table("CREATE INDEX a ON b")
    ('table requests', 'schema')
    """
    words = statement.split('"', 2)
    return f"table {words[1]}" if words[0] == "INSERT INTO " and len(words) > 1 else "schema"


def _forms(value: str) -> set[bytes]:
    forms = {
        value.encode(),
        value.encode("utf-16-le"),
        json.dumps(value)[1:-1].encode(),
        json.dumps(value, ensure_ascii=False)[1:-1].encode(),
    }
    return set() if is_short(value) else forms


def is_short(value: str) -> bool:
    """Return whether a string occurs in random bytes, or in digests, by chance."""
    least = MIN_HEX_BYTES if set(value) <= set("0123456789abcdef") else MIN_BYTES
    return len(value.encode()) < least


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _firsts(places: Iterable[Match]) -> list[Match]:
    first: dict[int, Match] = {}
    for place in places:
        first.setdefault(place.number, place)
    return list(first.values())
