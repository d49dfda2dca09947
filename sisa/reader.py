"""JSON lines, Parquet and Hugging Face datasets -> records, or a list of all that is wrong with them.

Rules: everything is read before anything is believed: problems over all sources are collected and
raised as one InvalidInput, and then nothing was read. Problems name files, lines and rows, never a text
or an id. What a row must be is said in `record_rules.py`; ids are unique over all sources. What needs
`datasets` (a hub name, a directory of `save_to_disk`) goes through `dataset_export.py`.

Not covered: lengths in tokens, placing records.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "people.jsonl")
...     _ = file.write_text('{"id": "r1", "text": "Ada wrote."}\\n{"id": "r1", "text": "Again."}\\n')
...     try:
...         read_records([file])
...     except InvalidInput as error:
...         print(error.problems[0].where, "-", error.problems[0].what)
people.jsonl, line 2 - the id of people.jsonl, line 1 again
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sisa.bands import RISK_COLUMN
from sisa.config import DATA_SUFFIXES, is_local
from sisa.config_types import DatasetSource
from sisa.dataset_export import Broken, export_rows
from sisa.domain import BODY_COLUMNS, GENERATION_COLUMN, Record
from sisa.errors import InvalidInput, Problem, SisaError
from sisa.record_rules import KINDS, kind_of, name_problems, record_of, record_problems

PARQUET_BATCH_ROWS = 1024
DEFAULT_GROUP_BY = "subject_id"
_POSITION = re.compile(r"\brecord (\d+)\b")
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")

Rows = Iterator[tuple[str, Any]]  # where it stands, and a mapping or a Broken


class ReadRecords(list[Record]):
    """Records, and beside each the line or row where it stood."""

    def __init__(self, records: Iterable[Record] = (), places: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.places = list(places)


@contextmanager
def named_by_place(source: Sequence[Record]) -> Iterator[None]:
    """Let refusals that tell records of a source by their positions, as what has no file must, tell the
    lines where they stood."""
    places = source.places if isinstance(source, ReadRecords) else None
    try:
        yield
    except SisaError as error:
        if places is not None:
            error.problems = tuple(_placed(each, places) for each in error.problems)
        raise


def _placed(problem: Problem, places: Sequence[str]) -> Problem:
    if not _POSITION.fullmatch(problem.where):
        return problem
    where, what = (
        _POSITION.sub(lambda found: places[int(found[1]) - 1], told)
        for told in (problem.where, problem.what)
    )
    return Problem(where, what)


def read_records(
    sources: Sequence[DatasetSource | Path | str], group_by: str = DEFAULT_GROUP_BY
) -> ReadRecords:
    """All records of all sources, in their order.

    Raises InvalidInput with every problem, and EnvironmentFault when the hub can't be reached.
    """
    listed = [
        each if isinstance(each, DatasetSource) else DatasetSource(path=str(each)) for each in sources
    ]
    columns = (*BODY_COLUMNS, "id", group_by, RISK_COLUMN, GENERATION_COLUMN)
    reading = _Reading(group_by)
    for source, label in zip(listed, _labels(listed), strict=True):
        reading.take_all(_rows(source, label, columns), label)
    if group_by != DEFAULT_GROUP_BY and reading.records and not reading.seen_group_by:
        reading.problems.append(Problem("sisa.group_by", "no record has a column of this name"))
    if reading.problems:
        raise _refusal(reading.problems, "in the records; nothing was read")
    return reading.records


def read_texts(sources: Sequence[DatasetSource]) -> list[str]:
    """The column `text` of all sources, in their order; blank ones left out. No ids are needed.

    Raises InvalidInput with every problem, and EnvironmentFault when the hub can't be reached.
    """
    texts: list[str] = []
    problems: list[Problem] = []

    def take(where: str, value: Any) -> None:
        text = value.get("text") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            texts.extend([text] if text.strip() else [])
        else:
            what = str(value) if isinstance(value, Broken) else "expected a text in `text`"
            problems.append(Problem(where, what))

    for source, label in zip(sources, _labels(sources), strict=True):
        problems += _read_each(_rows(source, label, ("text",)), label, take)[1]
    if not texts and not problems:
        problems.append(Problem(", ".join(_labels(sources)), "holds no text"))
    if problems:
        raise _refusal(problems, "in the corpus; nothing was read")
    return texts


def read_ids(path: Path) -> list[str]:
    """The ids of a file, one a line, each once. Raises InvalidInput with every problem."""
    ids: dict[str, None] = {}
    problems = []
    try:
        for number, line in _lines(path):
            where = f"{path.name}, line {number}"
            try:
                text = _decoded(line).removesuffix("\n").removesuffix("\r")
            except Broken as error:
                problems.append(Problem(where, str(error)))
                continue
            if text.strip():
                problems += [Problem(where, what) for what in name_problems("the id", text)]
                ids[text] = None
    except OSError as error:
        problems.append(Problem(path.name, f"can't be read: {error.strerror}"))
    if not ids and not problems:
        problems.append(Problem(path.name, "holds no id"))
    if problems:
        raise _refusal(problems, "in the list of ids; nothing was done")
    return list(ids)


def _refusal(problems: list[Problem], what: str) -> InvalidInput:
    return InvalidInput(
        f"{len(problems)} problem{'s' * (len(problems) != 1)} {what}",
        next_step="mend the files and run the command again",
        problems=problems,
    )


def _labels(sources: Sequence[DatasetSource]) -> list[str]:
    """Short names for messages; whole paths where two files share a name."""
    short = [Path(each.path).name if os.path.exists(each.path) else each.path for each in sources]
    count = Counter(short)
    return [name if count[name] == 1 else each.path for name, each in zip(short, sources, strict=True)]


class _Reading:
    """Records and problems so far, and where each id was first met."""

    def __init__(self, group_by: str) -> None:
        self.group_by = group_by
        self.records = ReadRecords()
        self.problems: list[Problem] = []
        self.seen_group_by = False
        self._first: dict[str, str] = {}

    def take_all(self, rows: Rows, label: str) -> None:
        number, problems = _read_each(rows, label, self._take)
        self.problems += problems or ([] if number else [Problem(label, "holds no record")])

    def _take(self, where: str, value: Any) -> None:
        if isinstance(value, Broken):
            self.problems.append(Problem(where, str(value)))
            return
        if not isinstance(value, Mapping):
            self.problems.append(Problem(where, f"expected a JSON object, got {kind_of(value)}"))
            return
        self.seen_group_by = self.seen_group_by or self.group_by in value
        problems = list(record_problems(value, self.group_by))
        record_id = value.get("id")
        if isinstance(record_id, str):
            first = self._first.setdefault(record_id, where)
            if first != where:
                problems.append(f"the id of {first} again")
        self.problems += [Problem(where, what) for what in problems]
        if not problems:
            self.records.append(record_of(value, self.group_by))
            self.records.places.append(where)


def _read_each(rows: Rows, label: str, take: Callable[[str, Any], None]) -> tuple[int, list[Problem]]:
    """Give all rows of a source to `take`: their number, and what is wrong with the whole source."""
    number = 0
    try:
        for where, value in rows:
            number += 1
            take(where, value)
    except Broken as error:
        return number, [Problem(label, str(error))]
    except OSError as error:
        return number, [Problem(label, f"can't be read: {error.strerror or 'corrupt or truncated'}")]
    return number, []


def _rows(source: DatasetSource, label: str, columns: Sequence[str]) -> Rows:
    path = Path(source.path)
    if path.is_dir() and not any((path / each).exists() for each in SAVED_DATASET_FILES):
        inside = sorted(each for each in path.iterdir() if each.suffix.lower() in DATA_SUFFIXES)
        for file in inside:
            yield from _file_rows(file, f"{label}/{file.name}", columns)
    elif path.is_dir() or not (path.exists() or is_local(source.path)):
        with tempfile.TemporaryDirectory(prefix="sisa-scratch-") as scratch:
            table = export_rows(source, Path(scratch))
            yield from _parquet_rows(table, label, columns)
    else:
        yield from _file_rows(path, label, columns)


def _file_rows(path: Path, label: str, columns: Sequence[str]) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise Broken(f"unsupported suffix; expected one of {', '.join(DATA_SUFFIXES)}")
    return _parquet_rows(path, label, columns) if suffix == ".parquet" else _json_rows(path, label)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_rows(path: Path, label: str) -> Rows:
    for number, line in _lines(path):
        if line.strip():
            yield f"{label}, line {number}", _caught(_json, line)


def _caught(parse: Callable[[bytes], Any], line: bytes) -> Any:
    try:
        return parse(line)
    except Broken as error:
        return error


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Broken(f"invalid UTF-8 at byte {error.start + 1} of the line") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(_decoded(line), object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Broken(f"broken JSON at column {error.colno}: {error.msg.split(':')[0]}") from None
    except RecursionError:
        raise Broken("JSON nested too deep") from None
    except ValueError:
        raise Broken("a number with too many digits") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Broken("an object names a key twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise Broken(f"{name} is no JSON value")


def _parquet_rows(path: Path, label: str, columns: Sequence[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = _columns(names, columns)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=wanted):
                for row in _batch_rows(batch):
                    number += 1
                    yield f"{label}, row {number}", row
    except (pa.ArrowException, UnicodeDecodeError):  # of a row, or of a column's name
        raise Broken(f"no readable Parquet after row {number}; corrupt or truncated") from None


def _columns(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns to read. One problem of the whole file is better than the same in each row."""
    wanted = [name for name in dict.fromkeys(names) if name in columns]
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise Broken(f"two columns of one name: {', '.join(twice)}")
    if "id" in columns and "id" not in wanted:
        raise Broken("no column 'id'")
    if not any(set(body) <= set(wanted) for body in KINDS.values()):
        raise Broken("no body; expected a column 'text', or 'prompt' and 'completion', or 'messages'")
    return wanted


def _batch_rows(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            yield _caught_row(batch.slice(index, 1))


def _caught_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return Broken("invalid UTF-8")
