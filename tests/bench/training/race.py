"""Training speed: a deletion-ready model against Hugging Face's `Trainer` and TRL's `SFTTrainer`.

    python -m tests.bench.training.race --tofu DIRECTORY --out tests/bench/training/race.json

    race     the same records, adapter and epochs: ours as two workers of one thread, each with a shard
             of half of the records; theirs one adapter with two threads, with and without their
             grouping of batches by length. A shard has half of the records, so half of the batch: all
             models take as many steps. Also ours as one worker of two threads, one adapter
    layers   adapters in all layers, and in the top third
    whole    8 shards x 4 slices, sequential, against one adapter of the same epochs and batch, ours and
             Hugging Face's

Contestants take turns (A B C, A B C, ...), so that other load on the machine affects all alike. A round
gives a ratio, and the median of the rounds' is reported. Beside it is the ratio of core-seconds, which
a busy machine affects less and which does not count waiting threads. The loss of the trained models is
measured afterwards, as the mean over the answers' tokens of all records, each under the adapter that
was trained on it.

Without --tofu people are invented (`sisa.data.samples`). Without TRL (extra `bench`) its rows are
missing, and the result says so. Times are of this machine; the ratios are the result. Records and
checkpoints are in a temporary directory only. What a contestant needs before its first step (libraries,
the base) is not included.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.command import BASE, TOFU, arguments, data_name, here, markdown, write
from tests.bench.training.contestants import Race, Ran, Who, is_installed
from tests.bench.training.race_ground import (
    ONE_WORKER,
    ORDINARY,
    TWO_WORKERS,
    WHOLE,
    WHOLE_BY_TWO,
    Data,
    Entry,
    Ground,
    load_data,
)

THEM: tuple[Who, ...] = ("hf", "trl")
Json = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The amount of training. In whole trainings a slice of 8 x 4 must fill the batch."""

    records: int = 48
    epochs: int = 5
    rounds: int = 1
    batch: int = 8
    whole_records: int = 128
    whole_batch: int = 4
    whole_epochs: int = 4
    rate: float = 2e-3
    layers: int = 10  # of the top

    def race(self, data: Data, modules: str, layers: tuple[int, ...] | None) -> Race:
        return Race(data.base.directory, modules, layers, self.epochs, self.batch, self.rate)


def raced(
    ground: Ground, size: Size, modules: str, top: tuple[int, ...], *, all_of_them: bool
) -> list[Entry]:
    """Return the entries: everybody with adapters in all layers, and ours in the top ones.

    With `all_of_them` also theirs in the top ones, and ours with one adapter.
    """
    everywhere, above = (size.race(ground.data, modules, layers) for layers in (None, top))
    found = [
        ground.ours(everywhere, TWO_WORKERS),
        *theirs(ground, everywhere),
        ground.ours(above, TWO_WORKERS),
    ]
    if all_of_them:
        found += [*theirs(ground, above), ground.ours(everywhere, ONE_WORKER)]
    return found


def theirs(ground: Ground, race: Race) -> list[Entry]:
    """Return entries of those that are installed, without and with grouping."""
    installed = filter(is_installed, THEM)
    return [ground.theirs(who, race, grouped=grouped) for who in installed for grouped in (False, True)]


def whole(ground: Ground, size: Size, modules: str) -> list[Entry]:
    """Return 8 x 4 against one adapter: ours on workers of one thread, and Trainer on two cores."""
    race = size.race(ground.data, modules, None)
    race = replace(race, batch=size.whole_batch, epochs=size.whole_epochs)
    return [
        ground.ours(race, WHOLE),
        ground.ours(race, ORDINARY),
        ground.ours(race, WHOLE_BY_TWO),
        ground.theirs("hf", race),
    ]


def run_all(ground: Ground, entries: Sequence[Entry], rounds: int) -> list[Json]:
    """Run all entries in turn, once a round; return a row for each."""
    found: list[list[Ran]] = [[] for _ in entries]
    for number in range(rounds):
        for ran, entry in zip(found, entries, strict=True):
            ran.append(ground.run(entry, with_loss=number == 0))
            print(number, entry.name, entry.race.modules, ran[-1], flush=True)
    return [_row(ground.data, entry, ran) for entry, ran in zip(entries, found, strict=True)]


def _row(data: Data, entry: Entry, ran: Sequence[Ran]) -> Json:
    seconds, cores = [each.seconds for each in ran], [each.core_seconds for each in ran]
    per_epoch = median(seconds) / entry.race.epochs
    return {
        "who": entry.name,
        "adapter": entry.race.modules,
        "layers": "all" if entry.race.layers is None else f"top {len(entry.race.layers)}",
        "seconds": seconds,
        "core_seconds": cores,
        "seconds_per_epoch": per_epoch,
        "tokens_per_s": data.num_tokens / per_epoch,
        "loss": ran[0].loss_sum / ran[0].labels,
    }


def ratios(rows: Sequence[Json]) -> Iterator[Json]:
    """Return the ratios of their seconds to those of ours as two workers, the median of rounds.

    The top third is also compared with their runs on all layers.
    """
    for mine in rows:
        if mine["who"] != TWO_WORKERS.name:
            continue
        for other in [each for each in rows if each["adapter"] == mine["adapter"]]:
            if not other["who"].startswith("ours") and other["layers"] in ("all", mine["layers"]):
                yield {
                    "adapter": mine["adapter"],
                    "ours": mine["layers"],
                    "against": other["who"],
                    "theirs": other["layers"],
                    "times_as_fast": over(other, mine),
                    "core_seconds": over(other, mine, "core_seconds"),
                }


def over(one: Json, other: Json, what: str = "seconds") -> float:
    """Return seconds of one over those of the other, the median of rounds."""
    pairs = zip(one[what], other[what], strict=True)
    return float(median(mine / theirs for mine, theirs in pairs))


def whole_ratios(rows: Sequence[Json]) -> Json:
    """Return what 8 x 4 costs, in trainings of one adapter."""
    ours, ordinary, by_two, hf = rows
    return {
        "one_worker_over_one_adapter": over(ours, ordinary),
        "one_worker_over_one_adapter_in_core_seconds": over(ours, ordinary, "core_seconds"),
        "two_workers_over_trainer_of_two_threads": over(by_two, hf),
    }


def measure(size: Size, tofu: Path | None, base: str, parts: Sequence[str]) -> Json:
    """Run the requested races and whole trainings."""
    data = load_data(tofu, base, size.records)
    found: Json = {
        **here(base),
        "data": data_name(tofu),
        "trl": metadata.version("trl") if is_installed("trl") else None,
        "load_before": os.getloadavg()[0],
        **asdict(size),
        "tokens": data.num_tokens,
        "rows": [],
    }
    layers = json.loads((data.base.directory / "config.json").read_text())["num_hidden_layers"]
    top = tuple(range(layers - size.layers, layers))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ground = Ground(Path(folder), data, stack)
        warm, short = ground.on(data.first(8)), replace(size, epochs=1, whole_epochs=1)
        for modules, all_of_them in (("all linear", True), ("q, v", False)):
            if modules in parts:
                run_all(warm, raced(warm, short, modules, top, all_of_them=False), 1)
                entries = raced(ground, size, modules, top, all_of_them=all_of_them)
                found["rows"] += run_all(ground, entries, size.rounds)
        if "whole" in parts:
            more = ground.on(load_data(tofu, base, size.whole_records))
            run_all(warm, whole(warm, short, "q, v"), 1)
            rows = run_all(more, whole(more, size, "q, v"), size.rounds)
            found["whole"] = {"tokens": more.data.num_tokens, "rows": rows, **whole_ratios(rows)}
    found["ratios"] = list(ratios(found["rows"]))
    return found


def table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: a line for each contestant."""
    lines = [(row["adapter"], row["layers"], row["who"], *_numbers(row)) for row in found["rows"]]
    yield from markdown(("adapter", "layers", "who", *NUMBERS), lines)


def ratio_table(found: Json) -> Iterator[str]:
    """Yield a line for each pair of layers: how many times as fast as each of them (in core-seconds)."""
    rows = found["ratios"]
    against = list(dict.fromkeys(row["against"] for row in rows))
    lines = []
    for line in dict.fromkeys((row["adapter"], row["ours"], row["theirs"]) for row in rows):
        by = {r["against"]: r for r in rows if (r["adapter"], r["ours"], r["theirs"]) == line}
        cells = [f"{by[n]['times_as_fast']:.2f} ({by[n]['core_seconds']:.2f})" for n in against]
        lines.append((*line, *cells))
    yield from markdown(("adapter", "ours", "theirs", *against), lines)


def whole_table(found: Json) -> Iterator[str]:
    """Yield a line for each whole training, with many shards and slices or one adapter."""
    lines = [(row["who"], *_numbers(row)) for row in found["whole"]["rows"]]
    yield from markdown(("whole training", *NUMBERS), lines)


NUMBERS = ("tokens/s", "s an epoch", "loss")


def _numbers(row: Json) -> tuple[str, str, str]:
    return f"{row['tokens_per_s']:.0f}", f"{row['seconds_per_epoch']:.1f}", f"{row['loss']:.3f}"


def summary(found: Json) -> Iterator[str]:
    """Yield all tables, and whether TRL took part."""
    yield from table(found)
    yield ""
    yield from ratio_table(found)
    if "whole" in found:
        yield ""
        yield from whole_table(found)
    if found["trl"] is None:
        yield "\nTRL is not installed (extra `bench`): its rows are missing."


def draw(found: Json, to: Path) -> None:
    """Draw tokens a second, a bar for each contestant."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    names = [f"{row['adapter']}, {row['layers']}: {row['who']}" for row in rows]
    colours = ["C0" if row["who"].startswith("ours") else "C7" for row in rows]
    axis.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel("tokens a second")
    figure.savefig(to, dpi=110)


def main() -> None:
    parts = {"nargs": "+", "default": ["all linear", "q, v", "whole"]}
    given = vars(arguments(__doc__, tofu=TOFU, base_model=BASE, parts=parts, **asdict(Size())))
    tofu, base, chosen, out = (given.pop(each) for each in ("tofu", "base_model", "parts", "out"))
    found = measure(Size(**given), tofu, base, chosen)
    print("\n".join(summary(found)))
    write(out, found)
    if out is not None:
        draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
