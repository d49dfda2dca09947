"""Simulate a fleet: 1,000,000,000 records planned, assigned, trained and deleted from, by counts.

    python -m tests.bench.scale.fleet --out tests/bench/scale/fleet.json
    python -m tests.bench.scale.fleet --records 1000000 --shards 100 --workers 10 --days 10 --per-day 5

Real parts: the planner (`plan_shard`, `tainted_checkpoints`), the price of plans, the queue of tasks
(`TaskQueue`, through `simulate.py`), the choice of when to run requests (`batching.choose`),
due dates, the hash that assigns records, and the ledger with every slice and checkpoint of the fleet.
Records are counted (slices have sizes, drawn as the hash spreads them), and so is time (record-epochs at
a given rate, random deaths of workers).

    first training  makespan, cost of deaths, throughput
    deletions       a Poisson stream of requests of one record each, decided once a day as `sisa run`
                    decides; a run's requests are complete when its last shard is trained
    driver          seconds and memory to plan all shards; rows and bytes of the ledger
    limits          what else a deployment of that size needs, each from a measured unit

Times of simulated training scale with the rate; the driver's seconds and bytes are of this machine.
Networks, object stores, Ray's own scheduler and subjects of several records are not covered.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sisa.core.digest import Keyed
from sisa.core.domain import (
    Head,
    Part,
    Record,
    RecordRow,
    SliceFile,
    record_epochs,
)
from sisa.core.ports import Change
from sisa.core.requests import days_left, due_date
from sisa.planning.batching import ShardCosts, choose
from sisa.planning.cost import full_record_epochs, shard_costs
from sisa.planning.layout import Assigner, Layout
from sisa.planning.plan import Recipe, ShardPlan
from sisa.store.ledger.ledger import SqlLedger
from tests.bench.command import arguments, low_to_high, markdown, write
from tests.bench.deletion.counted import CHECKPOINT_BYTES, CountedShard
from tests.bench.scale.simulate import Fleet, Ran, simulate

DAY_S = 86_400.0
START = date(2030, 1, 1)
VECTOR_BYTES = (384 + 512) * 4 + 8  # a vector of MiniLM with names, and its id
SAMPLE_ROWS = 20_000
Json = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """The size of the simulation. `rate` is the record-epochs a second of one worker."""

    records: int = 1_000_000_000
    shards: int = 10_000
    slices: int = 20
    workers: int = 1_000
    epochs: int = 3
    rate: float = 100.0
    mean_life_h: float = 24.0
    days: int = 60
    seed: int = 1

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.slices, "cumulative", self.epochs, {"learning_rate": 1e-3}, "base")

    @property
    def fleet(self) -> Fleet:
        return Fleet(self.workers, self.rate, mean_life_s=self.mean_life_h * 3600, max_retries=10)


@dataclass
class Shards:
    """All shards as counts of records, and the checkpoints that they hold."""

    scale: Scale
    shards: list[CountedShard]

    @classmethod
    def drawn(cls, scale: Scale) -> Shards:
        draw = np.random.default_rng(scale.seed)
        cells = scale.shards * scale.slices
        counts = draw.multinomial(scale.records, np.full(cells, 1 / cells))
        rows = counts.reshape(scale.shards, scale.slices).tolist()
        return cls(scale, [CountedShard(n, dict(enumerate(row))) for n, row in enumerate(rows)])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the number of records of each slice, [shards, slices]."""
        slices = range(self.scale.slices)
        return np.array([[each.sizes[n] for n in slices] for each in self.shards])

    def plans(self, shards: Iterable[int]) -> list[ShardPlan]:
        return [self.shards[each].plan(self.scale.recipe) for each in shards]

    def trained(self, plans: Iterable[ShardPlan]) -> None:
        """Hold what plans trained, as the ledger would."""
        for plan in plans:
            self.shards[plan.shard] = self.shards[plan.shard].trained(plan)

    def removed(self, gone: Iterable[tuple[int, int]]) -> list[int]:
        """Remove records of slices (shard, slice) and the checkpoints that they touched.

        Return the affected shards.
        """
        by: dict[int, Counter[int]] = {}
        for shard, slice_ in gone:
            by.setdefault(shard, Counter())[slice_] += 1
        for shard, slices in by.items():
            self.shards[shard] = self.shards[shard].without(slices)
        return sorted(by)


def chains(plans: Sequence[ShardPlan]) -> list[list[int]]:
    """Return the record-epochs to train, longest chain first, as `serial.order_chains` orders them."""
    ordered = sorted((p for p in plans if p.train), key=lambda plan: (-plan.record_epochs, plan.shard))
    return [[record_epochs(job) for job in plan.train] for plan in ordered]


def _outcome(ran: Ran, scale: Scale) -> Json:
    work = ran.busy_s * scale.rate
    return {
        "makespan_h": ran.makespan_s / 3600,
        "record_epochs": round(work),
        "record_epochs_per_s": work / ran.makespan_s if ran.makespan_s else 0.0,
        "utilisation": ran.utilisation,
        "worker_deaths": ran.num_deaths,
        "lost_share": ran.lost_s / (ran.lost_s + ran.busy_s) if ran.busy_s else 0.0,
        "given_up": len(ran.given_up),
    }


def first_training(counts: Shards) -> Json:
    """Plan everything and train it on the fleet; measure the driver's cost."""
    before, began = _resident(), time.perf_counter()
    plans = counts.plans(range(counts.scale.shards))
    planned_s = time.perf_counter() - began
    planned_bytes = _resident() - before
    ran = simulate(chains(plans), counts.scale.fleet, counts.scale.seed)
    counts.trained(plans)
    calm = Fleet(counts.scale.workers, counts.scale.rate)
    return {
        **_outcome(ran, counts.scale),
        "makespan_h_without_deaths": simulate(chains(plans), calm, 0).makespan_s / 3600,
        "planning_s": planned_s,
        "planning_bytes": planned_bytes,
        "stages": sum(len(plan.train) for plan in plans),
    }


@dataclass
class Stream:
    """A stream of requests over a trained fleet, day by day."""

    counts: Shards
    per_day: float
    draw: np.random.Generator
    waiting: list[tuple[str, str, tuple[int, int]]] = field(default_factory=list)  # received, due, place
    delays: list[float] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)  # days left before the due date
    runs: int = 0
    retrained: int = 0
    busy_days: float = 0.0
    deciding_s: list[float] = field(default_factory=list)
    costs: dict[int, ShardCosts] = field(default_factory=dict)

    def go(self) -> None:
        free = 0.0  # the day from which the workers are free again
        for number in range(self.counts.scale.days):
            day = START + timedelta(days=number)
            self.arrive(day)
            if number >= free and self.wants_to_run(day):
                free = number + self.run(day, number)

    def arrive(self, day: date) -> None:
        """Add the requests of a day, each for one record, all equally likely."""
        sizes = self.counts.sizes
        flat = self.draw.multinomial(self.draw.poisson(self.per_day), sizes.ravel() / sizes.sum())
        due = due_date(f"{day}T12:00:00+00:00", "gdpr")
        for cell in np.repeat(np.arange(flat.size), flat):
            shard, slice_ = divmod(int(cell), sizes.shape[1])
            self.waiting.append((day.isoformat(), due, (shard, slice_)))

    def wants_to_run(self, day: date) -> bool:
        began = time.perf_counter()
        now = f"{day}T12:00:00+00:00"
        left = [(str(n), days_left(due, now)) for n, (_, due, _) in enumerate(self.waiting)]
        chosen = choose(left, self.prices(), self.per_day, day.isoformat())
        self.deciding_s.append(time.perf_counter() - began)
        return chosen.choice == "run now"

    def prices(self) -> list[ShardCosts]:
        first: dict[int, int] = {}
        for _, _, (shard, slice_) in self.waiting:
            first[shard] = min(slice_, first.get(shard, slice_))
        recipe, shards = self.counts.scale.recipe, self.counts.shards
        total = sum(sum(each.sizes.values()) for each in shards)
        for each in shards:
            if each.shard not in self.costs:
                self.costs[each.shard] = shard_costs(0.0, each.sizes, total, recipe)
        return [
            ShardCosts(cost.suffixes[first[shard]][0], cost.suffixes) if shard in first else cost
            for shard, cost in self.costs.items()
        ]

    def run(self, day: date, number: int) -> float:
        """Run all waiting requests; return the days until training ends."""
        plans = self.counts.plans(self.counts.removed(place for _, _, place in self.waiting))
        ran = simulate(chains(plans), self.counts.scale.fleet, self.counts.scale.seed + number)
        self.counts.trained(plans)
        for plan in plans:
            self.costs.pop(plan.shard, None)
        self.runs += 1
        self.retrained += sum(plan.record_epochs for plan in plans)
        took = ran.makespan_s / DAY_S
        self.busy_days += took
        end = day + timedelta(days=math.floor(took + 0.5))
        for received, due, _ in self.waiting:
            self.delays.append((day - date.fromisoformat(received)).days + took)
            self.spare.append((date.fromisoformat(due) - end).days)
        self.waiting.clear()
        return took

    def summary(self, full: int) -> Json:
        many = sorted(self.delays) or [0.0]
        return {
            "requests_per_day": self.per_day,
            "completed": len(self.delays),
            "still_waiting": len(self.waiting),
            "runs": self.runs,
            "delay_days_p50": median(many),
            "delay_days_p95": float(np.quantile(many, 0.95)),
            "delay_days_max": many[-1],
            "least_days_left": min(self.spare, default=None),
            "overdue": sum(each < 0 for each in self.spare),
            "retrained_share_of_full_training": self.retrained / full,
            "shards_worth_retrained_per_request": (
                self.retrained / full * self.counts.scale.shards / max(1, len(self.delays))
            ),
            "days_of_training": self.busy_days,
            "deciding_s_mean": fmean(self.deciding_s),
        }


def ledger_of(counts: Shards, folder: Path) -> Json:
    """Measure a real ledger with all slices, checkpoints and heads, and a sample of records."""
    scale = counts.scale
    slices = [
        SliceFile(s.shard, s.slice, s.root, s.num_records, "0" * 64, 1000 * s.num_records)
        for shard in counts.shards
        for s in shard.view.slices
    ]
    plans = counts.plans(range(scale.shards))
    change = Change(
        slices=slices,
        checkpoints=[each for shard in counts.shards for each in shard.held],
        heads=[Head(plan.shard, plan.head.key, plan.head.depth, plan.head.target) for plan in plans],
    )
    file = folder / "ledger.db"
    with contextlib.closing(SqlLedger(file, create=True)) as ledger:
        write_s = _timed(lambda: ledger.commit(change))
        read_s = _timed(lambda: (ledger.slices(), ledger.checkpoints(), ledger.heads()))
        one_s = _timed(lambda: (ledger.slices(7), ledger.checkpoints(7)))
    fleet_bytes = file.stat().st_size
    rows = list(_sample(scale))
    with contextlib.closing(SqlLedger(file)) as ledger:
        rows_s = _timed(lambda: ledger.commit(Change(added=rows)))
    row_bytes = (file.stat().st_size - fleet_bytes) / SAMPLE_ROWS
    return {
        "rows_of_slices_checkpoints_heads": len(slices) + len(change.checkpoints) + len(change.heads),
        "bytes": fleet_bytes,
        "write_s": write_s,
        "read_all_s": read_s,
        "read_one_shard_s": one_s,
        "bytes_per_record": row_bytes,
        "records_per_s_written": SAMPLE_ROWS / rows_s,
    }


def _sample(scale: Scale) -> Iterator[RecordRow]:
    assigner = Assigner(Keyed(b"k" * 32), Layout(scale.shards, scale.slices))
    for number in range(SAMPLE_ROWS):
        body = (Part("prompt", f"question {number}"), Part("completion", f"answer {number}"))
        yield assigner.row(Record(f"r{number}", f"s{number}", "completion", body), 40)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _resident() -> int:
    """Return the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def limits(scale: Scale, counts: Shards, ledger: Json, placed_s: float) -> Json:
    """Return what so many records need, from measured units."""
    stages = sum(len(each.held) for each in counts.shards)
    return {
        "checkpoints_bytes": stages * CHECKPOINT_BYTES,
        "heads_alone_bytes": scale.shards * CHECKPOINT_BYTES // 3,
        "ledger_bytes": round(scale.records * ledger["bytes_per_record"] + ledger["bytes"]),
        "index_bytes": scale.records * VECTOR_BYTES,
        "placing_core_h": placed_s / SAMPLE_ROWS * scale.records / 3600,
        "writing_rows_h": scale.records / ledger["records_per_s_written"] / 3600,
    }


def measure(scale: Scale, per_day: Sequence[float]) -> Json:
    """Run the first training once, and each stream on the fleet as it was first trained."""
    counts = Shards.drawn(scale)
    full = full_record_epochs((each.view for each in counts.shards), scale.recipe)
    training = first_training(counts)
    placed_s, sizes = _timed(lambda: list(_sample(scale))), counts.sizes
    with tempfile.TemporaryDirectory() as folder:
        ledger = ledger_of(counts, Path(folder))
    streams = []
    for rate in per_day:
        fresh = Shards(scale, list(counts.shards))
        stream = Stream(fresh, rate, np.random.default_rng(scale.seed + 1))
        stream.go()
        streams.append(stream.summary(full))
    return {
        **asdict(scale),
        "full_record_epochs": full,
        "largest_over_mean_slice": float(sizes.max() / sizes.mean()),
        "first_training": training,
        "deletions": streams,
        "ledger": ledger,
        "limits": limits(scale, counts, ledger, placed_s),
        "driver_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def table(found: Json) -> Iterator[str]:
    """Yield what training and deletions of a billion records take, in simulated time."""
    training, (*few, many) = found["first_training"], found["deletions"]
    hours = low_to_high((24 * each["delay_days_p50"] for each in few), ".1f")
    shares = " / ".join(f"{each['retrained_share_of_full_training']:.2g}" for each in few)
    name = "shards_worth_retrained_per_request"
    lines = [
        (
            f"first training, {found['epochs']} epochs: time, with and without deaths",
            f"{training['makespan_h']:.1f} h, {training['makespan_h_without_deaths']:.1f} h",
        ),
        (
            "of all workers' time, spent on training that was kept; lost with "
            f"{training['worker_deaths']} deaths",
            f"{training['utilisation']:.1%}, {training['lost_share']:.1%}",
        ),
        (
            "requests for one record each, 10 / 100 / 1,000 a day: run daily, median delay to the end "
            "of training",
            f"{hours} h",
        ),
        (f"what they retrain in {found['days']} days, in full trainings", shares),
        (
            f"10,000 a day: waiting pays, so {many['runs']} runs in {found['days']} days; delay p50, "
            "longest; least days left to the due date",
            f"{many['delay_days_p50']:.0f} d, {many['delay_days_max']:.0f} d; {many['least_days_left']}",
        ),
        (
            f"what they retrain in {found['days']} days; for each request, in trainings of one shard "
            f"({few[0][name]:.2f} at 10 a day)",
            f"{many['retrained_share_of_full_training']:.1f}; {many[name]:.3f}",
        ),
    ]
    yield from markdown(("what", "simulated"), lines)


def main() -> None:
    per_day = {"type": float, "nargs": "+", "default": [10.0, 100.0, 1000.0, 10_000.0]}
    given = vars(arguments(__doc__, **asdict(Scale()), per_day=per_day))
    out, rates = given.pop("out"), given.pop("per_day")
    found = measure(Scale(**given), rates)
    print(json.dumps(found, indent=2))
    write(out, found)


if __name__ == "__main__":
    main()
