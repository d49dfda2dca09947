"""JSON lines, Parquet and Hugging Face datasets -> records, or a list of all that is wrong with them.

Rules: everything is read before anything is believed: problems over all sources are collected and
raised as one InvalidInput, and then nothing was read. Problems name files, lines and rows, never a text
or an id. A record has a unique `id` (a string), an optional subject in the column `group_by`, and
exactly one body, found by its columns: `text`, `prompt` with `completion`, or `messages`. A null counts
as absent; other columns are ignored.

Whatever needs `datasets` (a hub name, a directory of `save_to_disk`) is turned into one Parquet file by
a child process whose caches, temporary files and home of Hugging Face lie in a scratch directory, which
is erased whatever happens: the library's cache would keep the text of deleted records.

Not covered: lengths in tokens, placing records, hub datasets that need their own code, and a scratch
directory left behind when this process itself is killed.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "people.jsonl")
...     _ = file.write_text('{"id": "r1", "text": "Ada wrote."}\\n{"id": "r1", "text": "Again."}\\n')
...     try:
...         read_records([file])
...     except InvalidInput as error:
...         print(error.problems[0].where, "-", error.problems[0].what)
people.jsonl, line 2 - the id of people.jsonl, line 1 again

Source: the column names of TRL's dataset formats.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sisa.config import BODY_COLUMNS, DATA_SUFFIXES, DatasetSource, is_local
from sisa.domain import Part, Record
from sisa.errors import EnvironmentFault, InvalidInput, Problem

MAX_ID_CHARS = 512
PARQUET_BATCH_ROWS = 1024
DEFAULT_GROUP_BY = "subject_id"
ROLES = ("system", "user", "assistant")
KINDS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
UNFIT = {
    "Cc": "a control character",
    "Cs": "a lone surrogate",
    "Zl": "a line break",
    "Zp": "a line break",
}

Rows = Iterator[tuple[str, Any]]  # where it stands, and a mapping or a _Broken


class _Broken(Exception):
    """A row, or a whole source, that can't be parsed."""


def read_records(
    sources: Sequence[DatasetSource | Path | str], group_by: str = DEFAULT_GROUP_BY
) -> list[Record]:
    """All records of all sources, in their order.

    Raises InvalidInput with every problem, and EnvironmentFault when the hub can't be reached.
    """
    listed = [
        each if isinstance(each, DatasetSource) else DatasetSource(path=str(each)) for each in sources
    ]
    reading = _Reading(group_by)
    for source, label in zip(listed, _labels(listed), strict=True):
        reading.take_all(_rows(source, label, (*BODY_COLUMNS, "id", group_by)), label)
    if group_by != DEFAULT_GROUP_BY and reading.records and not reading.seen_group_by:
        reading.problems.append(Problem("sisa.group_by", "no record has a column of this name"))
    if reading.problems:
        raise _refusal(reading.problems, "in the records; nothing was read")
    return reading.records


def read_ids(path: Path) -> list[str]:
    """The ids of a file, one a line, each once. Raises InvalidInput with every problem."""
    ids: dict[str, None] = {}
    problems = []
    try:
        for number, line in _lines(path):
            where = f"{path.name}, line {number}"
            try:
                text = _decoded(line).removesuffix("\n").removesuffix("\r")
            except _Broken as error:
                problems.append(Problem(where, str(error)))
                continue
            if text.strip():
                problems += [Problem(where, what) for what in _name_problems("the id", text)]
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
        self.records: list[Record] = []
        self.problems: list[Problem] = []
        self.seen_group_by = False
        self._first: dict[str, str] = {}

    def take_all(self, rows: Rows, label: str) -> None:
        where = None
        try:
            for where, value in rows:
                self._take(where, value)
        except _Broken as error:
            self.problems.append(Problem(label, str(error)))
        except OSError as error:
            self.problems.append(
                Problem(label, f"can't be read: {error.strerror or 'corrupt or truncated'}")
            )
        else:
            if where is None:
                self.problems.append(Problem(label, "holds no record"))

    def _take(self, where: str, value: Any) -> None:
        if isinstance(value, _Broken):
            self.problems.append(Problem(where, str(value)))
            return
        if not isinstance(value, Mapping):
            self.problems.append(Problem(where, f"expected a JSON object, got {_kind(value)}"))
            return
        self.seen_group_by = self.seen_group_by or self.group_by in value
        problems = list(_record_problems(value, self.group_by))
        record_id = value.get("id")
        if isinstance(record_id, str):
            first = self._first.setdefault(record_id, where)
            if first != where:
                problems.append(f"the id of {first} again")
        self.problems += [Problem(where, what) for what in problems]
        if not problems:
            self.records.append(_record(value, self.group_by))


def _record(value: Mapping[str, Any], group_by: str) -> Record:
    if value.get("text") is not None:
        return Record(value["id"], value.get(group_by), "text", (Part("text", value["text"]),))
    if value.get("messages") is not None:
        turns = tuple(Part(turn["role"], turn["content"]) for turn in value["messages"])
        return Record(value["id"], value.get(group_by), "chat", turns)
    pair = tuple(Part(column, value[column]) for column in KINDS["completion"])
    return Record(value["id"], value.get(group_by), "completion", pair)


def _record_problems(value: Mapping[str, Any], group_by: str) -> Iterator[str]:
    if value.get("id") is None:
        yield "no 'id'"
    else:
        yield from _name_problems("'id'", value["id"])
    if value.get(group_by) is not None:
        yield from _name_problems(f"'{group_by}'", value[group_by])
    present = [kind for kind, columns in KINDS.items() if any(value.get(c) is not None for c in columns)]
    if len(present) > 1:
        given = ", ".join(column for column in BODY_COLUMNS if value.get(column) is not None)
        yield f"expected one body, got several: {given}"
    elif not present:
        yield "no body; expected 'text', or 'prompt' and 'completion', or 'messages'"
    elif present == ["chat"]:
        yield from _messages_problems(value["messages"])
    else:
        for column in KINDS[present[0]]:
            if value.get(column) is None:
                yield f"no '{column}'"
            else:
                yield from _text_problems(f"'{column}'", value[column], may_be_blank=column == "prompt")


def _name_problems(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{name}: expected a string, got {_kind(value)}"
        return
    if not value.strip():
        yield f"{name} is empty"
    if len(value) > MAX_ID_CHARS:
        yield f"{name} has {len(value)} characters, at most {MAX_ID_CHARS} are allowed"
    for unfit in sorted({UNFIT[each] for each in map(unicodedata.category, value) if each in UNFIT}):
        yield f"{name} holds {unfit}"


def _text_problems(name: str, value: Any, may_be_blank: bool) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{name}: expected a string, got {_kind(value)}"
        return
    if not may_be_blank and not value.strip():
        yield f"{name} is empty"
    if "\0" in value:
        yield f"{name} holds a NUL character"
    if any("\ud800" <= each <= "\udfff" for each in value):
        yield f"{name} holds a lone surrogate"


def _messages_problems(value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"'messages': expected a list, got {_kind(value)}"
        return
    answered = False
    for number, turn in enumerate(value, start=1):
        name = f"'messages', turn {number}"
        if not isinstance(turn, Mapping):
            yield f"{name}: expected an object, got {_kind(turn)}"
            continue
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            yield f"{name}: expected a role of {', '.join(ROLES)}"
        yield from _text_problems(f"{name}, content", content, may_be_blank=True)
        answered = answered or (
            role == "assistant" and isinstance(content, str) and bool(content.strip())
        )
    if not answered:
        yield "'messages' has no assistant turn with content"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", bytes: "bytes"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), "a value of another type")


def _rows(source: DatasetSource, label: str, columns: Sequence[str]) -> Rows:
    path = Path(source.path)
    if path.is_dir() and not any((path / each).exists() for each in SAVED_DATASET_FILES):
        inside = sorted(each for each in path.iterdir() if each.suffix.lower() in DATA_SUFFIXES)
        for file in inside:
            yield from _file_rows(file, f"{label}/{file.name}", columns)
    elif path.is_dir() or not (path.exists() or is_local(source.path)):
        with tempfile.TemporaryDirectory(prefix="sisa-scratch-") as scratch:
            table = _with_datasets(source, Path(scratch))
            yield from _parquet_rows(table, label, columns)
    else:
        yield from _file_rows(path, label, columns)


def _file_rows(path: Path, label: str, columns: Sequence[str]) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise _Broken(f"unsupported suffix; expected one of {', '.join(DATA_SUFFIXES)}")
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
    except _Broken as error:
        return error


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Broken(f"invalid UTF-8 at byte {error.start + 1} of the line") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(_decoded(line), object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _Broken(f"broken JSON at column {error.colno}: {error.msg.split(':')[0]}") from None
    except RecursionError:
        raise _Broken("JSON nested too deep") from None
    except ValueError:
        raise _Broken("a number with too many digits") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Broken("an object names a key twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise _Broken(f"{name} is no JSON value")


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
    except pa.ArrowException:
        raise _Broken(f"no readable Parquet after row {number}; corrupt or truncated") from None


def _columns(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns to read. One problem of the whole file is better than the same in each row."""
    wanted = [name for name in dict.fromkeys(names) if name in columns]
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise _Broken(f"two columns of one name: {', '.join(twice)}")
    if "id" not in wanted:
        raise _Broken("no column 'id'")
    if not any(set(body) <= set(wanted) for body in KINDS.values()):
        raise _Broken("no body; expected a column 'text', or 'prompt' and 'completion', or 'messages'")
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
        return _Broken("invalid UTF-8")


# Names of classes only: a message of the library may quote a record.
_CHILD = """
import json, sys
name, split, target = sys.argv[1:]
report = {}
try:
    import datasets
    from pathlib import Path
    if Path(name).is_dir():
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            report["splits"] = sorted(data)
            data = data[split]
    else:
        data = datasets.load_dataset(name, split=split, cache_dir=sys.argv[3] + ".cache")
    data.to_parquet(target)
except BaseException as error:
    report["errors"] = [kind.__name__ for kind in type(error).__mro__]
    report["errno"] = getattr(error, "errno", None)
print(json.dumps(report))
"""


def _with_datasets(source: DatasetSource, scratch: Path) -> Path:
    """One Parquet file in `scratch` with the rows of a saved or a hub dataset."""
    target = scratch / "rows.parquet"
    local = os.path.isdir(source.path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, source.path, source.split, str(target)],
        env=_scratch_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    report = _report(done.stdout)
    errors = report.get("errors", [] if target.exists() else ["Killed"])
    if not errors:
        return target
    if "KeyError" in errors and source.split not in report.get("splits", [source.split]):
        raise _Broken(f"no split '{source.split}'; it has {', '.join(report['splits'])}")
    if "DatasetNotFoundError" in errors:
        raise _Broken("no such dataset on the hub, or one that this user can't read")
    if "ValueError" in errors and not local:
        raise _Broken(f"no split '{source.split}', or several configurations")
    machine = {"Killed", "ModuleNotFoundError", "MemoryError", "KeyboardInterrupt"} & set(errors)
    if local and not machine and report.get("errno") not in (errno.ENOSPC, errno.EDQUOT):
        raise _Broken(f"no readable dataset ({errors[0]}); corrupt or truncated")
    raise EnvironmentFault(
        f"the dataset '{source.path}' can't be fetched",
        got=errors[0],
        next_step="check the network, the free disk space and the name, then try again",
    )


def _report(output: bytes) -> dict[str, Any]:
    try:
        found = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return {"errors": ["Killed"]}
    return found if isinstance(found, dict) else {"errors": ["Killed"]}


def _scratch_environment(scratch: Path) -> dict[str, str]:
    """The environment of the child: all caches in scratch, but the user's token stays in use."""
    environ = dict(os.environ)
    caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = environ.get("HF_HOME") or str(caches / "huggingface")
    token = environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    for name in list(environ):
        if name.startswith(("HF_", "HUGGINGFACE_")) and name.endswith("_CACHE"):
            del environ[name]
    return environ | {
        "HF_HOME": str(scratch / "hf"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "TMPDIR": str(scratch),
        "HF_TOKEN_PATH": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
