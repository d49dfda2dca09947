"""The log of an evaluation: a header and one JSON line per question.

    {"log": "tofu", "version": 1, "model": digest, "questions": digest, "settings": {...}}
    {"set": "forget10", "idx": 0, "avg_gt_loss": 1.5, "avg_paraphrased_loss": 1.8, ...}

Lines are appended and flushed batch by batch, so an interrupted evaluation continues from its log. A
torn last line is cut off and its question is asked again. A log of another model, other questions or
other settings is refused, and so is a damaged line before the last one.

The names of columns are those of locuslab's logs where they have them. Their published
`eval_log_aggregated.json` holds columns by set, `{"eval_log_forget.json": {"avg_gt_loss": {"0": 1.8,
...}}}`; it is read into the same rows and cannot be continued.

A log holds answers and generated text: protect it as you protect the data.

>>> row = LogRow("retain", 0, 0.7, 3, "Ada.", 0.9, (1.0, 2.0), 1.0, "Ada.")
>>> parse_row(row.line()) == row
True
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

from pydantic import Field, StrictInt, TypeAdapter
from pydantic.dataclasses import dataclass

from sisa.core.digest import canonical_json
from sisa.core.errors import ConfigConflict, IntegrityError, InvalidInput
from sisa.store.blobs.files import disk_errors, take_lock

PUBLISHED = {
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}
ROW_COLUMNS = (
    "avg_gt_loss",
    "num_token_gt",
    "avg_paraphrased_loss",
    "average_perturb_loss",
    "rougeL_recall",
)
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, config={"hide_input_in_errors": True})
class LogRow:
    """The measurements of one question.

    Losses are per token, in nats; None where the set is not asked for it. Everything after
    `generation` is absent from locuslab's logs. `num_token_said` leaves out the tokens that close an
    answer, and so do `logprob` and `others_logprob`, the log-probabilities of the answer and of the
    perturbed ones as a whole. `min_40` is Min-K% with PrivLeak's k. `accepted` are other right answers.
    """

    set: str
    idx: StrictInt
    avg_gt_loss: Number
    num_token_gt: int
    ground_truth: str = field(repr=False)
    avg_paraphrased_loss: Number | None
    average_perturb_loss: tuple[Number, ...]
    rougeL_recall: Number | None
    generation: str | None = field(repr=False)
    extraction_strength: Number | None = None
    exact_memorisation: Number | None = None
    loss: Number | None = None
    zlib: Number | None = None
    min_k: Number | None = None
    min_k_plus_plus: Number | None = None
    num_token_said: int | None = None
    min_40: Number | None = None
    logprob: Number | None = None
    others_logprob: tuple[Number, ...] = ()
    accepted: tuple[str, ...] = field(default=(), repr=False)

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


_ROW = TypeAdapter(LogRow)


def parse_row(line: bytes) -> LogRow:
    """Return the row of a line of JSON. Raise ValueError, without its text, for anything else."""
    return _ROW.validate_json(line)


def _published_rows(held: Mapping[str, Any]) -> list[LogRow]:
    """Return the rows of locuslab's published columns.

    The forget set is called "forget", because the file does not say which one it is.
    """
    rows = []
    for name, columns in held.items():
        for number, (_, generation, truth) in columns["generated_text"].items():
            row = {each: columns[each][number] for each in ROW_COLUMNS}
            texts = {"generation": generation, "ground_truth": truth}
            row |= {"set": PUBLISHED[name], "idx": int(number), **texts}
            rows.append(_ROW.validate_python(row))
    return rows


VERSION = 1
NEXT_STEP = "name another output directory, or remove the log"


@dataclass(frozen=True)
class Header:
    """The subject of a log. Equal headers mean equal measurements up to the machine's arithmetic."""

    model: str
    questions: str
    settings: Mapping[str, Any]
    log: str = "tofu"

    def line(self) -> bytes:
        return canonical_json({"version": VERSION, **asdict(self)}) + b"\n"


class Row(Protocol):
    """A line of a log; no two have the same place."""

    @property
    def place(self) -> object: ...

    def line(self) -> bytes: ...


_Row = TypeVar("_Row", bound=Row)


def read_log(path: Path) -> tuple[Header | None, list[LogRow]]:
    """Return the header, or None for a published log, and the rows of whole lines.

    Raise InvalidInput or IntegrityError.
    """
    with disk_errors(path):
        data = path.read_bytes()
    try:
        held = json.loads(data)
    except (ValueError, RecursionError):  # several lines: a log of this program
        held = None
    if not isinstance(held, dict) or not held or not held.keys() <= PUBLISHED.keys():
        return _parsed(data[: data.rfind(b"\n") + 1], path, parse_row)
    try:
        return None, _published_rows(held)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise IntegrityError(
            "a published log is damaged", where=str(path), next_step="fetch it again"
        ) from None


def _parsed(data: bytes, path: Path, parse: Callable[[bytes], _Row]) -> tuple[Header | None, list[_Row]]:
    lines = data.splitlines()
    header = _header(lines[0]) if lines else None
    rows: dict[object, _Row] = {}
    first = 0 if header is None else 1
    for number, line in enumerate(lines[first:], start=first + 1):
        where = f"{path}, line {number}"
        try:
            row = parse(line)
        except ValueError:
            if number == 1:
                raise InvalidInput(
                    "the file is not a log",
                    where=str(path),
                    expected="a header in its first line",
                    next_step="name another file, or another directory of logs",
                ) from None
            raise IntegrityError("a log is damaged", where=where, next_step=NEXT_STEP) from None
        if row.place in rows:
            raise IntegrityError("a log holds a question twice", where=where, next_step=NEXT_STEP)
        rows[row.place] = row
    return header, list(rows.values())


def _header(line: bytes) -> Header | None:
    try:
        held = json.loads(line)
        if held["version"] != VERSION:
            return None
        return Header(held["model"], held["questions"], held["settings"], held["log"])
    except (ValueError, TypeError, KeyError):
        return None


class LogWriter(Generic[_Row]):
    """A log that is being written; `rows` are those that it holds."""

    def __init__(self, path: Path, header: Header, parse: Callable[[bytes], _Row]) -> None:
        """Start a log, or open one to continue it; `parse` reads a row, or raises ValueError.

        Raise Busy, ConfigConflict or IntegrityError.
        """
        self._path, self._parse = path, parse
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with ExitStack() as opened:
            self._file = opened.enter_context(os.fdopen(handle, "r+b"))
            take_lock(handle, path, "writes this log", patience_s=0)
            self.rows = self._continued(header)
            opened.pop_all()

    def _continued(self, header: Header) -> list[_Row]:
        """Cut off a torn last line, begin a new log with its header, and return the rows."""
        with disk_errors(self._path):
            held = self._file.read()
        whole = held[: held.rfind(b"\n") + 1]
        found, rows = _parsed(whole, self._path, self._parse)
        if whole:
            _check_same_evaluation(self._path, found, header)
        with disk_errors(self._path):
            self._file.truncate(len(whole))
        if not whole:
            self._write(header.line())
        return rows

    def append(self, rows: Sequence[_Row]) -> None:
        """Append rows and return when they are on the disk."""
        self._write(b"".join(row.line() for row in rows))
        self.rows += rows

    def _write(self, lines: bytes) -> None:
        with disk_errors(self._path):
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> LogWriter[_Row]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _check_same_evaluation(path: Path, found: Header | None, wanted: Header) -> None:
    if found is None:
        raise InvalidInput(
            "the file is not a log that can be continued",
            where=str(path),
            expected="a header in its first line",
            next_step=NEXT_STEP,
        )
    names = [
        name for name in ("log", "model", "questions") if getattr(found, name) != getattr(wanted, name)
    ]
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
