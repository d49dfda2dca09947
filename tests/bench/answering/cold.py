"""The time of a command that asks once: a process of its own, from its start to its end.

    python -m tests.bench.answering.cold --out tests/bench/answering/cold.json

    import torch   the least that such a process does
    find           `sisa find --text`
    generate       `sisa generate`, with an answer of one token and of LONG_ANSWER tokens

The model has SmolLM2-135M as its base and eight people's records, under each embedder. All commands take
turns, so that what else the machine does is shared, and Python keeps compiled modules, as it does unless
PYTHONDONTWRITEBYTECODE is set. Seconds and core-seconds are medians of the rounds; ratios are those of
one round to importing torch, and their median is reported.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sisa.config.config import MINILM
from sisa.data.samples import make_people, to_jsonl
from tests.bench.command import BASE, arguments, markdown, write
from tests.endurance.ground import environment

EMBEDDERS = {"hashing": "hashing", "MiniLM": MINILM}
PROMPT, LONG_ANSWER = "Where was Mara Lindqvist born?", 24
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
Taken = tuple[float, float]  # seconds, core-seconds


def run(*arguments: object) -> Taken:
    """Run Python in a process; return what it took. Raise CalledProcessError if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, sum(after[:2]) - sum(before[:2])


def trained(folder: Path, embedder: str) -> Path:
    """Train a model in a new folder, and return its directory."""
    folder.mkdir()
    (folder / "people.jsonl").write_text(to_jsonl(make_people(8, 2)), encoding="utf-8")
    run_file = {
        "base_model": BASE,
        "datasets": [{"path": str(folder / "people.jsonl")}],
        "output_dir": str(folder / "model"),
        "witness": str(folder / "witness"),
        "keyring": str(folder / "keys"),
        "lora_layers": "top:4",
        "num_epochs": 1,
        "probe": False,
        "sisa": {"shards": 2, "slices": 2, "embedder": embedder},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file), encoding="utf-8")
    run("-m", "sisa", "train", folder / "run.yaml", "--executor", "serial")
    return folder / "model"


def ways(folder: Path) -> dict[str, list[object]]:
    """Return the arguments of each command that is timed, by its name."""
    found: dict[str, list[object]] = {"import torch": ["-c", "import torch"]}
    for name, embedder in EMBEDDERS.items():
        at = ("-m", trained(folder / name, embedder))
        ask = ["-m", "sisa", "generate", *at, "--no-service", "--prompt", PROMPT, "--max-new-tokens"]
        found[f"find, {name}"] = ["-m", "sisa", "find", *at, "--no-service", "--text", PROMPT]
        found |= {f"generate {num}, {name}": [*ask, num] for num in (1, LONG_ANSWER)}
    return found


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Return medians of seconds and core-seconds, and of the ratios to importing torch."""
    commands = ways(folder)
    taken: dict[str, list[Taken]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, words in commands.items():
            once = run(*words)
            if number:  # the first round reads the disk
                taken[name].append(once)
                print(f"{number} {name}: {once[0]:.2f} s, {once[1]:.2f} of a core", flush=True)
    torch = taken["import torch"]
    return {
        name: {
            "seconds": median(each[0] for each in rows),
            "core_seconds": median(each[1] for each in rows),
            "over_importing_torch": median(a[0] / b[0] for a, b in zip(rows, torch, strict=True)),
        }
        for name, rows in taken.items()
    }


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the time of a command that asks once."""
    header = ("process", "seconds", "core-seconds", "over importing torch")
    lines = [
        (
            name,
            f"{each['seconds']:.1f}",
            f"{each['core_seconds']:.1f}",
            f"{each['over_importing_torch']:.1f}",
        )
        for name, each in found["ways"].items()
    ]
    yield from markdown(header, lines)


def main() -> None:
    given = arguments(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        ENVIRONMENT["XDG_STATE_HOME"] = str(Path(folder) / "state")
        found = {**environment(), "rounds": given.rounds, "ways": measured(Path(folder), given.rounds)}
    write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
