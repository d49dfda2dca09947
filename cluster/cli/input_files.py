"""Read what the command line names: files, and standard input for `-`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.core.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from sisa.flows.answers.ask import Prompt


STANDARD_INPUT = Path("-")


def read_text(file: Path) -> str:
    """Read a file that the command line names. Raise InvalidInput if it can't be read as UTF-8."""
    try:
        if file == STANDARD_INPUT:
            return sys.stdin.buffer.read().decode()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise InvalidInput("the file can't be read", where=str(file), got=str(got)) from None


def read_bytes(file: Path) -> bytes:
    """Read a file that the command line names. Raise InvalidInput if it can't be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidInput("the file can't be read", where=str(file), got=str(error.strerror)) from None


def read_lines(file: Path) -> list[str]:
    """Read the lines of a file that are not blank. Raise InvalidInput if there are none."""
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        step = "write one text on each line"
        raise InvalidInput("the file holds no text", where=str(file), next_step=step)
    return lines


def read_turns(file: Path) -> list[Any]:
    """Return the turns of a JSON file. Raise InvalidInput if it does not hold a JSON list."""
    found = _json(read_text(file), str(file))
    if not isinstance(found, list):
        raise InvalidInput("the history is not a list", where=str(file), expected="a JSON list of turns")
    return found


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file: each line, or `prompt` or `messages` of each row of a .jsonl file.

    Raise InvalidInput with every row that has neither or both.
    """
    lines = read_lines(file)
    if file.suffix.lower() != ".jsonl":
        return list(lines)
    found: list[Prompt] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        row = _json(line, f"{file.name}, row {number}")
        bodies = [row.get(key) for key in ("prompt", "messages")] if isinstance(row, dict) else []
        given = [each for each in bodies if isinstance(each, str | list)]
        found += given
        if len(given) != 1:
            problems.append(Problem(f"row {number}", "expected `prompt`, a text, or `messages`, a list"))
    if problems:
        raise InvalidInput("the prompts can't be read", where=str(file), problems=problems)
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput("broken JSON", where=where) from None
