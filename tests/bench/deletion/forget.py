"""The cost of a whole deletion against that of its training steps: `sisa forget`, from start to end.

    python -m tests.bench.deletion.forget --out tests/bench/deletion/forget.json

The model is the quickstart's, trained once. Of the people whose deletions retrain different numbers of
records, one each is deleted from a copy of the model, by a process of its own. They take turns, and
medians of the rounds are given. A whole process counts: imports, the base's hash, the probe of the base,
erasure. Its steps are those of the shard that is trained again, in core-seconds of the same process. The
bound is TIMES the steps, plus PLUS_S.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from cluster.cli.quickstart import (
    IN_TWO_MINUTES,
    STORY_PEOPLE,
    STORY_RECORDS,
    write_start,
)
from sisa import open_model
from sisa.data.samples import as_chats, make_people
from tests.bench.answering import cold
from tests.bench.command import arguments, markdown, write
from tests.endurance.ground import environment

TIMES, PLUS_S = 1.3, 6.0
FORGET = """
import time
from types import SimpleNamespace
from sisa.flows import chains
chains.time = SimpleNamespace(monotonic=time.process_time)  # steps are timed in core-seconds
from sisa.__main__ import main
main()
"""


def use_state(folder: Path) -> None:
    """Let this process and those that it starts use a state directory in this folder."""
    os.environ["XDG_STATE_HOME"] = cold.ENVIRONMENT["XDG_STATE_HOME"] = str(folder / "state")


def trained(folder: Path) -> dict[int, str]:
    """Train a model in a folder; return record-epochs to retrain, each with a person to delete."""
    use_state(folder)
    rows = make_people(STORY_PEOPLE, STORY_RECORDS)
    start = write_start(folder / "quickstart", as_chats(rows), IN_TWO_MINUTES)
    cold.run("-m", "sisa", "train", start.run_file, "--executor", "serial")
    model = open_model(folder / "quickstart" / "model")
    people = sorted({row["subject_id"] for row in rows})
    costs = {model.plan_forget(subject=who).record_epochs_retrained: who for who in people}
    return {cost: who for cost, who in sorted(costs.items()) if cost}


def deleted(folder: Path, who: str) -> dict[str, float]:
    """Delete a person from a copy of a folder's model; return what it took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as copied:
        copy = Path(shutil.copytree(folder, Path(copied) / "copy"))
        use_state(copy)
        model = copy / "quickstart" / "model"
        before = {path.name for path in (model / "metrics").iterdir()}
        seconds, core = cold.run("-c", FORGET, "forget", "-m", model, "--subject", who)
        runs = [path for path in (model / "metrics").iterdir() if path.name not in before]
        events = [json.loads(line) for path in runs for line in path.read_text().splitlines()]
    steps = sum(each["seconds"] for each in events if each["event"] == "epoch_trained")
    return {
        "seconds": seconds,
        "core_seconds": core,
        "steps_core_seconds": steps,
        "share_of_bound": core / (TIMES * steps + PLUS_S),
    }


def measured(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the medians for each number of record-epochs."""
    people = trained(folder / "start")
    taken: dict[int, list[dict[str, float]]] = {cost: [] for cost in people}
    for number in range(rounds + 1):
        for cost, who in people.items():
            once = deleted(folder / "start", who)
            if number:  # the first round reads the disk
                taken[cost].append(once)
                print(f"{number}, {cost} record-epochs: {once}", flush=True)
    return [
        {"record_epochs": cost, **{name: median(each[name] for each in rows) for name in rows[0]}}
        for cost, rows in taken.items()
    ]


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a whole deletion takes against its steps."""
    header = ("record-epochs", "seconds", "core-seconds", "of them steps", "share of the bound")
    lines = [
        (
            str(each["record_epochs"]),
            f"{each['seconds']:.1f}",
            f"{each['core_seconds']:.1f}",
            f"{each['steps_core_seconds']:.1f}",
            f"{each['share_of_bound']:.2f}",
        )
        for each in found["deletions"]
    ]
    yield from markdown(header, lines)


def main() -> None:
    given = arguments(__doc__, rounds=3)
    with tempfile.TemporaryDirectory() as folder:
        deletions = measured(Path(folder), given.rounds)
    found = {
        **environment(),
        "rounds": given.rounds,
        "bound": f"{TIMES} x steps + {PLUS_S} s",
        "holds": all(each["share_of_bound"] <= 1 for each in deletions),
        "deletions": deletions,
    }
    write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
