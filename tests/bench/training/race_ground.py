"""The ground of a race: records dealt out to shards and workers, and the contestants' processes.

Records go to shards in turn, those of a shard to its slices in turn, and shards to workers in turn.
Processes are started when they are first needed, and kept. Records are in the given folder only.

    ground = Ground(folder, load_data(None, base, 64), stack)
    ground.run(ground.ours(race, TWO_WORKERS), with_loss=True).seconds
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core.digest import sha256_hex
from sisa.core.domain import BaseFiles, Chain, Record, SliceFile
from sisa.core.ports import StoredRecord
from sisa.flows.chains import Site
from sisa.lm.base.numerics import fingerprint
from sisa.lm.base.tokens import Tokens, tokenize_all
from sisa.lm.base.weights import load_tokenizer, resolve_base
from sisa.planning.plan import jobs
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.records import FileRecords
from tests.bench.command import people
from tests.bench.training.contestants import (
    ALPHA,
    MODULES,
    RANK,
    Contestant,
    Ours,
    Race,
    Ran,
    Theirs,
    Who,
)
from tests.fakes.keyring import PLAIN
from tests.models.knowing_base import record

Key = tuple[Who, int, int]  # a contestant, its threads, and which of several


@dataclass(frozen=True)
class Data:
    """Records in the form that every contestant gets."""

    base: BaseFiles
    records: tuple[Record, ...]
    tokens: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(each.input_ids) for each in self.tokens)

    def first(self, count: int) -> Data:
        return replace(self, records=self.records[:count], tokens=self.tokens[:count])


@dataclass(frozen=True)
class Entry:
    """One contestant in one race, with the work that each of its processes is sent."""

    name: str
    race: Race
    work: tuple[tuple[Key, Theirs | Ours], ...]


@dataclass(frozen=True)
class Layout:
    """The layout of our trainer. A shard has `batch_share` of the race's batch."""

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

    def on(self, data: Data) -> Ground:
        """Return the ground with the same processes on other data."""
        return replace(self, data=data)

    def theirs(self, who: Who, race: Race, *, grouped: bool = False) -> Entry:
        name = {"hf": "Trainer + PEFT", "trl": "SFTTrainer"}[who]
        label = f"{name}{', grouped by length' if grouped else ''}"
        return Entry(label, race, (((who, 2, 0), Theirs(race, self.data.tokens, grouped)),))

    def ours(self, race: Race, layout: Layout) -> Entry:
        """Return ours in a race; each worker gets whole shards."""
        site = Site(
            LocalBlobs(self.folder / "records"),
            LocalBlobs(self.folder / "checkpoints"),
            self.data.base,
            layout.threads,
            PLAIN,
        )
        made = [self._chain(site, race, layout, shard) for shard in range(layout.shards)]
        shares = [made[worker :: layout.workers] for worker in range(layout.workers)]
        work = [Ours(site, tuple(c for c, _ in each), tuple(t for _, t in each)) for each in shares]
        return Entry(
            layout.name,
            race,
            tuple((("ours", layout.threads, n), each) for n, each in enumerate(work)),
        )

    def _chain(
        self, site: Site, race: Race, layout: Layout, shard: int
    ) -> tuple[Chain, tuple[Tokens, ...]]:
        store, files = FileRecords(site.records_at, PLAIN), []
        numbers = range(shard, len(self.data.records), layout.shards)
        for slice_ in range(layout.slices):
            records = [self.data.records[n] for n in numbers[slice_ :: layout.slices]]
            files.append(_written(store, shard, slice_, records))
        recipe = run_file(self.folder, race, layout).recipe(self.data.base.digest)
        path = jobs(shard, files, recipe, fingerprint(layout.threads))
        return Chain(shard, path, None, tuple(files)), tuple(self.data.tokens[n] for n in numbers)

    def run(self, entry: Entry, *, with_loss: bool) -> Ran:
        """Train; the slowest process counts."""
        for key, _ in entry.work:
            if key not in self.started:
                self.started[key] = self.stack.enter_context(Contestant(key[0], key[1]))
        for key, work in entry.work:
            self.started[key].start(replace(work, with_loss=with_loss))
        ran = [self.started[key].ended() for key, _ in entry.work]
        return Ran(
            max(each.seconds for each in ran),
            sum(each.core_seconds for each in ran),
            sum(each.loss_sum for each in ran),
            sum(each.labels for each in ran),
        )


def run_file(folder: Path, race: Race, layout: Layout) -> RunConfig:
    """Return ours as a run file."""
    return RunConfig.model_validate(
        {
            "base_model": str(race.base_dir),
            "datasets": ({"path": str(folder / "records.jsonl")},),
            "output_dir": folder / "model",
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_target_modules": MODULES[race.modules],
            "lora_layers": "all" if race.layers is None else f"top:{len(race.layers)}",
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


def load_data(tofu: Path | None, base: str, num_records: int) -> Data:
    """Return the first records of TOFU, or invented ones, as tokens of the base."""
    found, records = resolve_base(base), tuple(map(record, people(tofu)[:num_records]))
    tokens = tokenize_all(
        records,
        load_tokenizer(found.directory),
        sequence_len=512,
        overlength="truncate",
        train_on_inputs=False,
    )
    return Data(found, records, tuple(tokens))
