"""Read the rows of a source: JSON Lines, Parquet files, or a Hugging Face dataset.

A row that can't be parsed is a `Broken` in the place of its value; a whole source that can't be read
raises one. No file is in memory as a whole.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "people.jsonl")
...     _ = file.write_text('{"id": "r1"}\\nnonsense\\n')
...     source, wanted = DatasetSource(path=str(file)), WantedColumns((), {})
...     for where, value in raw_rows(source, file.name, wanted, SourceLimits()):
...         print(where, "-", value)
people.jsonl, line 1 - {'id': 'r1'}
people.jsonl, line 2 - broken JSON at column 1: Expecting value
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.config.fields import DATA_SUFFIXES, is_local
from sisa.config.sources import DatasetSource, SourceLimits
from sisa.data.dataset_export import export_rows
from sisa.data.record_rules import Broken
from sisa.store.blobs.temporary_directories import temporary_directory

PARQUET_BATCH_ROWS = 1024
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
RawRows = Iterator[tuple[str, Any]]  # its location, and a mapping or a Broken


@dataclass(frozen=True)
class WantedColumns:
    """The columns to read from a table, and those without which it is refused.

    For each problem in `needs`, the table must have one of these choices of columns.
    """

    columns: Sequence[str]
    needs: Mapping[str, Iterable[tuple[str, ...]]]
    see: Callable[[Collection[str]], None] = lambda _: None  # receives the names of all columns

    def among(self, names: Sequence[str]) -> list[str]:
        """Return the columns to read of those that a table has. Raise Broken for the whole file."""
        self.see(names)
        wanted = [name for name in dict.fromkeys(names) if name in self.columns]
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise Broken(f"two columns of one name: {', '.join(twice)}")
        for what, choices in self.needs.items():
            if not any(set(choice) <= set(wanted) for choice in choices):
                raise Broken(what)
        return wanted


def raw_rows(source: DatasetSource, label: str, wanted: WantedColumns, limits: SourceLimits) -> RawRows:
    """Yield the rows of a source, each with its location, which begins with `label`."""

    def file_rows(file: Path, name: str) -> RawRows:
        suffix = file.suffix.lower()
        if suffix not in DATA_SUFFIXES:
            raise Broken(f"unsupported suffix; expected one of {', '.join(DATA_SUFFIXES)}")
        if not stat.S_ISREG(file.stat().st_mode):
            raise Broken("expected a regular file, got a pipe, a socket or a device")
        if suffix == ".parquet":
            return _parquet_rows(file, name, wanted, limits)
        return _json_rows(file, name, limits)

    path = Path(source.path)
    if path.is_dir() and not any((path / each).exists() for each in SAVED_DATASET_FILES):
        inside = sorted(each for each in path.iterdir() if each.suffix.lower() in DATA_SUFFIXES)
        for file in inside:
            yield from file_rows(file, f"{label}/{file.name}")
    elif path.is_dir() or not (path.exists() or is_local(source.path)):
        with temporary_directory() as folder:
            table = export_rows(source, folder)
            yield from _parquet_rows(table, label, wanted, limits)
    else:
        yield from file_rows(path, label)


def lines_in(path: Path, limits: SourceLimits) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers; a line that is too long is cut right after its limit."""
    most = limits.max_record_bytes
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most + 2):
            number += 1
            rest = line
            while len(line) > most and not rest.endswith(b"\n") and rest:
                rest = file.readline(1 << 20)
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def too_long(limits: SourceLimits) -> str:
    """Return the problem of a line or a record over its limit."""
    return f"longer than limits.max_record_bytes {limits.max_record_bytes}"


def _json_rows(path: Path, label: str, limits: SourceLimits) -> RawRows:
    for number, line in lines_in(path, limits):
        where = f"{label}, line {number}"
        if len(line.rstrip(b"\r\n")) > limits.max_record_bytes:
            yield where, Broken(too_long(limits))
        elif line.strip():
            yield where, _json(line)


def decoded(line: bytes) -> str:
    """Return the text of a line. Raise Broken for invalid UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Broken(f"invalid UTF-8 at byte {error.start + 1} of the line") from None


def _json(line: bytes) -> Any:
    """Return a line's value, or a Broken."""
    try:
        return json.loads(decoded(line), object_pairs_hook=_object, parse_constant=_no_constant)
    except Broken as error:
        return error
    except json.JSONDecodeError as error:
        return Broken(f"broken JSON at column {error.colno}: {error.msg.split(':')[0]}")
    except RecursionError:
        return Broken("JSON nested too deep")
    except ValueError:
        return Broken("a number with too many digits")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Broken("an object names a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise Broken(f"{name} is not a JSON value")


def _parquet_rows(path: Path, label: str, wanted: WantedColumns, limits: SourceLimits) -> RawRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # With dictionary encoding, equal values are in memory once, even if a small file repeats
            # one long text many times.
            texts = [file.schema.column(each).path for each in range(len(file.schema))]
            columns = wanted.among(file.schema_arrow.names)
            _refuse_size(file.metadata, limits)
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{label}, row {number}", _table_row(batch, index)
    except (pa.ArrowException, UnicodeDecodeError):  # of a row, or of a column's name
        raise Broken(f"not a readable Parquet file after row {number}; corrupt or truncated") from None


def _refuse_size(metadata: Any, limits: SourceLimits) -> None:
    """Raise Broken for more rows, or for a larger group of rows, than the limits allow."""
    if metadata.num_rows > limits.max_records:
        raise Broken(f"{metadata.num_rows} rows, more than limits.max_records {limits.max_records}")
    for number in range(metadata.num_row_groups):
        if (size := metadata.row_group(number).total_byte_size) > limits.max_bytes:
            raise Broken(
                f"row group {number}: {size} bytes, more than limits.max_bytes {limits.max_bytes}"
            )


def _table_row(batch: Any, index: int) -> Any:
    """Return one row, and not all at once: each value of a row is a copy of the text in memory."""
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: column[index].as_py() for name, column in columns}
    except UnicodeDecodeError:
        return Broken("invalid UTF-8")
