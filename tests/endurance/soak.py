"""Add to and delete from one model hundreds of times, with random kills: equal to training from scratch.

    python -m tests.endurance.soak --requests 500 --seed 1 --out tests/endurance/soak.json

Every step adds a few new records, deletes a few, or deletes a subject, in its own process. Now and then
the model directory is backed up, and later the backup is restored: the next command deletes again what
was deleted since. One step in three is killed (at a random effect, or from outside after a random
delay), up to three times, and then run again. After each kill the served heads are clean and whole.
Every so many steps, and at the end, all bytes equal those of a model trained from scratch on what
remains, and every deletion is one completed request.

The real trainer is covered by `kills.py`; several writers are not covered.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sisa.data.samples import make_people
from tests.endurance import ground as g
from tests.endurance.ground import Ground, Zygote, expect
from tests.models.tiny_model import Row

FIRST, MOST_KILLS, KILLED = 24, 3, 1 / 3
KEPT = 60  # number of records around which the model stays
RESTORED = 0.08  # share of the steps that back up, or restore the backup
EFFECTS = 150  # about the number of effects of a step


class Soak:
    """Hold one model, what should remain of it, and what was done to it."""

    def __init__(self, folder: Path, seed: int, num_requests: int) -> None:
        self.random = random.Random(seed)
        self.zygote = Zygote("cheap")
        self.ground = Ground(folder, self.zygote, "pypi:no-base==1")
        self.fresh = make_people(num_requests + FIRST, 4)
        self.random.shuffle(self.fresh)
        self.rows: dict[str, Row] = {}
        self.deletions: list[tuple[str, ...]] = []
        self.deleted: set[str] = set()
        self.steps = Counter[str]()
        self.states = Counter[str]()
        self.kills = self.comparisons = 0
        self.saved: dict[str, Row] | None = None
        first = self._take(FIRST)
        self.ground.must({"do": "train", "run": str(self.ground.prepare(first))})

    def _take(self, number: int) -> list[Row]:
        taken: list[Row] = [self.fresh.pop() for _ in range(min(number, len(self.fresh)))]
        taken = [row for row in taken if row["id"] not in self.deleted]
        self.rows.update({str(row["id"]): row for row in taken})
        return taken

    def step(self, number: int) -> None:
        """Add or delete once, with random kills."""
        if self.random.random() < RESTORED:
            self._back_up() if self.saved is None else self._restore()
            return
        grow = self.random.random() < (0.65 if len(self.rows) < KEPT else 0.35)
        if (grow and self.fresh) or len(self.rows) < 4:
            rows = self._take(self.random.randint(1, 5))
            file = str(self.ground.file(f"added-{number}.jsonl", rows))
            order: Mapping[str, Any] = {"do": "add", "file": file}
            ids = tuple(str(row["id"]) for row in rows)
            kind, tainted = "add", set[str]()
        else:
            kind, order, ids = self._deletion()
            tainted = self.ground.tainted(ids)
            self.deletions.append(ids)
            self.deleted.update(ids)
            for each in ids:
                del self.rows[each]
        self.steps[kind] += 1
        if ids:
            self._through(kind, order, ids, tainted)

    def _back_up(self) -> None:
        self.steps["back up"] += 1
        self.saved = dict(self.rows)
        shutil.copytree(self.ground.model, self.ground.folder / "backup")

    def _restore(self) -> None:
        """Restore the backup: later additions are lost, and later deletions must be repeated."""
        assert self.saved is not None
        self.steps["restore"] += 1
        revived = tuple(sorted(self.saved.keys() & self.deleted))
        self.rows = {key: row for key, row in self.saved.items() if key not in self.deleted}
        self.saved = None
        shutil.rmtree(self.ground.model)
        (self.ground.folder / "backup").rename(self.ground.model)
        order = {"do": "train", "run": str(self.ground.site / "run.yaml")}
        self._through("restore", order, revived, self.ground.tainted(revived))

    def _deletion(self) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
        if self.random.random() < 0.3:
            subject = self.random.choice(sorted({str(row["subject_id"]) for row in self.rows.values()}))
            ids = tuple(sorted(k for k, row in self.rows.items() if row["subject_id"] == subject))
            return "forget subject", {"do": "forget", "subject": subject}, ids
        count = min(len(self.rows), self.random.randint(1, 3))
        ids = tuple(self.random.sample(sorted(self.rows), count))
        return "forget", {"do": "forget", "ids": ids}, ids

    def _through(
        self, kind: str, order: Mapping[str, Any], ids: Sequence[str], tainted: set[str]
    ) -> None:
        kills = 0
        asked = [*self.rows, *self.deleted]
        while kills < MOST_KILLS and self.random.random() < KILLED:
            options: dict[str, Any] = {"kill_after_s": self.random.uniform(0, 0.25)}
            if self.random.random() < 0.6:
                when = self.random.choice(["before", "after", "torn"])
                options = {"kill": {"at": self.random.randint(1, EFFECTS), "when": when}}
            status = self.ground.order(order, **options)
            expect(g.killed(status) or status == 0, f"{kind} ended with {status}")
            kills += g.killed(status)
            moment = self.ground.moment(asked, ids, tainted, confessing=True)
            self.states[f"{kind}: {moment.state}"] += 1
            done = (moment.deleted if kind != "add" else moment.held) & set(ids)
            expect(len(done) in (0, len(ids)), "half a request was committed")
            if not g.killed(status):
                break
        self.kills += kills
        self.ground.must(order)

    def compare(self) -> None:
        """Compare the model with training from scratch; check that every request is done once."""
        self.comparisons += 1
        folder = self.ground.folder / "scratch"
        rows = list(self.rows.values())
        self.random.shuffle(rows)
        scratch = g.scratch_picture(folder, self.zygote, self.ground.base, rows)
        g.compare(self.ground.picture(), scratch, "against training from scratch")
        problems = self.ground.request_problems(self.deletions)
        expect(not problems, f"requests: {problems}")


def run(
    folder: Path,
    seed: int,
    requests: int,
    every: int,
    show: bool = False,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Run so many steps; stop at the first promise that does not hold, or soon after `seconds`."""
    started = time.monotonic()
    soak = Soak(folder, seed, requests)
    failures: list[str] = []
    number = 0
    try:
        for number in range(1, requests + 1):
            soak.step(number)
            if number % every == 0 or number == requests:
                soak.compare()
                if show:
                    print(f"{number:4d} steps, {soak.kills} kills, equal", file=sys.stderr, flush=True)
                if time.monotonic() - started > seconds:
                    break
    except g.Broken as error:
        failures.append(f"step {number}: {error}")
    finally:
        soak.zygote.close()
    return {
        "requests": number,
        "kills": soak.kills,
        "failures": failures,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "steps": dict(soak.steps),
        "records_at_the_end": len(soak.rows),
        "records_deleted": len(soak.deleted),
        "comparisons_with_scratch": soak.comparisons,
        "states_left": dict(sorted(soak.states.items())),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.endurance.soak")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=50, help="steps between comparisons")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end soon after")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    numbers = (chosen.seed, chosen.requests, chosen.every)
    with tempfile.TemporaryDirectory(prefix="sisa-soak-") as folder:
        found = run(Path(folder), *numbers, True, chosen.seconds)
    print(g.table("state left behind by a kill", found["states_left"]))
    print(
        f"{found['requests']} requests, {found['kills']} kills, {found['seconds']} s", *found["failures"]
    )
    return g.ended(found, chosen.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
