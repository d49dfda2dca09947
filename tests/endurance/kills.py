"""Kill the real process at every effect and at random moments: nothing is lost, no byte differs.

    python -m tests.endurance.kills --kills 200 --seed 1 --out tests/endurance/kills.json

A history (train, forget, add, submit, run, forget a subject, reconfigure) is run once undisturbed, and
each of its states is compared with training from scratch. A trial restores the state before a step, runs
that step in a process that is killed with SIGKILL, and checks what is left: served heads are clean,
whole and known. The next command (the same one again, or `sisa train`; sometimes killed as well) must
finish, and all bytes and requests must be those of the undisturbed run.

One in five kills comes from outside, after a random delay. One in ten is of the real LoRA trainer on a
tiny base; the others are of a trainer that confesses what touched its weights, with the real stores,
ledger and index. With `--encrypt` the model is encrypted and compared with plain training from scratch:
the same bytes under the seal, and keys of exactly the held files.

Power cuts that lose flushed data are not covered, and neither are Ray workers
(`tests/integration/ray/test_kill_worker.py`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sisa.data.samples import make_people
from tests.endurance import ground as g
from tests.endurance.ground import Ground, Picture, Zygote, expect
from tests.models.tiny_model import Row

PEOPLE = make_people(12, 2)
LATER = [row for row in make_people(15, 2) if row["subject_id"] > "p012"]
OUTSIDE, AGAIN, WITH_LORA = 0.2, 0.25, 0.1
CHEAP_PAUSE_S = 0.01
DELETING = ("forget", "run")


@dataclass(frozen=True)
class Step:
    """Describe one command of a history, the ids that it names, and what should remain after it."""

    name: str
    order: Mapping[str, Any]
    ids: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """Describe the undisturbed run of a step: its effects, its time, its end and what it erased."""

    effects: tuple[str, ...]
    seconds: float
    after: Picture
    tainted: frozenset[str]


@dataclass(frozen=True)
class Kill:
    """Describe where a process dies: at an effect, or after a delay (`at` is 0)."""

    at: int = 0
    when: str = "before"
    delay_s: float = 0.0
    name: str = "random moment"

    def options(self) -> dict[str, Any]:
        if self.at:
            return {"kill": {"at": self.at, "when": self.when}}
        return {"kill_after_s": self.delay_s}


def ids_of(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(str(row["id"]) for row in rows)


def without(rows: Sequence[Row], ids: Sequence[str]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row["id"] not in ids)


def history(ground: Ground, *, short: bool) -> list[Step]:
    """Return the steps of a history; write the files that they read."""
    people = PEOPLE[:12] if short else PEOPLE
    run = str(ground.prepare(people))
    first = ("p001-q1", "p003-q1", "p003-q2")
    subject = ids_of([row for row in PEOPLE if row["subject_id"] == "p006"])
    left = without(people, first)
    more = (*left, *LATER)
    file = str(ground.file("later.jsonl", LATER))
    steps = [
        Step("train", {"do": "train", "run": run}, ids_of(people), tuple(people)),
        Step("forget", {"do": "forget", "ids": first}, first, left),
        Step("add", {"do": "add", "file": file}, ids_of(LATER), more),
    ]
    if short:
        return steps
    changed = {"learning_rate": 0.02}
    new_run = str(ground.prepare(PEOPLE, "new-run.yaml", **changed))
    waiting = ("p002-q1", "p008-q2")
    submit = {"do": "submit", "ids": waiting, "external_id": "T-1"}
    then = without(more, waiting)
    end = without(then, subject)
    reconfigure = {"do": "train", "run": new_run, "accept": True}
    return [
        *steps,
        Step("submit", submit, waiting, more),
        Step("run", {"do": "run"}, waiting, then),
        Step("forget subject", {"do": "forget", "subject": "p006"}, subject, end),
        Step("reconfigure", reconfigure, (), end, changed),
    ]


class Trials:
    """Run a history undisturbed, then trials that kill one of its steps."""

    def __init__(self, folder: Path, trainer: str, seed: int, *, encrypt: bool = False) -> None:
        self.random = random.Random(f"{seed}/{trainer}")
        self.trainer = trainer
        self.zygote = Zygote(trainer)
        base = "pypi:no-base==1"
        if trainer == "lora":
            base = str(folder / "base")
            expect(self.zygote({"do": "base", "to": base}) == 0, "no tiny base")
        self.ground = Ground(folder / trainer, self.zygote, base, encrypt=encrypt)
        self.pause_s = 0.0 if trainer == "lora" else CHEAP_PAUSE_S
        self.steps = history(self.ground, short=trainer == "lora")
        self.ids = ids_of([*PEOPLE, *LATER])
        self.known = [self._learn(number) for number in range(len(self.steps))]
        self.places = Counter[str]()
        self.states = Counter[str]()
        self.num_kills = 0
        self._effects = self._all_effects()

    def close(self) -> None:
        self.zygote.close()

    def _learn(self, number: int) -> Known:
        step, ground = self.steps[number], self.ground
        tainted = set[str]()
        if number:
            tainted = ground.tainted(step.ids)
        ground.snapshot(str(number))
        trace = ground.folder / "trace.json"
        started = time.monotonic()
        ground.must({**step.order, "trace": str(trace), "pause_s": self.pause_s})
        seconds = time.monotonic() - started
        after = ground.picture()
        scratch = g.scratch_picture(
            ground.folder / "scratch", self.zygote, ground.base, step.rows, **step.settings
        )
        g.compare(after, scratch, f"{step.name}, undisturbed, against training from scratch")
        self._check_requests(number)
        return Known(tuple(json.loads(trace.read_text())), seconds, after, frozenset(tainted))

    def _check_requests(self, number: int) -> None:
        done = [each.ids for each in self.steps[: number + 1] if each.order["do"] in DELETING]
        waiting = self.steps[number].order["do"] == "submit"
        problems = self.ground.request_problems(done, int(waiting))
        expect(not problems, f"requests: {problems}")

    def _all_effects(self) -> Iterator[tuple[int, Kill]]:
        """Yield effects by kind (step, name, before | after | torn), shuffled; half are commits."""
        kinds: dict[tuple[int, str, str], list[Kill]] = {}
        for number, known in enumerate(self.known):
            for at, name in enumerate(known.effects, start=1):
                torn = ["torn"] if name.startswith("fsync") else []
                for when in ("before", "after", *torn):
                    kinds.setdefault((number, name, when), []).append(Kill(at, when, name=name))
        self.num_kinds = len(kinds)
        commits = [kind for kind in sorted(kinds) if kind[1].startswith("commit")]
        others = [kind for kind in sorted(kinds) if kind not in commits]
        while True:
            turn = [self.random.sample(each, len(each)) for each in (commits, others)]
            for kind in (kind for pair in zip_longest(*turn) for kind in pair if kind is not None):
                yield kind[0], self.random.choice(kinds[kind])

    def _next(self) -> tuple[int, Kill]:
        if self.random.random() < OUTSIDE:
            number = self.random.randrange(len(self.steps))
            delay = self.random.uniform(0, 1.05 * self.known[number].seconds)
            return number, Kill(delay_s=delay)
        return next(self._effects)

    def trial(self) -> str:
        """Kill a step, finish it and compare; return what was killed. Raise Broken."""
        number, kill = self._next()
        step, known = self.steps[number], self.known[number]
        story = f"{self.trainer}: {step.name}, {kill.when} {kill.at} ({kill.name}, {kill.delay_s:.3f} s)"
        try:
            self.ground.restore(str(number))
            held = self._killed(number, step.order, kill)
            if self.random.random() < AGAIN:
                at = self.random.randint(1, len(known.effects))
                again = Kill(at, self.random.choice(["before", "after"]), name="second kill")
                story += f", then {again.when} {again.at}"
                held = self._killed(number, step.order, again)
            if number and self.random.random() < 0.5:
                story += ", then train"
                self._finish_by_train(step, known, committed=held)
            self.ground.must(step.order)
            g.compare(self.ground.picture(), known.after, "after the next command")
            self._check_requests(number)
        except g.Broken as error:
            raise g.Broken(f"{story}: {error}") from error
        except Exception as error:
            raise g.Broken(f"{story}: {type(error).__name__}: {error}") from error
        return story

    def _finish_by_train(self, step: Step, known: Known, *, committed: bool) -> None:
        run = step.order if step.order["do"] == "train" else self.steps[0].order
        self.ground.must(run)
        if committed:
            g.compare(self.ground.picture(), known.after, "after `sisa train`")

    def _killed(self, number: int, order: Mapping[str, Any], kill: Kill) -> bool:
        """Kill a running command and check what it left; return whether it had committed."""
        step, known = self.steps[number], self.known[number]
        status = self.ground.order(order, **kill.options(), pause_s=self.pause_s)
        expect(g.killed(status) or status == 0, f"the command ended with {status}: {self._stderr()}")
        self.num_kills += g.killed(status)
        confessing = self.trainer == "cheap"
        moment = self.ground.moment(self.ids, step.ids, known.tainted, confessing=confessing)
        place = f"{step.name}: {kill.when} {kill.name}" if kill.at else f"{step.name}: random moment"
        self.places[place if g.killed(status) else f"{step.name}: had ended before"] += 1
        self.states[f"{step.name}: {moment.state}"] += 1
        done = moment.held & set(step.ids), moment.deleted & set(step.ids)
        if step.order["do"] == "submit":
            return False
        if step.order["do"] in DELETING:
            expect(len(done[1]) in (0, len(step.ids)), "half a deletion was committed")
            return bool(done[1])
        expect(len(done[0]) in (0, len(step.ids)), "half an addition was committed")
        return bool(done[0]) and bool(step.ids)

    def _stderr(self) -> str:
        errors = self.ground.folder / "errors.txt"
        return errors.read_text() if errors.exists() else ""


def run(
    folder: Path,
    seed: int,
    num_cheap: int,
    num_lora: int,
    *,
    encrypt: bool = False,
    show: bool = False,
) -> dict[str, Any]:
    """Carry out so many kills of each trainer; count failures instead of raising them."""
    started = time.monotonic()
    failures: list[str] = []
    found: dict[str, Any] = {}
    for trainer, wanted in (("cheap", num_cheap), ("lora", num_lora)):
        if not wanted:
            continue
        trials = Trials(folder, trainer, seed, encrypt=encrypt)
        num_trials = 0
        try:
            while trials.num_kills < wanted:
                num_trials += 1
                try:
                    story = trials.trial()
                except g.Broken as error:
                    story = str(error)
                    failures.append(story)
                if show:
                    print(f"{trials.num_kills:4d}  {story}", file=sys.stderr, flush=True)
                if num_trials > 4 * wanted + 20:
                    raise g.Broken("kills do not hit")
        finally:
            trials.close()
        found[trainer] = {
            "kills": trials.num_kills,
            "trials": num_trials,
            "effects_in_history": sum(len(each.effects) for each in trials.known),
            "kinds_of_effect": trials.num_kinds,
            "kinds_covered": len([k for k in trials.places if "random" not in k and "second" not in k]),
            "killed_at": dict(sorted(trials.places.items())),
            "states_left": dict(sorted(trials.states.items())),
        }
    seconds = round(time.monotonic() - started, 1)
    kills = sum(each["kills"] for each in found.values())
    counted = {"kills": kills, "failures": failures, "seconds": seconds, "seed": seed}
    return {**counted, "encrypted": encrypt, **found}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.endurance.kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lora", type=int, help="of these, kills of the real trainer")
    parser.add_argument("--encrypt", action="store_true", help="of a model that rests encrypted")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    num_lora = round(chosen.kills * WITH_LORA) if chosen.lora is None else chosen.lora
    numbers = (chosen.seed, chosen.kills - num_lora, num_lora)
    with tempfile.TemporaryDirectory(prefix="sisa-kills-") as folder:
        found = run(Path(folder), *numbers, encrypt=chosen.encrypt, show=True)
    for trainer in ("cheap", "lora"):
        if trainer in found:
            print(g.table(f"{trainer}: killed at", found[trainer]["killed_at"]))
            print(g.table(f"{trainer}: state left behind", found[trainer]["states_left"]))
    print(f"{found['kills']} kills, {len(found['failures'])} failures, {found['seconds']} s")
    return g.ended(found, chosen.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
