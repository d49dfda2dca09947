"""The log of an evaluation: a header and one JSON line per question.

    {"log": "tofu", "version": 1, "model": digest, "questions": digest, "settings": {...}}
    {"set": "forget10", "idx": 0, "avg_gt_loss": 1.5, "avg_paraphrased_loss": 1.8, ...}

Lines are appended and flushed batch by batch, so an interrupted evaluation continues from its log. A
torn last line is cut off and its question is asked again. A log of another model, other questions or
other settings is refused, and so is a log with a damaged line before its last one.

The names of columns are those of locuslab's logs where they have them. Their published
`eval_log_aggregated.json` holds columns by set, `{"eval_log_forget.json": {"avg_gt_loss": {"0": 1.8,
...}}}`; it is read into the same rows and cannot be continued.

A log holds answers and generated text: protect it as you protect the data.

>>> row = LogRow("retain", 0, 0.7, 3, "Ada.", 0.9, (1.0, 2.0), 1.0, "Ada.")
>>> parse_row(row.line()) == row
True
>>> header, rows = read_log(Path("full.jsonl"))                               # doctest: +SKIP
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sisa.core.digest import canonical_json
from sisa.core.errors import Busy, ConfigConflict, IntegrityError, InvalidInput
from sisa.store.blobs.files import disk_errors

SCORES = (
    "num_token_said",
    *("extraction_strength", "exact_memorisation"),
    *("loss", "zlib", "min_k", "min_k_plus_plus"),
)

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


@dataclass(frozen=True)
class LogRow:
    """The measurements of one question.

    Losses are per token, in nats; None where the set is not asked for it. The last seven fields are
    absent from locuslab's logs. `num_token_said` leaves out the tokens that close an answer.
    """

    set: str
    idx: int
    avg_gt_loss: float
    num_token_gt: int
    ground_truth: str = field(repr=False)
    avg_paraphrased_loss: float | None
    average_perturb_loss: tuple[float, ...]
    rougeL_recall: float | None
    generation: str | None = field(repr=False)
    extraction_strength: float | None = None
    exact_memorisation: float | None = None
    loss: float | None = None
    zlib: float | None = None
    min_k: float | None = None
    min_k_plus_plus: float | None = None
    num_token_said: int | None = None

    @property
    def place(self) -> tuple[str, int]:
        return self.set, self.idx

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def parse_row(line: bytes) -> LogRow:
    """Return the row of a line of JSON. Raise ValueError for anything else."""
    try:
        return _row(json.loads(line))
    except RecursionError as error:
        raise ValueError("not a row of a log") from error


def published_rows(held: Any) -> list[LogRow] | None:
    """Return the rows of locuslab's published columns, or None for JSON of another form.

    The forget set is called "forget", because the file does not say which one it is. Raise ValueError
    for columns that lack a value or hold one of another kind.
    """
    if not isinstance(held, dict) or not held or not held.keys() <= PUBLISHED.keys():
        return None
    rows = []
    for name, columns in held.items():
        try:
            for number, (_, generation, truth) in columns["generated_text"].items():
                row = {each: columns[each][number] for each in ROW_COLUMNS}
                texts = {"generation": generation, "ground_truth": truth}
                rows.append(_row({"set": PUBLISHED[name], "idx": int(number), **row, **texts}))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("not columns of a published log") from error
    return rows


def _row(held: Any) -> LogRow:
    try:
        kept = {name: held[name] for name in LogRow.__dataclass_fields__ if name in held}
        kept["average_perturb_loss"] = tuple(held["average_perturb_loss"])
        row = LogRow(**kept)
    except (TypeError, KeyError) as error:
        raise ValueError("not a row of a log") from error
    optional = (row.avg_paraphrased_loss, row.rougeL_recall, *(getattr(row, name) for name in SCORES))
    numbers = [
        row.avg_gt_loss,
        *row.average_perturb_loss,
        *(each for each in optional if each is not None),
    ]
    kinds = isinstance(row.set, str) and isinstance(row.idx, int) and isinstance(row.ground_truth, str)
    if not kinds or not all(map(_is_number, numbers)):
        raise ValueError("not a row of a log")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


KIND, VERSION = "tofu", 1
NEXT_STEP = "name another output directory, or remove the log"


@dataclass(frozen=True)
class Header:
    """The subject of a log. Equal headers mean equal measurements up to the machine's arithmetic."""

    model: str
    questions: str
    settings: Mapping[str, Any]

    def line(self) -> bytes:
        return canonical_json({"log": KIND, "version": VERSION, **asdict(self)}) + b"\n"


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
        """Start a log, or open one to continue it. Raise Busy, ConfigConflict or IntegrityError."""
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
            _check_same_evaluation(self._path, found, header)
        with disk_errors(self._path):
            self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
        if not whole:
            self._write([header.line()])

    def append(self, rows: Sequence[LogRow]) -> None:
        """Append rows and return when they are on the disk."""
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


def _check_same_evaluation(path: Path, found: Header | None, wanted: Header) -> None:
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
