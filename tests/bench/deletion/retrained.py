"""What a deletion retrains: one author, and TOFU's forget01, forget05 and forget10 at once.

    python -m tests.bench.deletion.retrained --tofu DIRECTORY --out tests/bench/deletion/retrained.json

TOFU has 200 authors with 20 questions each; its forget sets are the last 2, 10 and 20. Each is deleted
from freshly trained models in several arrangements (`counted.py`: real hash, real planner, counted
records), under KEYS secrets. A result is the mean over secrets, and for one author over all authors.

    share       record-epochs trained again, until the model is as from scratch, over those of training
                everything, with the closed form
    labelled    a tenth of the authors (the last 20) is known to go, and 90 of 100 deletions are theirs
    depth       right after the deletion, the share of its slices that an affected shard still serves
    all orders  shares with the training of the other orders, which cost more and serve meanwhile
    until base  deletions without retraining until every shard serves the base alone: S3T's formula,
                its simulation (`serving.py`), and the real planner with counted records

Some arrangements are then trained for real, on a tiny base, and deleted from by the library, one
request after another: seconds (of the clock, and of the core that worked) beside record-epochs.

Without --tofu people are invented (`sisa.data.samples`), 200 with 8 records each. Counts are a function
of the arguments; seconds are those of this machine. Records are in a temporary directory only. Quality,
and requests that arrive one by one between trainings (`sisa simulate`), are not covered.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from sisa.planning.bands import Bands
from sisa.planning.orders import rotations
from tests.bench.command import (
    NUM_AUTHORS,
    TOFU,
    Clock,
    arguments,
    data_name,
    here,
    markdown,
    people,
    write,
)
from tests.bench.deletion.counted import (
    Arrangement,
    Author,
    CountedModel,
    Deleted,
    expected_share,
    until_base,
)
from tests.bench.deletion.serving import deletions_until_base, simulate_until_base
from tests.models.tiny_model import KEY

KEYS = 30
LABELLED = 20  # authors, the last ones: TOFU's forget10
ASKED = 0.9  # the share of deletions that are theirs
FORGET = {"forget01": 2, "forget05": 10, "forget10": 20}
RISKY = 0.81  # with UNLIKELY for the rest a labelled tenth makes 90% of the deletions
UNLIKELY = 0.01
BY_LABEL = Bands(thresholds=(0.5,))
# Scores tell all authors apart: the labelled stand alone in the last of eight slices.
BY_SCORE = Bands(thresholds=(*(UNLIKELY + 0.001 * n for n in range(1, 7)), 0.5))
EVERYTHING = Arrangement("retraining everything", 1, 1)
HALF = "bands: the labelled in the last 4 slices"
LAST = "bands: the labelled in the last slice"
ARRANGEMENTS = (
    EVERYTHING,
    Arrangement("SISA as published", 8, 8, "cumulative"),
    Arrangement("sequential", 8, 8),
    Arrangement("sequential, 2 orders", 8, 8, orders=2),
    Arrangement("sequential, 4 orders", 8, 8, orders=4),
    Arrangement(HALF, 8, 8, bands=BY_LABEL),
    Arrangement(LAST, 8, 8, bands=BY_SCORE),
    Arrangement(f"{HALF}, 2 orders", 8, 8, bands=BY_LABEL, orders=2),
    Arrangement(f"{HALF}, 4 orders", 8, 8, bands=BY_LABEL, orders=4),
    Arrangement("sequential", 16, 8),
    Arrangement("sequential", 50, 4),
    Arrangement("sequential", 50, 8),
    Arrangement(HALF, 50, 8, bands=BY_LABEL),
)
BASE_SEEDS, CELL_RECORDS = 100, 60  # of the real planner's runs until the base; TOFU's 4,000 in 8 x 8
TIMED = (
    Arrangement("SISA as published", 8, 8, "cumulative"),
    Arrangement("sequential", 8, 8),
    Arrangement("sequential", 50, 4),
)
REQUESTS = ((7,), (41,), (83,), (120,), (155,), (198, 199), (*range(190, 198),), (*range(180, 190),))
Json = dict[str, Any]


def authors(records: int, bands: Bands | None) -> list[Author]:
    """Return all authors, each with its risk.

    The labelled ones have RISKY. Where bands go by scores, each of the others has a score of its own.
    """
    spread = 0.001 if bands == BY_SCORE else 0.0
    risks = [UNLIKELY + spread * (n % 7) for n in range(NUM_AUTHORS - LABELLED)] + [RISKY] * LABELLED
    return [Author(number, records, risk) for number, risk in enumerate(risks)]


def shares(arrangement: Arrangement, records: int, keys: int) -> Json:
    """Return everything that is reported of one arrangement."""
    everyone = authors(records, arrangement.bands)
    by = {each.number: each for each in everyone}
    models = [CountedModel.trained(arrangement, everyone, secret_of(key)) for key in range(keys)]
    one = [[model.without((number,)) for number in by] for model in models]
    expected = [expected_share(arrangement, by, (number,)) for number in by]
    found = {
        "one": _row(models, one, fmean, fmean(expected)),
        "one_labelled": _row(models, one, _weighted, _weighted(expected)),
    }
    for name, count in FORGET.items():
        last = range(NUM_AUTHORS - count, NUM_AUTHORS)
        at_once = [[model.without(last)] for model in models]
        found[name] = _row(models, at_once, fmean, expected_share(arrangement, by, last))
    training = fmean(each.record_epochs_of_all_orders / each.record_epochs for each in models)
    return {**_described(arrangement), "training_of_all_orders": training, "shares": found}


def secret_of(key: int) -> bytes:
    return hashlib.sha256(f"retrained {key}".encode()).digest()


def _described(arrangement: Arrangement) -> Json:
    found = asdict(arrangement)
    found["bands"] = list(arrangement.bands.thresholds) if arrangement.bands else None
    return found


Mean = Callable[[Sequence[float]], float]


def _row(
    models: Sequence[CountedModel],
    deleted: Sequence[Sequence[Deleted]],
    mean: Mean,
    expected: float,
) -> Json:
    """Return the mean over deletions from each model, then over models."""

    def over(value: Callable[[Deleted, CountedModel], float]) -> list[float]:
        pairs = zip(models, deleted, strict=True)
        return [mean([value(each, model) for each in its]) for model, its in pairs]

    measured = over(lambda each, model: each.record_epochs / model.record_epochs)
    others = over(lambda each, model: each.record_epochs_others / model.record_epochs)
    return {
        "measured": fmean(measured),
        "least": min(measured),
        "most": max(measured),
        "closed_form": expected,
        "all_orders": fmean(measured) + fmean(others),
        "depth": fmean(over(lambda each, _: each.depth)),
        "depth_of_all_shards": fmean(over(lambda each, _: each.depth_of_all)),
    }


def _weighted(values: Sequence[float]) -> float:
    """Return the mean over deletions, of which ASKED are of the last LABELLED."""
    return ASKED * fmean(values[-LABELLED:]) + (1 - ASKED) * fmean(values[:-LABELLED])


def bases(seeds: int) -> list[Json]:
    """Return the deletions until the base, for each number of orders of 8 x 8."""
    found = []
    for orders in (1, 2, 4):
        arrangement = Arrangement(f"{orders} orders", 8, 8, orders=orders)
        planned = [until_base(arrangement, CELL_RECORDS, seed) for seed in range(seeds)]
        drawn = simulate_until_base(8, rotations(8, orders))
        found.append(
            {
                "orders": orders,
                "formula": deletions_until_base(8, 8, orders),
                "simulated": drawn.mean,
                "planner": fmean(planned),
                "planner_error": pstdev(planned) / len(planned) ** 0.5,
            }
        )
    return found


@dataclass(frozen=True)
class Timed:
    """Real models of a folder, on a tiny base."""

    folder: Path
    rows: Sequence[Mapping[str, str]]
    epochs: int = 2

    def config(self, arrangement: Arrangement) -> Any:
        """Return a run file with adapters of rank 4 and batches of 4."""
        from sisa.config.config import RunConfig

        name = f"{arrangement.shards}x{arrangement.slices}-{arrangement.schedule}"
        (self.folder / "partition.key").write_text(KEY)
        data = self.folder / "records.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return RunConfig.model_validate(
            {
                "base_model": str(self.folder / "base"),
                "datasets": ({"path": str(data)},),
                "output_dir": self.folder / name,
                "witness": self.folder / f"{name}-witness",
                "keyring": self.folder / f"{name}-keys",
                "probe": False,
                "lora_r": 4,
                "micro_batch_size": 4,
                "sequence_len": 512,
                "overlength": "truncate",
                "num_epochs": self.epochs,
                "sisa": {
                    "shards": arrangement.shards,
                    "slices": arrangement.slices,
                    "schedule": arrangement.schedule,
                    "embedder": "hashing",
                    "partition_key_file": self.folder / "partition.key",
                },
            }
        )

    def measure(self, arrangement: Arrangement) -> Json:
        """Train everything, then delete; return seconds and record-epochs of each."""
        from sisa.train import train_model
        from tests.bench.training.equal_shards import warm

        clock = Clock()
        model, taken = train_model(self.config(arrangement), executor=warm)
        full, full_record_epochs = clock.took(), taken.record_epochs_trained
        by: dict[str, list[str]] = {}
        for row in self.rows:
            by.setdefault(row["subject_id"], []).append(row["id"])
        subjects, found = sorted(by), []
        for numbers in REQUESTS:
            ids = [each for number in numbers for each in by[subjects[number]]]
            clock = Clock()
            request = model.forget(ids).request
            took = clock.took()
            assert request is not None
            found.append(
                {
                    "authors": len(numbers),
                    "seconds": took["seconds"],
                    **{f"{unit}_share": took[unit] / full[unit] for unit in full},
                    "record_epochs_share": request.record_epochs_retrained / full_record_epochs,
                }
            )
        return {
            **_described(arrangement),
            **{f"full_{unit}": value for unit, value in full.items()},
            "full_record_epochs": full_record_epochs,
            "deletions": found,
        }


def measure(
    tofu: Path | None,
    keys: int,
    seeds: int,
    timed_records: int,
    arrangements: Sequence[Arrangement] = ARRANGEMENTS,
) -> Json:
    """Return counts, then seconds; without `timed_records` counts only."""
    rows = people(tofu)
    per_author = len(rows) // NUM_AUTHORS
    found: Json = {
        "data": data_name(tofu),
        "authors": NUM_AUTHORS,
        "records_per_author": per_author,
        "keys": keys,
        "labelled": {"authors": LABELLED, "share_of_deletions": ASKED},
        "shares": [shares(each, per_author, keys) for each in arrangements],
        "until_base": bases(seeds),
    }
    if timed_records:
        with tempfile.TemporaryDirectory() as folder:
            found["timed"] = timed(Path(folder), rows, timed_records)
    return found


def timed(folder: Path, rows: Sequence[Mapping[str, str]], records: int) -> Json:
    """Measure real models on a tiny base, with the first records of each author."""
    from tests.models.tiny_base import make_tiny_base

    os.environ["XDG_STATE_HOME"] = str(folder)  # a benchmark's models leave no witness behind
    make_tiny_base(folder / "base")
    per_author = len(rows) // NUM_AUTHORS
    chosen = [row for number, row in enumerate(rows) if number % per_author < records]
    site = Timed(folder, chosen)
    return {
        **here("a tiny base of random weights"),
        "records_per_author": min(records, per_author),
        "rows": [site.measure(each) for each in TIMED],
    }


COLUMNS = ("one", "one_labelled", *FORGET)


def table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: measured share (closed form). More orders change no share."""
    lines = []
    for row in (each for each in found["shares"] if each["orders"] == 1):
        cells = [
            f"{row['shares'][each]['measured']:.4f} ({row['shares'][each]['closed_form']:.4f})"
            for each in COLUMNS
        ]
        lines.append((row["name"], f"{row['shards']} x {row['slices']}", *cells))
    header = ("arrangement", "shards x slices", "one", "one, 90% labelled", *FORGET)
    yield from markdown(header, lines)


def depth_table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: benefit and cost of orders, for one author, any alike / 90% labelled."""
    lines = []
    for row in found["shares"]:
        if (row["shards"], row["slices"], row["schedule"]) == (8, 8, "sequential"):
            parts = [row["shares"][each] for each in ("one", "one_labelled")]
            cells = [
                " / ".join(f"{each[kind]:.{digits}f}" for each in parts)
                for kind, digits in (("depth", 2), ("measured", 3), ("all_orders", 3))
            ]
            lines.append((row["name"], f"{row['training_of_all_orders']:.2f}", *cells))
    header = ("8 x 8, sequential", "training", "served", "share, order 0", "share, all orders")
    yield from markdown(header, lines)


def base_table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: deletions until the base."""
    lines = [
        (row["orders"], *(f"{row[each]:.0f}" for each in ("formula", "simulated", "planner")))
        for row in found["until_base"]
    ]
    yield from markdown(("orders", "S3T's formula", "S3T's simulation", "the planner"), lines)


def timed_table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: seconds / core-seconds / record-epochs, as means by request size."""
    sizes = sorted({len(each) for each in REQUESTS})
    kinds = ("seconds_share", "core_seconds_share", "record_epochs_share")

    def cell(deletions: Sequence[Json]) -> str:
        return " / ".join(f"{fmean(each[kind] for each in deletions):.3f}" for kind in kinds)

    lines = [
        (
            f"{row['name']}, {row['shards']} x {row['slices']}",
            f"{row['full_seconds']:.0f}",
            *(cell([each for each in row["deletions"] if each["authors"] == size]) for size in sizes),
        )
        for row in found["timed"]["rows"]
    ]
    yield from markdown(("arrangement", "everything, s", *(f"{n} at once" for n in sizes)), lines)


def draw(found: Json, to: Path) -> None:
    """Draw a group of bars for each deletion, with a bar for each arrangement."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axis = figure.subplots()
    rows = [each for each in found["shares"] if each["orders"] == 1]  # orders change no share
    for number, row in enumerate(rows):
        at = [column + number / (len(rows) + 2) for column in range(len(COLUMNS))]
        values = [max(row["shares"][each]["measured"], 1e-4) for each in COLUMNS]
        name = f"{row['name']}, {row['shards']} x {row['slices']}"
        axis.bar(at, values, 1 / (len(rows) + 2), label=name, color=f"C{number}")
    axis.set_xticks([each + 0.4 for each in range(len(COLUMNS))], COLUMNS)
    axis.set_yscale("log")
    axis.set_ylabel("record-epochs over training everything")
    axis.set_ylim(1e-4)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(to, dpi=110)


def main() -> None:
    given = arguments(
        __doc__,
        tofu=TOFU,
        keys=KEYS,
        seeds={"type": int, "default": BASE_SEEDS, "help": "of runs until the base"},
        timed_records={"type": int, "default": 2, "help": "of each author; 0: counts alone"},
    )
    found = measure(given.tofu, given.keys, given.seeds, given.timed_records)
    for each in (table(found), depth_table(found), base_table(found)):
        print("\n".join(each), end="\n\n")
    if "timed" in found:
        print("\n".join(timed_table(found)))
    write(given.out, found)
    if given.out is not None:
        draw(found, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
