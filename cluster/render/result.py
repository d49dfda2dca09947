"""Hold what a command prints, and write numbers, shares and text of records for a terminal.

>>> printable("a\\x1b[31mb\\n")
'a[31mb\\n'
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Exit codes of results; those of errors are in `sisa.core.errors`.
EXIT_USAGE, EXIT_INTEGRITY, EXIT_ENVIRONMENT, EXIT_INTERRUPTED = 2, 4, 6, 130
EXIT_ACT = 7  # done, and somebody must act on what was found
MAX_SHARDS_SHOWN = 8  # in one line of text


@dataclass(frozen=True)
class Result:
    """Hold what a command prints, as JSON and as lines of text, and its exit code."""

    json: dict[str, Any]
    lines: Sequence[str]
    exit_code: int = 0

    @property
    def text(self) -> str:
        """Return the lines, safe for a terminal: they may quote records or a model."""
        return printable("\n".join(self.lines))

    def with_more(self, json: Mapping[str, Any], lines: Iterable[str] = ()) -> Result:
        """Return the result with more keys, and with more lines at its end."""
        return replace(self, json={**self.json, **json}, lines=[*self.lines, *lines])


def printable(text: str) -> str:
    """Return text without control characters, except line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))


def share(part: int, whole: int) -> str:
    """Return a part of a whole in percent."""
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "slice"), counted(1200, "slice")
    ('1 slice', '1,200 slices')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def time_left(days: int) -> str:
    """Return the days to a due date.

    >>> time_left(3), time_left(-1)
    ('3 days left', 'overdue by 1 day')
    """
    return f"{counted(days, 'day')} left" if days >= 0 else f"overdue by {counted(-days, 'day')}"


def shortened(shards: Sequence[object]) -> str:
    """Return the first shards, separated by commas."""
    more = ["..."] if len(shards) > MAX_SHARDS_SHOWN else []
    return ", ".join(map(str, [*shards[:MAX_SHARDS_SHOWN], *more]))


def of_model(directory: Path | str) -> str:
    """Return the option that names a model, in a command that a person may copy into a shell.

    >>> of_model(Path("my model"))
    "-m 'my model'"
    """
    return f"-m {shlex.quote(str(directory))}"
