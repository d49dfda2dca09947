"""Fake every port in memory, and build a model of the fakes.

A fake implements its whole port and passes the same contract suite as the real part. The weights of
`FakeTrainer` name the job's key and every record id that ever touched them, so that thousands of random
histories can be checked for residue without torch. Concurrency and disks are not covered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sisa.config.config import Aggregation, RunConfig, SisaBlock
from sisa.config.sources import DatasetSource
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import Keyed, canonical_json, sha256_hex
from sisa.core.domain import (
    NO_RESTRICTIONS,
    BaseFiles,
    Chain,
    Export,
    Hit,
    IndexFile,
    Part,
    Record,
    RecordRow,
    Restrictions,
    SavedCheckpoint,
    SliceFile,
    SliceJob,
    Testimony,
    Tombstone,
    WitnessHead,
)
from sisa.core.errors import IntegrityError
from sisa.core.event_chain import EventChain
from sisa.core.events import Report, SliceTrained, silent
from sisa.core.patches import PatchJob
from sisa.core.ports import (
    By,
    CheckpointStore,
    Executor,
    ExportStanding,
    OnStage,
    States,
    StoredRecord,
    Tick,
    Vectors,
)
from sisa.core.requests import Request
from sisa.flows.chains import SerialExecutor
from sisa.flows.context.context import Compute, Context, Settings, Stores
from sisa.flows.ingest import train
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.requests import Terms, forget_at_once, new_request
from sisa.planning.bands import Bands
from sisa.planning.layout import Assigner, Layout
from sisa.planning.orders import chosen_orders
from sisa.planning.plan import Recipe, Schedule
from tests.fakes.keyring import PLAIN
from tests.fakes.ledger import FakeLedger
from tests.fakes.metrics import FakeMetrics
from tests.fakes.patches import FakeFiles, FakePatchDrafts, FakePatcher, FakeVault

SECRET = b"k" * 32
DIMENSION = 4


class FakeTrainer:
    """A Trainer whose weights confess which records touched them."""

    def train(
        self,
        job: SliceJob,
        parent: Mapping[str, bytes] | None,
        records: Sequence[StoredRecord],
        progress: Callable[[Tick], None],
    ) -> dict[str, bytes]:
        before = json.loads(parent[ADAPTER_FILE])["touched"] if parent else []
        touched = sorted({*before, *(each.record.id for each in records)})
        done = Tick(len(records), len(records), 1, 1, 1, 1, len(records), loss=0.5)
        progress(done)
        return {
            ADAPTER_FILE: canonical_json({"job": job.key, "touched": touched}),
            "adapter_config.json": canonical_json({"touched": touched}),
            "optimizer.safetensors": canonical_json({"steps": len(records), "touched": touched}),
        }


class FakeCheckpoints(FakeFiles[dict[str, bytes]]):
    def save(self, job: SliceJob | PatchJob, files: Mapping[str, bytes]) -> SavedCheckpoint:
        self.stored.setdefault(job.key, dict(files))
        return self.describe(job.key)

    def describe(self, key: str) -> SavedCheckpoint:
        if key not in self.stored:
            raise IntegrityError("a checkpoint has no manifest")
        files = self.stored[key]
        manifest = canonical_json({name: sha256_hex(data) for name, data in files.items()})
        size = sum(len(data) for data in files.values())
        return SavedCheckpoint(key, sha256_hex(manifest), sha256_hex(files[ADAPTER_FILE]), size)

    def load(self, key: str, manifest_sha256: str) -> dict[str, bytes]:
        if self.describe(key).manifest_sha256 != manifest_sha256:
            raise IntegrityError("a checkpoint is not the one that was recorded")
        return dict(self.stored[key])

    def location(self, key: str) -> str:
        return f"checkpoints/{key}/{ADAPTER_FILE}"


class FakeRecords(FakeFiles[tuple[StoredRecord, ...]]):
    def write(self, shard: int, slice_: int, root: str, records: Sequence[StoredRecord]) -> SliceFile:
        data = canonical_json([each.record.canonical() for each in records])
        file = SliceFile(shard, slice_, root, len(records), sha256_hex(data), len(data))
        self.stored[file.name] = tuple(records)
        return file

    def read(self, file: SliceFile) -> tuple[StoredRecord, ...]:
        if file.name not in self.stored:
            raise IntegrityError("a slice file is missing")
        return self.stored[file.name]

    def check(self, file: SliceFile) -> None:
        self.read(file)


class FakeHiddenStates(FakeFiles[dict[str, States]]):
    def read(self, name: str) -> dict[str, States]:
        return dict(self.stored.get(name, {}))

    def write(self, name: str, states: Mapping[str, States]) -> None:
        self.stored[name] = dict(states)

    def num_bytes(self, start: str) -> int:
        held = [states for name, states in self.stored.items() if name.startswith(start)]
        return sum(each.nbytes for states in held for each in states.values())

    def location(self, name: str) -> str:
        return f"prefixes/{name}"


class FakeIndex(FakeFiles[dict[int, tuple[tuple[float, ...], ...]]]):
    def build(
        self, shard: int, root: str, base: IndexFile | None, vectors: Mapping[int, Any]
    ) -> IndexFile:
        held = self.stored[base.name] if base else {}
        rows: dict[int, tuple[tuple[float, ...], ...]] = {}
        for each in sorted(vectors):
            vector = vectors[each]
            if vector is None and each not in held:
                raise IntegrityError("the index lacks a vector")
            rows[each] = held[each] if vector is None else tuple(tuple(map(float, x)) for x in vector)
        data = canonical_json([[each, *rows[each]] for each in rows])
        file = IndexFile(shard, root, len(rows), sha256_hex(data), len(data))
        self.stored[file.name] = rows
        return file

    def search(
        self, found: Sequence[IndexFile], queries: Vectors, top_k: int, by: By = "text"
    ) -> list[list[Hit]]:
        answers = []
        for query in queries:
            scored = [
                Hit(each, float((self._side(held, by) @ query).max() / (query @ query)), file.shard)
                for file in found
                for each, held in self.stored[file.name].items()
            ]
            scored.sort(key=lambda hit: (-hit.score, hit.shard, hit.vector_id))
            answers.append(scored[:top_k])
        return answers

    @staticmethod
    def _side(held: tuple[tuple[float, ...], ...], by: By) -> Vectors:
        return np.array(held[:1] if by == "text" else held[1:] or held, dtype=np.float32)

    def vectors(self, file: IndexFile, vector_ids: Sequence[int], by: By = "text") -> Vectors:
        rows = self.stored[file.name]
        if any(each not in rows for each in vector_ids):
            raise IntegrityError("the index lacks a vector")
        found = [self._side(rows[each], by) for each in vector_ids]
        return np.concatenate([*found, np.zeros((0, DIMENSION), dtype=np.float32)])

    def check(self, file: IndexFile) -> None:
        if file.name not in self.stored:
            raise IntegrityError("an index file is missing")


class FakeExports:
    """Directories by path; a caller may move or change them behind the port's back."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, bytes]] = {}

    def write(self, path: str, content: Mapping[str, bytes]) -> None:
        self.stored.setdefault(path, dict(content))

    def abandon(self, path: str) -> None:
        """Do nothing: memory is always written completely."""

    def standing(self, export: Export) -> ExportStanding:
        files = self.stored.get(export.path, {})
        if ADAPTER_FILE not in files:
            return "gone"
        return "held" if sha256_hex(files[ADAPTER_FILE]) == export.adapter_sha256 else "changed"

    def erase(self, export: Export) -> bool:
        standing = self.standing(export)
        if standing == "changed" or (standing == "gone" and export.state != "erasing"):
            return False
        files = self.stored.get(export.path, {})
        for name in (ADAPTER_FILE, "adapter_config.json", "README.md", "model.sig"):
            files.pop(name, None)
        if not files:
            self.stored.pop(export.path, None)
        return True


class FakeWitness:
    def __init__(self) -> None:
        self.testimony = Testimony(None, {})

    def head(self) -> WitnessHead | None:
        return self.testimony.head

    def read(self) -> Testimony:
        return self.testimony

    def num_restrictions(self) -> int:
        return self.testimony.restrictions.number

    def append(
        self,
        head: WitnessHead,
        tombstones: Sequence[Tombstone],
        readmitted: Sequence[str],
        restrictions: Restrictions = NO_RESTRICTIONS,
    ) -> None:
        standing = {**self.testimony.tombstones, **{each.id_digest: each for each in tombstones}}
        for each in readmitted:
            standing.pop(each, None)
        newest = max(self.testimony.restrictions, restrictions, key=lambda each: each.number)
        self.testimony = Testimony(head, standing, newest)

    def location(self) -> str:
        return "memory"


def fake_embed(texts: Sequence[str]) -> Vectors:
    rows = [[byte - 127.5 for byte in hashlib.sha256(t.encode()).digest()[:DIMENSION]] for t in texts]
    matrix = np.array(rows, dtype=np.float32).reshape(len(texts), DIMENSION)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return (matrix / np.where(norms == 0, 1, norms)).astype(np.float32)


class FakeEmbedder:
    digest, dimension = "fake", DIMENSION

    def embed(self, texts: Sequence[str]) -> Vectors:
        return fake_embed(texts)


@dataclass
class FakeModel:
    """Hold fakes, a context of them, and the stages that were trained.

    Whatever is in `before_run` is called before stages are trained, to inspect the state.
    """

    ledger: FakeLedger = field(default_factory=FakeLedger)
    witness: FakeWitness = field(default_factory=FakeWitness)
    records: FakeRecords = field(default_factory=FakeRecords)
    checkpoints: FakeCheckpoints = field(default_factory=FakeCheckpoints)
    index: FakeIndex = field(default_factory=FakeIndex)
    exports: FakeExports = field(default_factory=FakeExports)
    patches: FakeCheckpoints = field(default_factory=FakeCheckpoints)
    vault: FakeVault = field(default_factory=FakeVault)
    patch_drafts: FakePatchDrafts = field(default_factory=FakePatchDrafts)
    trained: list[SliceJob] = field(default_factory=list)
    before_run: list[Callable[[], None]] = field(default_factory=list)
    patcher: FakePatcher = field(init=False)
    context: Context = field(init=False)

    def __post_init__(self) -> None:
        self.patcher = FakePatcher(self.vault, self.patches, self.patch_drafts)

    def rows(self, *numbers: int) -> list[RecordRow]:
        """Return the rows of those of these records that are held."""
        digests = [self.context.settings.assigner.id_digest(fake_record(n).id) for n in numbers]
        return [each for each in self.ledger.lookup(digests).values() if isinstance(each, RecordRow)]

    def forget(self, *numbers: int, defer: bool = False, **terms: Any) -> Request:
        """Delete those of these records that are held, in one request, as `sisa forget` does."""
        approved = Terms(**{"approver": "dpo", **terms})
        new = new_request(self.context, self.rows(*numbers), (), approved)
        (request,) = forget_at_once(self.context, new, defer=defer).requests
        return request

    def executor(self, store: CheckpointStore) -> Executor:
        return WatchedExecutor(SerialExecutor(FakeTrainer(), self.records, store), self)


@dataclass
class WatchedExecutor:
    """An executor that notes in a model what it trains."""

    inner: Executor
    model: FakeModel

    def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
        for look in self.model.before_run:
            look()

        def noted(stage: SliceTrained) -> None:
            self.model.trained.append(stage.job)
            on_stage(stage)

        self.inner.run(chains, report, noted)


def changed(context: Context, **fields: Any) -> Context:
    """Return the context with some fields replaced, its own or those of one of its three parts."""
    for part in ("stores", "compute", "settings"):
        held = getattr(context, part)
        own = {name: fields.pop(name) for name in list(fields) if hasattr(held, name)}
        if own:
            fields[part] = replace(held, **own)
    return replace(context, **fields)


def with_config(context: Context, **keys: Any) -> Context:
    """Return the context with some keys of the run file replaced."""
    return changed(context, config=context.settings.config.model_copy(update=keys))


FAKE_CONFIG = RunConfig(
    datasets=(DatasetSource(path="people.jsonl"),),
    output_dir=Path("model"),
    sisa=SisaBlock(aggregation=Aggregation(method="mean_prob")),  # so no prompts are looked up
)


def fake_recipe(
    num_slices: int = 3,
    schedule: Schedule = "cumulative",
    orders: int = 1,
    bands: Bands | None = None,
    budget: int | None = None,
) -> Recipe:
    others = chosen_orders(num_slices, orders, bands)[1:]
    risks = bands.slice_risks(num_slices) if bands else ()
    epochs, training = 2, {"learning_rate": 0.1}
    return Recipe(num_slices, schedule, epochs, training, "base-digest", others, budget, risks)


def fake_model(
    num_shards: int = 3,
    recipe: Recipe | None = None,
    fingerprint: str = "fingerprint",
    bands: Bands | None = None,
) -> FakeModel:
    recipe = recipe or fake_recipe()
    fake = FakeModel()
    stores = Stores(
        ledger=fake.ledger,
        witness=fake.witness,
        records=fake.records,
        checkpoints=fake.checkpoints,
        index=fake.index,
        keyring=PLAIN,
        exports=fake.exports,
        metrics=FakeMetrics(),
        patches=fake.patches,
        vault=fake.vault,
        patch_drafts=fake.patch_drafts,
        hidden_states=FakeHiddenStates(),
    )
    compute = Compute(
        embedder=FakeEmbedder,
        base=lambda: BaseFiles(Path("base"), recipe.base),
        tokenizer=lambda: None,
        count_tokens=lambda some: [len(record.text.split()) for record in some],
        executor_for=fake.executor,
        patcher=lambda: fake.patcher,
        fingerprint=fingerprint,
    )
    assigner = Assigner(Keyed(SECRET), Layout(num_shards, recipe.num_slices, bands))
    fake.context = Context(
        stores,
        compute,
        Settings(FAKE_CONFIG, assigner, recipe, EventChain(Keyed(SECRET), began_unkeyed=True)),
        now=lambda: "2026-01-01T00:00:00+00:00",
        report=lambda _event: None,
        hooks=(PatchesHook(),),
    )
    return fake


def fake_trained(numbers: Iterable[int], num_shards: int = 3, recipe: Recipe | None = None) -> FakeModel:
    """Return a model of fakes that was trained on the records with these numbers."""
    fake = fake_model(num_shards, recipe)
    train(fake.context, [fake_record(number) for number in numbers])
    return fake


def fake_record(number: int, subject: str | None = None) -> Record:
    body = (Part("prompt", f"question {number}"), Part("completion", f"answer {number}"))
    return Record(f"id-{number:04d}", subject, "completion", body)
