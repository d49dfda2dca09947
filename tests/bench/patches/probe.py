"""Whether the probe finds what a base knows: a base is fine-tuned to know half of some invented people.

    python -m tests.bench.patches.probe --out tests/bench/patches/probe.json

The base is trained in full on the first half's records until it produces them, or for `--steps` steps.
Each half is then probed: records that count as known, and the means of the measures. All people's
answers are phrased alike, so phrases alone are no knowledge. There is no pass or fail; the criterion
for known texts was fixed before the first run.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from approx.evaluation.probe import BaseProbe
from sisa.core.domain import BaseFiles
from sisa.data.samples import make_people
from sisa.lm.base.weights import base_digest, resolve_base
from tests.bench.command import BASE, arguments, here, write
from tests.models.knowing_base import record, teach

SEQUENCE_LEN = 512


def run(base_model: str, num_people: int, steps: int, folder: Path) -> dict[str, Any]:
    """Teach half of the people, and probe all."""
    rows = make_people(num_people, 3)
    half = len(rows) // 2
    known, strangers = [record(r) for r in rows[:half]], [record(r) for r in rows[half:]]
    training = teach(resolve_base(base_model).directory, known, to=folder / "taught", steps=steps)
    probe = BaseProbe(BaseFiles(folder / "taught", base_digest(folder / "taught")), 1, SEQUENCE_LEN)
    found: dict[str, Any] = {"training": training}
    for name, records in (("known", known), ("strangers", strangers)):
        started = time.monotonic()
        found[name] = asdict(probe(records))
        found[name]["seconds_a_record"] = round(
            (time.monotonic() - started) / max(1, found[name]["num_probed"]), 2
        )
    return found


def main() -> None:
    given = arguments(__doc__, out=Path("probe.json"), base_model=BASE, people=20, steps=120)
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.base_model, given.people, given.steps, Path(folder))
    write(given.out, {**here(), "people": given.people, **found})
    for name in ("known", "strangers"):
        each = found[name]
        print(f"{name}: {each['num_known']} of {each['num_probed']} count as known, {each}")


if __name__ == "__main__":
    main()
