"""Whether the probe finds what a base knows: a base is fine-tuned to know half of some invented people.

    python -m tests.bench.patches.probe --data data --out tests/bench/patches/probe.json

The base is trained in full on the first half's records until it produces them, or for `--steps` steps.
Each half is then probed: records that count as known, and the means of the measures. All people's
answers are phrased alike, so phrases alone are no knowledge.

With `--data`, the base as it is is asked questions of TOFU, RWKU and MUSE, with their own answers and
with the answer of the next question, which nothing in the question tells. Where these count as known,
half of an answer gives the rest.

There is no pass or fail; the criterion for known texts was fixed before the first run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from approx.evaluation.probe import MAX_PROBED, BaseProbe
from sisa.core.domain import BaseFiles
from sisa.data.samples import make_people
from sisa.lm.base.weights import base_digest, resolve_base
from tests.bench.answering.routing import READ
from tests.bench.command import BASE, arguments, here, write
from tests.models.knowing_base import record, teach

SEQUENCE_LEN, NUM_ASKED = 512, 200


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


def on_public_questions(base_model: str, data: Path) -> dict[str, dict[str, int]]:
    """Return, by data set, how many answers the base seems to know: of the question, and of another."""
    base = resolve_base(base_model)
    probe = BaseProbe(BaseFiles(base.directory, base_digest(base.directory)), 1, SEQUENCE_LEN)
    found = {}
    for name, read in READ.items():
        asked = read(data)
        chosen = asked[:: len(asked) // NUM_ASKED][:NUM_ASKED]
        pairs = list(zip(chosen, [*chosen[1:], chosen[0]], strict=True))
        own = [(one.question, one.answer) for one, _ in pairs]
        other = [(one.question, two.answer) for one, two in pairs if one.answer != two.answer]
        found[name] = {
            "questions": len(own),
            "known": _num_known(probe, own),
            "misplaced": len(other),
            "misplaced_known": _num_known(probe, other),
        }
        print(name, found[name], flush=True)
    return found


def _num_known(probe: BaseProbe, pairs: Sequence[tuple[str, str]]) -> int:
    rows = [
        {"id": str(n), "subject_id": str(n), "prompt": question, "completion": f" {answer}"}
        for n, (question, answer) in enumerate(pairs)
    ]
    parts = [rows[start : start + MAX_PROBED] for start in range(0, len(rows), MAX_PROBED)]
    return sum(probe(list(map(record, part))).num_known for part in parts)


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("probe.json"),
        base_model=BASE,
        people=20,
        steps=120,
        data={"type": Path, "help": "a directory with tofu/, rwku/ and muse/"},
    )
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.base_model, given.people, given.steps, Path(folder))
    if given.data:
        found["public"] = on_public_questions(given.base_model, given.data)
    write(given.out, {**here(), "people": given.people, **found})
    for name in ("known", "strangers"):
        each = found[name]
        print(f"{name}: {each['num_known']} of {each['num_probed']} count as known, {each}")


if __name__ == "__main__":
    main()
