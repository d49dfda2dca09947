"""The public API: open a model, train, add, where, find, forget, verify, generate, export.

    import sisa
    model, taken = sisa.train_model("run.yaml")
    model.where(["p001-q1"])
    model.forget(["p001-q1"])
    assert model.verify(replay="all").ok

Rules: one object per model directory. Writers hold the directory's lock; a second one gets `Busy`.
Every method raises only errors of `sisa.errors` for what a caller or a machine did wrong.

Not covered: the first training and a changed run file (`training.py`); printing (`cluster/cli.py`);
requests that wait, legal holds, certificates.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sisa import opening, query
from sisa.cost import estimate_seconds
from sisa.digest import Keyed, canonical_json
from sisa.domain import Kind, Record, RecordRow, Request, Tombstone
from sisa.errors import IntegrityError, InvalidInput
from sisa.opening import CHECKPOINTS, INDEX, KEY, LEDGER, LOCK, RECORDS, SCRATCH, OpenExecutor, Parts
from sisa.ports import Event, Report
from sisa.reader import read_records
from sisa.reconcile import reconcile
from sisa.run import Forgetting, Taken, add, forget, plan_forget, train
from sisa.store import files
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.ledger import SqlLedger
from sisa.verify import Verification, verify
from sisa.world import World, model_digest

Replay = Literal["none", "sample", "all"]
NUM_ROUTING_HITS = 8


def silent(_event: Event) -> None:
    """The report of callers who asked for none."""


@dataclass(frozen=True)
class Status:
    """A model at a glance; sizes in bytes."""

    directory: str
    records: int
    deleted_records: int
    model_digest: str
    base_model: str
    base_digest: str
    embedder: str
    schedule: str
    shards: tuple[query.ShardStatus, ...]
    requests: tuple[Request, ...]
    sizes_bytes: dict[str, int]


@dataclass(frozen=True)
class ForgetPlan:
    """What a deletion would do; `estimated_seconds` is of one worker, None before any measurement."""

    forgetting: Forgetting
    estimated_seconds: float | None
    slice_files_rewritten: int
    slice_files_erased: int
    index_rows_erased: int


@dataclass(frozen=True)
class ForgetOutcome:
    """What a deletion did. `request` is None when every named record was deleted already."""

    request: Request | None
    already_deleted: tuple[Tombstone, ...]
    model_digest: str


class Model:
    """A deletion-ready model in a directory."""

    def __init__(
        self,
        directory: Path | str,
        *,
        executor: str | OpenExecutor = "ray",
        report: Report = silent,
    ) -> None:
        """Open an existing model. Raises InvalidInput where there is none, IntegrityError for damage."""
        self.directory = Path(directory)
        if not (self.directory / LEDGER).is_file():
            raise InvalidInput(
                "there is no model in this directory",
                where=str(self.directory),
                expected=f"a directory with {LEDGER}",
                next_step="train one with `sisa train RUN.yaml`",
            )
        ledger = SqlLedger(self.directory / LEDGER)
        meta = ledger.meta()
        ledger.close()
        if "config" not in meta:
            raise InvalidInput(
                "the model in this directory was never committed",
                where=str(self.directory),
                next_step="run `sisa train RUN.yaml` again",
            )
        self.config = opening.stored_config(meta)
        self.base = opening.named(meta, "base")
        self.embedder = opening.named(meta, "embedder")
        self.executor = executor
        self.report = report
        self.parts = Parts(self.config, self.base, self.embedder)
        self.secret = opening.stored_secret(self.directory, self.config)
        if Keyed(self.secret).name != meta["key"]:
            raise IntegrityError(
                "the partition key is not this model's",
                where=str(self.directory / KEY),
                next_step="restore the key from a backup: without it no record can be found",
            )

    @contextlib.contextmanager
    def _world(self) -> Iterator[World]:
        world = opening.open_world(
            self.directory,
            self.parts,
            Keyed(self.secret),
            self.executor,
            self.report,
            base_digest=self.base.digest,
        )
        try:
            yield world
        finally:
            opening.close(world)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[World]:
        opening.find_executor(self.executor)  # an unknown one is refused before anything is written
        with files.writer_lock(self.directory / LOCK):
            files.erase(self.directory / SCRATCH)
            with self._world() as world:
                yield world

    def add(self, source: Path | str | Sequence[Record]) -> Taken:
        """Take new records in; the result equals training on all of them from scratch."""
        if isinstance(source, str | Path):
            source = read_records([source], self.config.sisa.group_by)
        with self._writing() as world:
            self.parts.count_tokens(source)
            _ = self.parts.base  # refuses a changed base before anything is written
            return add(world, source)

    def resume(self, source: Sequence[Record] = ()) -> Taken:
        """Train what is missing; records of `source` are only compared with the held ones."""
        with self._writing() as world:
            _ = self.parts.base  # refuses a changed base
            return train(world, source)

    def where(self, ids: Sequence[str]) -> list[query.Location]:
        """Shard, slice, checkpoints and heads of each record. Raises UnknownRecord."""
        with self._world() as world:
            return query.where(world, ids)

    def find(
        self,
        *,
        text: str | None = None,
        subject: str | None = None,
        like: str | None = None,
        top_k: int = 10,
    ) -> list[query.Found]:
        """Candidates by content (`text`), of a subject, or near-duplicates of a record (`like`)."""
        if sum(each is not None for each in (text, subject, like)) != 1:
            raise InvalidInput("give exactly one of text, subject and like")
        with self._world() as world:
            if subject is not None:
                return query.find_subject(world, subject, top_k)
            if like is not None:
                return query.find_like(world, like, top_k)
            return query.find_text(world, [str(text)], top_k)

    def ids_of_subject(self, subject: str) -> list[str]:
        """Ids of a subject's held records. Raises UnknownRecord."""
        with self._world() as world:
            live, _ = query.of_subject(world, subject)
            return sorted(each.record.id for each in query.stored(world, live))

    def plan_forget(self, ids: Sequence[str] = (), *, subject: str | None = None) -> ForgetPlan:
        """What `forget` would do; changes nothing."""
        with self._world() as world:
            planned = _planned(world, ids, subject)
            measured = world.ledger.checkpoints()
            rewritten = len(planned.remaining)
            return ForgetPlan(
                forgetting=planned,
                estimated_seconds=estimate_seconds(planned.record_epochs_retrained, measured),
                slice_files_rewritten=rewritten,
                slice_files_erased=rewritten + len(planned.emptied),
                index_rows_erased=len(planned.removed),
            )

    def forget(self, ids: Sequence[str] = (), *, subject: str | None = None) -> ForgetOutcome:
        """Delete records exactly. Raises UnknownRecord; ids deleted before are reported, not refused."""
        with self._writing() as world:
            planned = _planned(world, ids, subject)
            request = None
            if planned.removed:
                if any(plan.train for plan in planned.plans):
                    _ = self.parts.base  # refuses a changed base before anything is erased
                request = forget(world, planned, f"req-{uuid.uuid4()}")
            else:
                reconcile(world)  # finishes a deletion that a crash cut short
            return ForgetOutcome(request, planned.already_deleted, model_digest(world.ledger))

    def status(self) -> Status:
        """Shards, slices, heads, requests and sizes."""
        with self._world() as world:
            return Status(
                directory=str(self.directory),
                records=sum(world.ledger.counts().values()),
                deleted_records=world.ledger.num_tombstones(),
                model_digest=model_digest(world.ledger),
                base_model=self.base.name,
                base_digest=self.base.digest,
                embedder=self.embedder.name,
                schedule=self.config.sisa.schedule,
                shards=tuple(query.shards(world)),
                requests=tuple(world.ledger.requests()),
                sizes_bytes={
                    name: _size(self.directory / name) for name in (LEDGER, RECORDS, INDEX, CHECKPOINTS)
                },
            )

    def verify(self, replay: Replay = "none", shard: int | None = None) -> Verification:
        """Check every held byte; with `replay` train shards from scratch and compare the bytes."""
        with contextlib.ExitStack() as stack:
            if replay == "none":
                world = stack.enter_context(self._world())
                return verify(world, [], None)
            world = stack.enter_context(self._writing())
            chosen = _replayed(world, replay, shard)
            scratch = Path(tempfile.mkdtemp(dir=_made(self.directory / SCRATCH)))
            stack.callback(shutil.rmtree, self.directory / SCRATCH, ignore_errors=True)
            return verify(world, chosen, FileCheckpoints(scratch))

    def generate(self, prompt: str, *, max_new_tokens: int = 48, kind: Kind | None = None) -> Answer:
        """Answer with the constituent models that the run file's aggregation chooses."""
        return self.generate_all([prompt], max_new_tokens=max_new_tokens, kind=kind)[0]

    def generate_all(
        self, prompts: Sequence[str], *, max_new_tokens: int = 48, kind: Kind | None = None
    ) -> list[Answer]:
        """Answers to several prompts; the models are loaded once."""
        from sisa.model.answer import Answerer
        from sisa.model.route import choose_shards
        from sisa.model.tokens import encode_prompt

        with self._world() as world:
            live = {h.shard: h.key for h in world.ledger.heads() if h.key is not None}
            how = self.config.sisa.aggregation
            routes = []
            for prompt in prompts:
                hits = []
                if how.method == "routed":
                    hits = query.search(world, world.embed([prompt]), NUM_ROUTING_HITS)
                routes.append(choose_shards(hits, how.method, how.top_k, live))
            manifests = {each.key: each.manifest_sha256 for each in world.ledger.checkpoints()}
            adapters = {
                shard: world.checkpoints.load(str(live[shard]), manifests[str(live[shard])])
                for shard in sorted({shard for route in routes for shard in route})
            }
            kind = kind or _usual_kind(world)
        base = self.parts.base
        answerer = Answerer(base.directory, base.digest, adapters, self.config.sisa.threads_per_shard)
        answers = []
        for prompt, route in zip(prompts, routes, strict=True):
            ids = encode_prompt(prompt, answerer.tokenizer, kind)
            answers.append(Answer(answerer.generate(ids, route, max_new_tokens).strip(), route))
        return answers

    def export(self, to: Path | str) -> list[Path]:
        """One standard PEFT directory per shard that serves a head. Raises InvalidInput if `to` holds
        anything."""
        target = Path(to)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidInput("the target is not an empty directory", where=str(target))
        made = []
        with self._world() as world:
            manifests = {each.key: each.manifest_sha256 for each in world.ledger.checkpoints()}
            for head in world.ledger.heads():
                if head.key is None:
                    continue
                held = world.checkpoints.load(head.key, manifests[head.key])
                config = json.loads(held["adapter_config.json"])
                config["base_model_name_or_path"] = str(self.parts.base.directory)
                path = target / f"shard-{head.shard:05d}"
                files.write_directory(
                    path,
                    {
                        "adapter_model.safetensors": held["adapter_model.safetensors"],
                        "adapter_config.json": canonical_json(config),
                    },
                )
                made.append(path)
        return made


@dataclass(frozen=True)
class Answer:
    """An answer and the shards whose models gave it; none means the base alone."""

    text: str
    shards: tuple[int, ...]


def open_model(
    directory: Path | str, *, executor: str | OpenExecutor = "ray", report: Report = silent
) -> Model:
    """Open the model in a directory."""
    return Model(directory, executor=executor, report=report)


def _made(path: Path) -> Path:
    with files.disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _planned(world: World, ids: Sequence[str], subject: str | None) -> Forgetting:
    if (subject is None) == (not ids):
        raise InvalidInput("give record ids or a subject, not both and not neither")
    if subject is not None:
        live, dead = query.of_subject(world, subject)
        return plan_forget(world, live, dead)
    held = [each for _, each in query.lookup(world, list(dict.fromkeys(ids)))]
    rows = [each for each in held if isinstance(each, RecordRow)]
    return plan_forget(world, rows, [each for each in held if isinstance(each, Tombstone)])


def _replayed(world: World, replay: Replay, shard: int | None) -> list[int]:
    heads = world.ledger.heads()
    if shard is not None:
        if shard not in {head.shard for head in heads}:
            raise InvalidInput("no such shard", expected=f"0 to {len(heads) - 1}", got=str(shard))
        return [shard]
    if replay == "all":
        return [head.shard for head in heads]
    held = [head.shard for head in heads if head.key is not None]
    return [secrets.choice(held)] if held else []


def _usual_kind(world: World) -> Kind:
    """How a prompt is put to the model: as most of the remaining records are written."""
    kinds = world.ledger.kinds()
    choices: tuple[Kind, ...] = ("chat", "completion", "text")
    return max(choices, key=lambda kind: kinds.get(kind, 0))
