"""Read sources as records, texts or ids, or list everything that is wrong in them.

Problems of all sources are collected and raised as one InvalidInput, and then nothing is returned. They
name files, lines and rows, never a text or an id. Ids are unique over all sources. `SourceLimits` bound
what is read of a source and how many problems are listed.

>>> import tempfile
>>> from sisa.core.errors import InvalidInput
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

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sisa.config.config import RunConfig
from sisa.config.fields import short
from sisa.config.sources import Columns, DatasetSource, SourceLimits, columns_of
from sisa.core.domain import Record
from sisa.core.errors import Problem, Problems, SisaError
from sisa.data.identifiers import hashes, identifier_problems, on_no_list
from sisa.data.record_rules import Broken, name_problems, no_body, record_of, record_problems, type_name
from sisa.data.source_rows import RawRows, WantedColumns, decoded, lines_in, raw_rows, too_long

DEFAULT_GROUP_BY = "subject_id"
MAX_COLUMNS_LISTED, MAX_COLUMNS_KEPT = 8, 100  # unused columns
_POSITION = re.compile(r"\brecord (\d+)\b")

Subjects = Literal["any", "column", "some"]  # what is required: nothing, their column, one of them


class ReadRecords(list[Record]):
    """Records, the line or row of each, and the columns of the sources that were not used."""

    def __init__(self) -> None:
        super().__init__()
        self.locations: list[str] = []
        self.group_by: str | None = None
        self.unused_columns: tuple[str, ...] = ()

    def subject_report(self) -> str:
        """Return how many records have a subject, and which columns were not used."""
        with_subject = sum(each.subject_id is not None for each in self)
        column = f"column '{self.group_by}'" if self.group_by is not None else "group_by: null"
        names = [_shown_column(each) for each in self.unused_columns[:MAX_COLUMNS_LISTED]]
        names += ["..."] * (len(self.unused_columns) > MAX_COLUMNS_LISTED)
        unused = f"; columns not used: {', '.join(names)}" if names else ""
        return f"{with_subject} of {len(self)} records have a subject ({column}){unused}"


def _shown_column(name: str) -> str:
    return short("".join(c for c in name if unicodedata.category(c)[0] != "C"))


@contextmanager
def located_problems(source: Sequence[Record]) -> Iterator[None]:
    """Replace positions of records in the problems of an error by the lines or rows they came from."""
    try:
        yield
    except SisaError as error:
        if isinstance(source, ReadRecords):
            error.problems = tuple(_located(each, source.locations) for each in error.problems)
        raise


def _located(problem: Problem, locations: Sequence[str]) -> Problem:
    def at_location(text: str) -> str:
        return _POSITION.sub(lambda found: locations[int(found[1]) - 1], text)

    known = _POSITION.fullmatch(problem.where)
    return Problem(at_location(problem.where), at_location(problem.what)) if known else problem


def read_records(
    sources: Sequence[DatasetSource | Path | str],
    group_by: str | None = DEFAULT_GROUP_BY,
    limits: SourceLimits = SourceLimits(),  # noqa: B008 - frozen
    *,
    subjects: Subjects = "any",
    identifiers: tuple[tuple[str, str], ...] = (),
) -> ReadRecords:
    """Return all records of all sources, in order. Raise InvalidInput with every problem."""
    listed = [
        each if isinstance(each, DatasetSource) else DatasetSource(path=str(each)) for each in sources
    ]
    reading = _Reading(group_by, limits, identifiers)
    for source, label in zip(listed, _labels(listed), strict=True):
        reading.read_source(source, label)
    return reading.result(subjects)


def read_like(config: RunConfig, path: Path | str, *, subjects: Subjects = "any") -> ReadRecords:
    """Return the records of one more source, with the column names of the run file's first source."""
    source = config.datasets[0].model_copy(update={"path": str(path), "split": "train"})
    return read_records(
        [source],
        config.sisa.group_by,
        config.limits,
        subjects=subjects,
        identifiers=config.identifiers.columns,
    )


def read_texts(sources: Sequence[DatasetSource], limits: SourceLimits) -> list[str]:
    """Return the non-blank texts of all sources, in order. Raise InvalidInput with every problem."""
    texts: list[str] = []
    problems = Problems(limits.max_problems)

    def take(column: str, where: str, value: Any) -> None:
        text = value.get(column) if isinstance(value, Mapping) else value
        if isinstance(text, str):
            texts.extend([text] if text.strip() else [])
        else:
            problems.add(where, f"expected a text in `{column}`")

    for source, label in zip(sources, _labels(sources), strict=True):
        column = source.text_column
        wanted = WantedColumns((column,), {f"no column '{column}'": [(column,)]})
        rows = raw_rows(source, label, wanted, limits)
        _read_each(rows, label, partial(take, column), problems, limits)
    if not texts and not problems.count:
        problems.add(", ".join(_labels(sources)), "holds no text")
    problems.refuse("in the corpus; nothing was read")
    return texts


def read_prompts(path: Path) -> list[Any]:
    """Return `prompt` or `messages` of each row of a file. Raise InvalidInput with every problem."""
    limits, columns = SourceLimits(), ("prompt", "messages")
    wanted = WantedColumns(columns, {"no column 'prompt' or 'messages'": [(each,) for each in columns]})
    rows = raw_rows(DatasetSource(path=str(path)), path.name, wanted, limits)
    prompts: list[Any] = []
    problems = Problems(limits.max_problems)

    def take(where: str, value: Any) -> None:
        bodies = [value.get(each) for each in columns] if isinstance(value, Mapping) else []
        given = [each for each in bodies if isinstance(each, str | list)]
        prompts.extend(given)
        if len(given) != 1:
            problems.add(where, "expected `prompt`, a text, or `messages`, a list")

    if not _read_each(rows, path.name, take, problems, limits) and not problems.count:
        problems.add(path.name, "holds no prompt")
    problems.refuse("in the prompts; nothing was asked")
    return prompts


def read_ids(path: Path, lines: Iterable[bytes] | None = None) -> list[str]:
    """Return the ids of a file, or of the lines of a stream that `path` stands for, each once.

    Raise InvalidInput with every problem.
    """
    ids: dict[str, None] = {}
    limits = SourceLimits()
    problems = Problems(limits.max_problems)
    try:
        for number, line in lines_in(path, limits) if lines is None else enumerate(lines, start=1):
            where = f"{path.name}, line {number}"
            try:
                text = decoded(line).removesuffix("\n").removesuffix("\r")
            except Broken as error:
                problems.add(where, str(error))
                continue
            if text.strip():
                for what in name_problems("the id", text):
                    problems.add(where, what)
                ids[text] = None
    except OSError as error:
        problems.add(path.name, f"can't be read: {error.strerror}")
    if not ids and not problems.count:
        problems.add(path.name, "holds no id")
    problems.refuse("in the list of ids; nothing was done")
    return list(ids)


def _labels(sources: Sequence[DatasetSource]) -> list[str]:
    """Return short names for messages; whole paths if two files share a name."""
    names = [Path(each.path).name if os.path.exists(each.path) else each.path for each in sources]
    count = Counter(names)
    return [name if count[name] == 1 else each.path for name, each in zip(names, sources, strict=True)]


class _Reading:
    """Read sources one after another: collect records and problems, and where each id first occurred."""

    def __init__(
        self, group_by: str | None, limits: SourceLimits, identifiers: tuple[tuple[str, str], ...]
    ) -> None:
        self.group_by = group_by
        self.limits = limits
        self._identifiers = identifiers
        self.records = ReadRecords()
        self.records.group_by = group_by
        self.problems = Problems(limits.max_problems)
        self._seen: dict[str, None] = {}  # names of columns, in order
        self._used: set[str] = set()  # names of columns
        self._has_subjects = False  # whether their column exists
        self._absent = dict(identifiers)  # identifiers whose column was not seen yet
        self._first: dict[str, str] = {}  # where an id occurred first
        self._text_bytes = 0  # of the present source

    def read_source(self, source: DatasetSource, label: str) -> None:
        columns, before = columns_of(source, self.group_by, self._identifiers), self.problems.count
        self._used |= set(columns.used)
        needs = {f"no column '{columns.id}'": [(columns.id,)], no_body(columns): columns.bodies.values()}
        rows = raw_rows(source, label, WantedColumns(columns.used, needs, self._see), self.limits)
        self._text_bytes = 0
        number = _read_each(rows, label, partial(self._take, columns), self.problems, self.limits)
        if not number and self.problems.count == before:
            self.problems.add(label, "holds no record")

    def result(self, subjects: Subjects) -> ReadRecords:
        """Return what was read. Raise InvalidInput with every problem."""
        records = self.records
        records.unused_columns = tuple(each for each in self._seen if each not in self._used)
        nobody = all(each.subject_id is None for each in records)
        absent = (subjects == "column" and not self._has_subjects) or (subjects == "some" and nobody)
        if self.group_by is not None and records and absent and not self.problems.count:
            report = records.subject_report()
            self.problems.add(
                "sisa.group_by",
                f"{report}; name the column, or set `group_by: null` if records have no subject",
            )
        for key in on_no_list(name for name, _ in self._identifiers):
            self.problems.add(f"identifiers.{key}", "on no list of DROP without others: name these, too")
        if subjects != "any" and records:
            for key, column in self._absent.items():
                what = f"no record has a column '{column}'; give it null in records that have none"
                self.problems.add(f"identifiers.{key}", what)
        self.problems.refuse("in the records; nothing was read")
        return records

    def _see(self, names: Collection[str]) -> None:
        self._has_subjects = self._has_subjects or self.group_by in names
        self._absent = {key: column for key, column in self._absent.items() if column not in names}
        if len(self._seen) < MAX_COLUMNS_KEPT:
            self._seen.update(dict.fromkeys(names))

    def _take(self, columns: Columns, where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            self.problems.add(where, f"expected a JSON object, got {type_name(value)}")
            return
        self._see(value)
        problems = list(record_problems(value, columns))
        identifiers = {name: value.get(column) for name, column in columns.identifiers}
        for name, column in columns.identifiers:
            problems += identifier_problems(name, column, identifiers[name])
        record_id = value.get(columns.id)
        if isinstance(record_id, str | int):
            first = self._first.setdefault(str(record_id), where)
            if first != where:
                problems.append(f"the id of {first} again")
        if not problems:
            record = replace(record_of(value, columns), identifiers=tuple(hashes(identifiers)))
            if record.num_bytes <= self.limits.max_record_bytes:
                self.records.append(record)
                self.records.locations.append(where)
                self._text_bytes += record.num_bytes
            else:
                problems.append(too_long(self.limits))
        for what in problems:
            self.problems.add(where, what)
        if self._text_bytes > self.limits.max_bytes:
            raise Broken(f"more than limits.max_bytes {self.limits.max_bytes} of text at {where}")


def _read_each(
    rows: RawRows,
    label: str,
    take: Callable[[str, Any], None],
    problems: Problems,
    limits: SourceLimits,
) -> int:
    """Pass all rows of a source to `take`, and return their number; add problems of the whole source."""
    number = 0
    try:
        for where, value in rows:
            number += 1
            if number > limits.max_records:
                raise Broken(f"more than limits.max_records {limits.max_records}")
            if isinstance(value, Broken):
                problems.add(where, str(value))
            else:
                take(where, value)
    except Broken as error:
        problems.add(label, str(error))
    except OSError as error:
        problems.add(label, f"can't be read: {error.strerror or 'corrupt or truncated'}")
    return number
