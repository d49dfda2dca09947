"""Mutate inputs: run files, records, lists of ids, ledgers, held files and command lines.

A mutation depends on its random source alone, and changes only the box that it is given. Half of the
mutations know the format (a key gets another value), half do not (bytes are flipped or cut).
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ODD_TEXT = (
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ud800", "\ufeff", "a" * 600, "null", "~", "-1", "..", "'"),
    *("p001-q1", "p001", "p003", "../model", "model", "\U0001f600", "%s%n", "; DROP TABLE heads"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1 << 70, 1e308, float("nan"), float("inf"), 0.5, [], {}, [[]], [None]),
    *({"a": {"b": 1}}, ["x", 1], *ODD_TEXT),
)
YAML_BITS = (
    *("&a ", "*a", "!!python/object:os.system x", "---\n", "- ", "{", "}", "[", "]", ": ", "|"),
    *("\t", "#", "<<: *a", "!!binary x", "0o17", "1e3", "%YAML 1.1\n", "'", '"', "\u2028", "\r", ">"),
    *(
        f"!!{name} "
        for name in ("int", "float", "bool", "null", "timestamp", "set", "omap", "pairs", "map")
    ),
    *("! ", "!local ", "0x", "0b_", "=", "<<", "2001-99-99", "1:59:59", "1" + ":1" * 400 + ".5", ".inf"),
)
REPEATED = (
    "9",
    "0x9",
    "1:",
    "1.",
    "_",
    "a",
    "'",
    "[",
    "- ",
    "\n",
    "lora_r: 8\n",
    "k:\n",
    "x,",
    "? ",
    ": ",
)
JSON_BITS = (
    *("{", "}", "[" * 2000, "]", ",", ":", "NaN", "Infinity", "1" * 5000, '"\\ud800"', "\\u0000"),
    *('"id": 1,', '"text": "x",', '"messages": [],', "\n", "\r", "\ufeff", "//", "1e999", "null"),
)

Random = random.Random


def some_bytes(rnd: Random, data: bytes) -> bytes:
    """Return the bytes with some of them flipped, cut, repeated or inserted."""
    at = rnd.randrange(len(data) + 1)
    to = min(len(data), at + rnd.choice([1, 1, 4, 16, 256, 4096]))
    choices: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([data[at] ^ (1 << rnd.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + rnd.randbytes(to - at) + data[to:],
        lambda: data[:at] + bytes(to - at) + data[to:],
        lambda: data[:at] + data[to:],
        lambda: data[:at] + data[at:to] * 2 + data[to:],
        lambda: data[:at] + rnd.randbytes(rnd.randint(1, 40)) + data[at:],
        lambda: data[:at],
        lambda: b"",
        lambda: data + rnd.randbytes(100),
        lambda: data[at:] + data[:at],
        lambda: data + data,
    ]
    if at == len(data):
        choices = choices[1:]
    for _ in range(rnd.choice([1, 1, 1, 3])):
        data = rnd.choice(choices)()
        at = to = min(at, len(data))
        choices = choices[1:] if len(choices) == 11 else choices
    return data


def some_text(rnd: Random, text: str, bits: Sequence[str]) -> bytes:
    """Return the text with lines or pieces moved, dropped, doubled or replaced by odd ones."""
    lines = text.split("\n")
    at = rnd.randrange(len(lines))
    line = lines[at]
    column = rnd.randrange(len(line) + 1)
    bit = rnd.choice([*bits, *ODD_TEXT])
    choices: list[Callable[[], object]] = [
        lambda: lines.pop(at),
        lambda: lines.insert(at, line),
        lambda: lines.__setitem__(at, line[:column] + bit + line[column:]),
        lambda: lines.__setitem__(at, line[:column] + line[column + 1 :]),
        lambda: lines.__setitem__(at, bit),
        lambda: lines.insert(rnd.randrange(len(lines)), lines.pop(at)),
        lambda: rnd.shuffle(lines),
        lambda: lines.__setitem__(at, " " * rnd.randint(1, 4) + line),
    ]
    rnd.choice(choices)()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _instead(rnd: Random, path: Path) -> str:
    """Replace the file by a directory, a link or nothing."""
    path.unlink()
    what = rnd.choice(["nothing", "a directory", "a loop", "a dangling link"])
    if what == "a directory":
        path.mkdir()
    elif what == "a loop":
        path.symlink_to(path.name)
    elif what == "a dangling link":
        path.symlink_to("no-such-file")
    return f"{what} in place of the file"


def file_bytes(rnd: Random, path: Path) -> str:
    """Mutate a file without knowing its format."""
    if rnd.random() < 0.1:
        return _instead(rnd, path)
    path.write_bytes(some_bytes(rnd, path.read_bytes()))
    return "bytes"


def run_file(rnd: Random, path: Path) -> str:
    text = path.read_text()
    how = rnd.random()
    if how < 0.5:
        content = yaml.safe_load(text)
        block = rnd.choice([content, content, content["sisa"], content["datasets"][0]])
        key = rnd.choice([*block, "shards", "no_such_key", "lora_r", "cluster", "", 3])
        if rnd.random() < 0.2 and key in block:
            del block[key]
        else:
            block[key] = rnd.choice(ODD_VALUES)
        path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
        return "a key"
    if how < 0.8:
        path.write_bytes(some_text(rnd, text, YAML_BITS))
        return "text"
    if how < 0.85:
        bit = rnd.choice(REPEATED) * rnd.choice([100, 1000, 20_000])
        at = rnd.choice([each.start() for each in re.finditer(r"$|(?<=: )|(?<=\n)", text)])
        path.write_text(text[:at] + bit + text[at:])
        return "a repetition"
    return file_bytes(rnd, path)


def jsonl(rnd: Random, path: Path) -> str:
    text = path.read_text()
    how = rnd.random()
    if how < 0.5:
        rows = [json.loads(line) for line in text.splitlines()]
        for _ in range(rnd.randint(1, 3)):
            row = rnd.choice(rows)
            key = rnd.choice([*row, "text", "messages", "id", "extra"])
            value = rnd.choice(ODD_VALUES)
            if key == "messages" and rnd.random() < 0.7:
                value = [{"role": rnd.choice(["user", "assistant", 3]), "content": value}]
            row[key] = value
            if rnd.random() < 0.3:
                row.pop(rnd.choice(list(row)))
        lines = [json.dumps(row, ensure_ascii=rnd.random() < 0.5) for row in rows]
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        return "a column"
    if how < 0.8:
        path.write_bytes(some_text(rnd, text, JSON_BITS))
        return "text"
    return file_bytes(rnd, path)


def parquet(rnd: Random, path: Path) -> str:
    if rnd.random() < 0.5:
        return file_bytes(rnd, path)
    table = pq.read_table(path)
    name = rnd.choice([*table.column_names, "text", "messages", "extra"])
    count = table.num_rows
    odd: list[Callable[[], Any]] = [
        lambda: pa.array([None] * count),
        lambda: pa.array(range(count)),
        lambda: pa.array([b"\xff\xfe"] * count, pa.binary()),
        lambda: pa.array([["x"]] * count),
        lambda: pa.array([{"role": "user", "content": "x"}] * count),
        lambda: pa.array([[{"role": "assistant", "content": "x"}]] * count),
        lambda: pa.array(["x"] * count).dictionary_encode(),
        lambda: pa.array([1.5] * count),
        lambda: pa.array([rnd.choice(ODD_TEXT[:2]) for _ in range(count)]),
        lambda: pa.array([0] * count, pa.timestamp("us")),
        lambda: pa.array(["x"] * count, pa.large_string()),
        lambda: pa.array(["x"] * count, pa.string_view()),
        lambda: pa.array([1] * count, pa.decimal128(38, 2)),
    ]
    column = rnd.choice(odd)()
    if name in table.column_names:
        at = table.column_names.index(name)
        if rnd.random() < 0.2:
            table = table.remove_column(at)
        elif rnd.random() < 0.2:
            table = table.append_column(name, column)
        else:
            table = table.set_column(at, name, column)
    else:
        table = table.append_column(name, column)
    pq.write_table(table.slice(0, rnd.choice([0, 1, count, count])), path)
    return "a column"


def ids_file(rnd: Random, path: Path) -> str:
    if rnd.random() < 0.7:
        path.write_bytes(some_text(rnd, path.read_text(), ODD_TEXT))
        return "text"
    return file_bytes(rnd, path)


def ledger(rnd: Random, path: Path) -> str:
    if rnd.random() < 0.5:
        return file_bytes(rnd, path)
    connection = sqlite3.connect(path)
    try:
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        table = rnd.choice([name for (name,) in connection.execute(tables)])
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        column = rnd.choice(columns)
        odd = rnd.choice(
            ["", "x", -1, 99, 1 << 40, None, b"\xff", 0.5, "{}", "[]", '{"a": 1}', "f" * 64]
        )
        nth = f"SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {rnd.randrange(4)}"  # noqa: S608
        one = f"rowid IN ({nth})"
        statement, values = rnd.choice(
            [
                (f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {one}", (odd,)),  # noqa: S608
                (f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {one}", (odd,)),  # noqa: S608
                (f"UPDATE OR IGNORE {table} SET {column} = ?", (odd,)),  # noqa: S608
                (f"DELETE FROM {table} WHERE {one}", ()),  # noqa: S608
                (f"DELETE FROM {table}", ()),  # noqa: S608
                (f"DROP TABLE {table}", ()),
                (f"ALTER TABLE {table} RENAME COLUMN {column} TO other", ()),
                (f"PRAGMA user_version = {rnd.choice([0, 1, 9, -1])}", ()),
            ]
        )
        try:
            connection.execute(statement, values)
            connection.commit()
        except sqlite3.Error:
            connection.rollback()
            return "a statement that SQLite refused"
        return statement.split()[0].lower()
    finally:
        connection.close()


def held_file(rnd: Random, folder: Path) -> str:
    """Mutate, remove, swap or add a file below a folder of the model."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rnd.choice(files)
    how = rnd.random()
    if how < 0.1:
        other = rnd.choice(files)
        data = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(data)
        return "two files swapped"
    if how < 0.2:
        (path.parent / rnd.choice(["stranger", ".tmp-stranger", "a b", "x.parquet"])).write_bytes(b"?")
        return "a stranger"
    if how < 0.25 and path.parent != folder:
        shutil.rmtree(path.parent)
        return "a directory gone"
    if how < 0.3:
        shutil.rmtree(folder)
        return "the whole folder gone"
    return file_bytes(rnd, path)


def arguments(rnd: Random, line: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return a command line with odd, missing, doubled or mistyped words."""
    found = list(line)
    for _ in range(rnd.choice([1, 1, 2, 3])):
        at = rnd.randrange(len(found)) if found else 0
        odd = rnd.choice([*ODD_TEXT, *options, "\udcff", "1" * 400, "--", "-", "--json=x", "-mx"])
        choices: list[Callable[[], object]] = [
            lambda at=at: found.pop(at) if found else None,  # type: ignore[misc]
            lambda at=at, odd=odd: found.insert(at, odd),  # type: ignore[misc]
            lambda at=at, odd=odd: found.__setitem__(slice(at, at + 1), [odd]),  # type: ignore[misc]
            lambda at=at: found.insert(at, found[at]) if found else None,  # type: ignore[misc]
            lambda: rnd.shuffle(found),
            lambda at=at: found.__setitem__(  # type: ignore[misc]
                slice(at, at + 1), [_typo(rnd, found[at])] if found else []
            ),
        ]
        rnd.choice(choices)()
    return [each.replace("\0", "") for each in found]


def _typo(rnd: Random, word: str) -> str:
    at = rnd.randrange(len(word) + 1)
    return word[:at] + rnd.choice("-=x0 é.") + word[at + rnd.randint(0, 1) :]


def remove(path: Path) -> None:
    """Remove a file, a link or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_back(source: Path, target: Path) -> None:
    """Restore a file, or an empty directory, as it was."""
    remove(target)
    if source.is_dir():
        target.mkdir()
    else:
        shutil.copy(source, target)
