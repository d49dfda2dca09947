"""Seconds from an accepted deletion to clean heads, on stores of growing size, and where they go.

    python -m tests.bench.scale.rollback \\
        --out tests/bench/scale/rollback.json --sizes 10000,100000,1000000

A store has 64 shards of 8 slices, 384-dimensional vectors, and records placed by the hash. Its ledger,
slice files, checkpoints and FAISS files are the real ones, written as a training would leave them, by
the trainer of `tests/fakes/ports.py`, whose weights name every record that touched them. Single
records, drawn at random, are then deleted to the end as `Model.forget` does. The clock runs from
opening the ledger to the return of the commit after which no head is tainted; `to_the_end` is the whole
deletion with that trainer.

The page cache is warm. Whether the heads are clean is read from the weights that they serve, not taken
from the planner. Every call of a port before that moment is recorded with its time, its bytes and its
shard, so that a plan which reads other shards is detected. Checking the base's digest, which
`Model.forget` does first, is not included.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import numpy as np

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import Keyed
from sisa.core.domain import (
    Head,
    HeldCheckpoint,
    IndexFile,
    Part,
    Record,
    RecordRow,
    SliceFile,
    record_epochs,
)
from sisa.core.hooks import DeletionHook
from sisa.core.ports import Change, CheckpointStore, Executor, StoredRecord, Vectors
from sisa.flows.chains import SerialExecutor
from sisa.flows.context.context import Context
from sisa.flows.deletion import plan_forget
from sisa.flows.locations import lookup
from sisa.flows.requests import Terms, forget_at_once, new_request
from sisa.planning.layout import Assigner, Layout, index_root, slice_root
from sisa.planning.plan import jobs, touched
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.index import FaissIndex
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.records import FileRecords
from sisa.store.witness import FileWitness
from tests.bench.command import arguments, machine, markdown, write
from tests.fakes.keyring import PLAIN
from tests.fakes.ports import FakeTrainer, changed, fake_model, fake_recipe

KEY = bytes(range(32))
SIZES = (10_000, 100_000, 1_000_000)
SHARDS_IN_A_COMMIT = 16  # rows of that many shards interleave in the ledger, as in a training's commit
WARM_UP = 3
SEED = 7  # of the records that are deleted
TARGET_S = 1.0


@dataclass(frozen=True)
class Scale:
    """The size of a store to measure on."""

    num_records: int
    num_shards: int = 64
    num_slices: int = 8
    dimension: int = 384


@dataclass(frozen=True)
class Call:
    """One call of a port before the heads were clean; `shard` is None when it names none."""

    port: str
    method: str
    shard: int | None
    seconds: float
    bytes_read: int
    bytes_written: int
    rows: int


class Watch:
    """A record of the ports' calls up to the return of the commit after which `is_clean` holds."""

    def __init__(self, is_clean: Callable[[], bool]) -> None:
        self._is_clean = is_clean
        self._aside_s = 0.0  # spent on asking, no part of the deletion
        self._io = io_bytes()
        self._started, self._cpu = time.perf_counter(), time.process_time()
        self.calls: list[Call] = []
        self.clean_s: float | None = None
        self.cpu_s = 0.0
        self.io: tuple[int, int] = (0, 0)

    def seconds(self) -> float:
        """Return the seconds since the start, without the time spent on checking."""
        return time.perf_counter() - self._started - self._aside_s

    def note(self, call: Call) -> None:
        if self.clean_s is not None:
            return
        self.calls.append(call)
        if call.method == "commit":
            seconds, asked = self.seconds(), time.perf_counter()
            cpu = time.process_time() - self._cpu
            read, wrote = (now - then for now, then in zip(io_bytes(), self._io, strict=True))
            if self._is_clean():
                self.clean_s, self.cpu_s, self.io = seconds, cpu, (read, wrote)
            self._aside_s += time.perf_counter() - asked


class Watched:
    """A port whose calls are recorded."""

    def __init__(self, port: str, inner: Any, watch: Watch, shards: dict[str, int]) -> None:
        self._port, self._inner, self._watch, self._shards = port, inner, watch, shards

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            answer = found(*args, **options)
            seconds = time.perf_counter() - started
            self._watch.note(self._call(name, (*args, *options.values()), answer, seconds))
            return answer

        return call

    def _call(self, name: str, given: tuple[Any, ...], answer: Any, seconds: float) -> Call:
        read = [each.num_bytes for each in given if isinstance(each, SliceFile | IndexFile)]
        wrote = answer.num_bytes if isinstance(answer, SliceFile | IndexFile) else 0
        rows = len(answer) if isinstance(answer, list | dict) and self._port == "ledger" else 0
        return Call(self._port, name, self._shard(given), seconds, sum(read), wrote, rows)

    def _shard(self, given: tuple[Any, ...]) -> int | None:
        for each in given:
            if isinstance(each, SliceFile | IndexFile):
                return each.shard
            if isinstance(each, int) and not isinstance(each, bool):
                return each
            if isinstance(each, str) and each in self._shards:
                return self._shards[each]
        return None


class Store:
    """A model directory of a scale, and its parts."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.records = FileRecords(folder / "records", PLAIN)
        self.checkpoints = FileCheckpoints(folder / "checkpoints", PLAIN)
        self.index = FaissIndex(folder / "index", scale.dimension, PLAIN)
        self.assigner = Assigner(Keyed(KEY), Layout(scale.num_shards, scale.num_slices))
        self.recipe = fake_recipe(scale.num_slices)

    def ledger(self, *, create: bool = False) -> SqlLedger:
        return SqlLedger(self.folder / "ledger.sqlite", create=create)

    def build(self) -> None:
        """Write the store as a training on all records would have left it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        by_shard: dict[int, list[tuple[RecordRow, Record]]] = defaultdict(list)
        for record in make_records(self.scale.num_records):
            row = self.assigner.row(record, 40)
            by_shard[row.shard].append((row, record))
        ledger = self.ledger(create=True)
        shards = range(self.scale.num_shards)
        for first in range(0, len(shards), SHARDS_IN_A_COMMIT):
            self._commit_rows(ledger, shards[first : first + SHARDS_IN_A_COMMIT], by_shard)
        held, heads = [], []
        for shard in shards:
            stored = [StoredRecord(row.id_digest, record) for row, record in by_shard.pop(shard, [])]
            stages = self._train(ledger, shard, stored)
            held += stages
            key = stages[-1].key if stages else None
            heads.append(Head(shard, key, self.scale.num_slices if key else 0, key))
        ledger.commit(Change(checkpoints=held, heads=heads, meta={"config": "{}"}))
        ledger.scrub()
        ledger.close()

    def _commit_rows(
        self,
        ledger: SqlLedger,
        shards: Iterable[int],
        by_shard: dict[int, list[tuple[RecordRow, Record]]],
    ) -> None:
        added: list[RecordRow] = []
        slices: list[SliceFile] = []
        indexes: list[IndexFile] = []
        for shard in shards:
            here = sorted(by_shard.get(shard, []), key=lambda pair: pair[0].id_digest)
            rows = [row for row, _ in here]
            if not rows:
                continue
            added += rows
            for slice_ in range(self.scale.num_slices):
                cell = [(row, record) for row, record in here if row.slice == slice_]
                if cell:
                    stored = [StoredRecord(row.id_digest, record) for row, record in cell]
                    root = slice_root(row for row, _ in cell)
                    slices.append(self.records.write(shard, slice_, root, stored))
            vectors = unit_vectors(len(rows), self.scale.dimension, shard)
            named = {row.vector_id: vector[None] for row, vector in zip(rows, vectors, strict=True)}
            indexes.append(self.index.build(shard, index_root(rows), None, named))
        added.sort(key=lambda row: row.id_digest)
        ledger.commit(Change(added=added, slices=slices, indexes=indexes))

    def _train(
        self, ledger: SqlLedger, shard: int, stored: Sequence[StoredRecord]
    ) -> list[HeldCheckpoint]:
        place = {each.id_digest: self.assigner.place(each.record)[1] for each in stored}
        parent: dict[str, bytes] | None = None
        held = []
        seq = ledger.seq()
        for job in jobs(shard, ledger.slices(shard), self.recipe, "fingerprint"):
            seen = {slice_ for slice_, _ in job.slices}
            stage = [each for each in stored if place[each.id_digest] in seen]
            parent = FakeTrainer().train(job, parent, stage, lambda _: None)
            saved = self.checkpoints.save(job, parent)
            held.append(
                HeldCheckpoint(
                    **asdict(saved),
                    shard=shard,
                    prefix=job.prefix,
                    seq=seq,
                    fingerprint=job.fingerprint,
                    seconds=1.0,
                    record_epochs=record_epochs(job),
                )
            )
        return held

    def weights(self, key: str) -> bytes:
        return self.checkpoints.blobs.get(f"{key}/{ADAPTER_FILE}", "adapter")

    def num_bytes(self) -> int:
        return sum(each.stat().st_size for each in self.folder.rglob("*") if each.is_file())


@dataclass(frozen=True)
class Deletion:
    """The cost of one deletion; bytes are of the process until the heads were clean."""

    row: RecordRow
    clean_s: float
    cpu_s: float
    plan_s: float
    end_s: float
    calls: tuple[Call, ...]
    bytes_read: int
    bytes_written: int


def record_name(number: int) -> str:
    return f"id-{number:07d}"


def make_records(count: int) -> Iterator[Record]:
    """Return records of some 200 characters that hardly compress."""
    for number in range(count):
        text = hashlib.shake_128(str(number).encode()).hexdigest(80)
        yield Record(
            record_name(number),
            None,
            "completion",
            (Part("prompt", f"Question {number}: {text[:60]}?"), Part("completion", text[60:])),
        )


def unit_vectors(count: int, dimension: int, seed: int) -> Vectors:
    """Return random directions."""
    matrix = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    return cast(Vectors, matrix / np.linalg.norm(matrix, axis=1, keepdims=True))


def refuse(*_given: Any) -> Any:
    raise AssertionError("a deletion embeds and counts nothing")


def watched_context(
    store: Store,
    ledger: SqlLedger,
    watch: Watch,
    shards: dict[str, int],
    hooks: Sequence[DeletionHook[Context]],
) -> Context:
    """Return a context of real parts with a trainer that costs nothing; calls of ports are recorded."""

    def executor_for(checkpoints: CheckpointStore) -> Executor:
        return SerialExecutor(FakeTrainer(), store.records, checkpoints)

    def watched(port: str, inner: Any) -> Any:
        return Watched(port, inner, watch, shards)

    context = fake_model(store.scale.num_shards, store.recipe).context
    return changed(
        context,
        ledger=watched("ledger", ledger),
        witness=watched("witness", FileWitness(store.folder / "witness.jsonl", Keyed(KEY))),
        records=watched("records", store.records),
        checkpoints=watched("checkpoints", store.checkpoints),
        index=watched("index", store.index),
        embedder=refuse,
        count_tokens=refuse,
        executor_for=executor_for,
        assigner=store.assigner,
        blobs={"log": LocalBlobs(store.folder / "log")},
        now=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"),
        hooks=(*context.hooks, *hooks),
    )


def io_bytes() -> tuple[int, int]:
    """Return the bytes that this process has asked to read and to write."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def delete(
    store: Store, record_id: str, reason: str, hooks: Sequence[DeletionHook[Context]] = ()
) -> Deletion:
    """Delete one record to the end. Raise AssertionError when no commit cleaned the heads."""
    before = store.ledger()
    row = before.lookup([store.assigner.id_digest(record_id)])[store.assigner.id_digest(record_id)]
    assert isinstance(row, RecordRow)
    held = before.checkpoints()
    lost = {each.key for each in held if touched(each, row)}
    assert lost

    def is_clean() -> bool:
        heads = before.heads()
        clean = not any(head.key in lost for head in heads)
        if clean:
            served = next(head.key for head in heads if head.shard == row.shard)
            assert served is None or record_id.encode() not in store.weights(served)
        return clean

    watch = Watch(is_clean)
    started = time.perf_counter()
    ledger = store.ledger()
    watch.note(Call("ledger", "open", None, time.perf_counter() - started, 0, 0, 0))
    context = watched_context(store, ledger, watch, {each.key: each.shard for each in held}, hooks)
    rows = [each for each in lookup(context, [record_id]) if isinstance(each, RecordRow)]
    plan_forget(context, rows)
    plan_s = watch.seconds()
    terms = Terms(approver="bench", reason=reason)
    (done,) = forget_at_once(context, new_request(context, rows, (), terms)).requests
    end_s = watch.seconds()
    ledger.close()
    before.close()
    assert watch.clean_s is not None
    assert done.state == "completed"
    return Deletion(row, watch.clean_s, watch.cpu_s, plan_s, end_s, tuple(watch.calls), *watch.io)


def where_it_goes(call: Call) -> str:
    """Return the kind of work that a call does."""
    if call.port == "ledger":
        known = {"open": "ledger opened", "commit": "ledger commit"}
        return known.get(call.method, "ledger read")
    what = {"records": "slice files", "index": "index file", "checkpoints": "checkpoints"}[call.port]
    return f"{what} {'rewritten' if call.method in ('write', 'build') else 'read'}"


def summary(store: Store, deletions: Sequence[Deletion], build_s: float) -> dict[str, Any]:
    """Return one size's numbers."""
    sorts = sorted({where_it_goes(call) for each in deletions for call in each.calls})
    times = [each.clean_s for each in deletions]

    def mean_of(value: Callable[[Call], float], sort: str) -> float:
        found = [value(call) for each in deletions for call in each.calls if where_it_goes(call) == sort]
        return sum(found) / len(deletions)

    where = {sort: round(mean_of(lambda call: call.seconds, sort), 4) for sort in sorts}
    where["digests, planning and the rest"] = round(mean(times) - sum(where.values()), 4)
    calls = [call for each in deletions for call in each.calls]
    return {
        "records": store.scale.num_records,
        "store_bytes": store.num_bytes(),
        "build_seconds": round(build_s, 1),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of CPUs: times are too long
        "deletions": len(deletions),
        "clean_heads_seconds": percentiles(times),
        "of_which_processor_seconds": percentiles([each.cpu_s for each in deletions]),
        "of_which_plan_seconds": percentiles([each.plan_s for each in deletions]),
        "to_the_end_seconds": percentiles([each.end_s for each in deletions]),
        "mean_seconds_by_work": where,
        "mean_bytes_read": {
            **{sort: int(mean_of(lambda call: call.bytes_read, sort)) for sort in sorts},
            "process": int(mean([each.bytes_read for each in deletions])),
        },
        "mean_bytes_written": {
            **{sort: int(mean_of(lambda call: call.bytes_written, sort)) for sort in sorts},
            "process": int(mean([each.bytes_written for each in deletions])),
        },
        "mean_ledger_calls": round(sum(call.port == "ledger" for call in calls) / len(deletions), 1),
        "mean_record_rows_read": int(
            sum(call.rows for call in calls if call.method == "rows") / len(deletions)
        ),
        "calls_that_read_other_shards": sum(len(strayed(each)) for each in deletions),
    }


def strayed(deletion: Deletion) -> list[Call]:
    """Return calls on files, checkpoints or record rows of shards that the deletion does not concern."""
    return [call for call in deletion.calls if call.shard not in (None, deletion.row.shard)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    rank = math.ceil(0.95 * len(ordered)) - 1
    found = {"p50": median(ordered), "p95": ordered[rank], "max": ordered[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def measure(folder: Path, scale: Scale, num_deletions: int) -> dict[str, Any]:
    """Build a store, delete single random records of it, and summarise."""
    store = Store(folder, scale)
    started = time.perf_counter()
    store.build()
    build_s = time.perf_counter() - started
    chosen = random.Random(SEED).sample(range(scale.num_records), WARM_UP + num_deletions)
    done = [delete(store, record_name(number), "benchmark") for number in chosen]
    return summary(store, done[WARM_UP:], build_s)


def run(folder: Path, sizes: Sequence[int], num_deletions: int) -> dict[str, Any]:
    """Measure all sizes, smallest first, each in a folder of its own that is removed after it."""
    found: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            found.append(measure(Path(name), Scale(size), num_deletions))
        print(line(found[-1]), flush=True)
    smallest, largest = found[0], found[-1]
    p50 = [each["clean_heads_seconds"]["p50"] for each in (smallest, largest)]
    return {
        "machine": machine(),
        "libraries": {
            **{name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow", "sqlalchemy")},
            "sqlite": sqlite3.sqlite_version,
        },
        "layout": {name: value for name, value in asdict(Scale(0)).items() if name != "num_records"},
        "sizes": found,
        "growth": {
            "records": round(largest["records"] / smallest["records"], 1),
            "clean_heads_p50": round(p50[1] / p50[0], 2),
        },
        "target_seconds": TARGET_S,
        "target_met": all(each["clean_heads_seconds"]["p95"] < TARGET_S for each in found),
    }


def line(found: dict[str, Any]) -> str:
    """Return one size in words."""
    clean, end = found["clean_heads_seconds"], found["to_the_end_seconds"]
    return (
        f"{found['records']:>9,} records: clean heads after {clean['p50']:.3f} s (p50), "
        f"{clean['p95']:.3f} s (p95); to the end {end['p50']:.2f} s, training faked"
    )


def clean_heads(found: dict[str, Any]) -> str:
    """Return the seconds to clean heads in words."""
    seconds = found["clean_heads_seconds"]
    return f"{seconds['p50']:.2f} s p50, {seconds['p95']:.2f} s p95"


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the time to clean heads by the number of records."""
    lines = [(f"{each['records']:,}", clean_heads(each)) for each in found["sizes"]]
    yield from markdown(("records", "from a request to clean heads"), lines)


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("rollback.json"),
        sizes=",".join(str(each) for each in SIZES),
        deletions=50,
        folder={"type": Path, "help": "where stores are written; the largest takes 3 GB"},
    )
    sizes = sorted(int(each) for each in given.sizes.split(","))
    write(given.out, run(given.folder, sizes, given.deletions))


if __name__ == "__main__":
    main()
