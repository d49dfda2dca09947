"""Read what the command line names: files, and standard input for `-`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.core.errors import InvalidInput

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
        raise _unreadable(file, str(got)) from None


def read_bytes(file: Path) -> bytes:
    """Read a file that the command line names. Raise InvalidInput if it can't be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, str(error.strerror)) from None


def read_lines(file: Path) -> list[str]:
    """Read the lines of a file that are not blank. Raise InvalidInput if there are none."""
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        step = "write one text on each line"
        raise InvalidInput("the file holds no text", where=str(file), next_step=step)
    return lines


def read_turns(file: Path) -> list[Any]:
    """Return the turns of a JSON file. Raise InvalidInput if it does not hold a JSON list."""
    try:
        found = json.loads(read_text(file))
    except (ValueError, RecursionError):
        raise InvalidInput("broken JSON", where=str(file)) from None
    if not isinstance(found, list):
        raise InvalidInput("the history is not a list", where=str(file), expected="a JSON list of turns")
    return found


def prompts_of(file: Path) -> list[Prompt]:
    """Return the prompts of a file: each line, or those of the rows of a JSONL or Parquet file."""
    from sisa.config.fields import DATA_SUFFIXES
    from sisa.data.reader import read_prompts

    return read_prompts(file) if file.suffix.lower() in DATA_SUFFIXES else list(read_lines(file))


def _unreadable(file: Path, got: str) -> InvalidInput:
    step = "name a file that can be read"
    return InvalidInput("the file can't be read", where=str(file), got=got, next_step=step)
