"""An open model as flows use it, and the few reads and writes that several flows share.

`Context` holds what is stored, what computes and what is configured; `wiring.py` builds one from real
parts, tests from fakes. Nothing is decided here. New slice files get new names, and nothing is
overwritten or erased; the flows decide in which order effects happen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

from sisa.core.domain import HeldCheckpoint, IndexFile, Record, RecordRow, SliceFile, SliceState
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.events import Report
from sisa.core.patch import Patch, PatchMode, patched_digest
from sisa.core.ports import (
    BlobStore,
    Change,
    CheckpointStore,
    DeletionHook,
    Executor,
    ExportStore,
    KeptVersions,
    Keyring,
    Ledger,
    Metrics,
    PatchDrafts,
    Patcher,
    PrefixStore,
    Probe,
    RecordIndex,
    RecordStore,
    StoredRecord,
    Vault,
    Vectors,
    Witness,
)
from sisa.core.requests import EventChain
from sisa.planning.assign import Assigner, slice_root
from sisa.planning.patch_plan import TRAINED_OVER, active, wanted
from sisa.planning.plan import Recipe, ShardPlan, ShardView, plan_shard, prefix_names

SlicePosition = tuple[int, int]  # shard, slice


class Area(Protocol):
    """Named files, or groups of files, of one kind."""

    def held(self) -> frozenset[str]: ...

    def erase(self, names: Collection[str], /) -> None: ...


FEW_SHARDS = 16  # that are asked for one by one
ALWAYS_SEALED = ("vault", "runs")  # areas that are sealed in a plain model, too


@dataclass(frozen=True)
class Stores:
    """What is stored of a model, and where."""

    ledger: Ledger
    witness: Witness
    records: RecordStore
    checkpoints: CheckpointStore
    index: RecordIndex
    keyring: Keyring
    exports: ExportStore
    metrics: Metrics
    patches: CheckpointStore
    vault: Vault
    drafts: PatchDrafts
    prefixes: PrefixStore | None = None
    blobs: Mapping[str, BlobStore] = field(default_factory=dict)  # by storage area; fakes have none


@dataclass(frozen=True)
class Compute:
    """What computes for a model; heavy parts are opened by their first use."""

    embed: Callable[[Sequence[str]], Vectors]
    count_tokens: Callable[[Sequence[Record]], Sequence[int]]
    executor_for: Callable[[CheckpointStore], Executor]
    patcher: Callable[[], Patcher]
    fingerprint: str  # of the numerics that all of it runs under
    probe: Probe | None = None


@dataclass(frozen=True)
class Settings:
    """What the run file and the partition key decide."""

    assigner: Assigner
    recipe: Recipe  # of shards over the frozen base alone
    patch_mode: PatchMode
    chain: EventChain  # of the ledger's events
    keeps_prefixes: bool = False  # whether hidden states may be kept

    @property
    def base(self) -> str:
        """The digest of the frozen base."""
        return self.recipe.base


@dataclass(frozen=True)
class Context:
    """An open model, as flows use it."""

    stores: Stores
    compute: Compute
    settings: Settings
    now: Callable[[], str]
    report: Report
    hooks: tuple[DeletionHook[Context], ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The recipe of shards over the base and the patches that the ledger names. Raises
        IntegrityError."""
        base = self.settings.base
        stack = [each.adapter_sha256 for each in patches_beneath(self.stores.ledger, base)]
        return replace(self.settings.recipe, base=patched_digest(base, stack))

    @property
    def reported_areas(self) -> tuple[str, ...]:
        """The storage areas whose size `sisa status` lists."""
        found = ("records", "index", "checkpoints")
        return (*found, "prefixes") if self.settings.keeps_prefixes else found


def commit(context: Context, change: Change) -> int:
    """Commit a transaction, and record in the witness what it says of requests or deletions.

    A crash between the two is made good by the next writer (`witness.py`).
    """
    ledger, chain = context.stores.ledger, context.settings.chain
    before = ledger.event_head().link if change.events else ""
    seq = ledger.commit(replace(change, events=[*chain.linked(before, change.events)]))
    if "model" in change.meta or change.events or change.tombstones or change.readmitted:
        context.stores.witness.append(ledger.event_head(), change.tombstones, change.readmitted)
    return seq


def model_digest(context: Context) -> str:
    """Return the keyed digest of all heads' adapters in shard order, and of the active patches if there
    are any. It outlives a deletion, in requests and on cards: without the key it confirms nothing."""
    ledger = context.stores.ledger
    adapters = {each.key: each.adapter_sha256 for each in ledger.checkpoints()}
    heads = [adapters.get(head.key) if head.key else None for head in ledger.heads()]
    stack = [each.adapter_sha256 for each in active(ledger.patches())]
    return context.settings.assigner.model_digest(heads, stack)


def trained_over(ledger: Ledger) -> tuple[str, ...]:
    """Return the keys of the patches that the shards are trained over, lowest first."""
    return tuple(json.loads(ledger.meta().get(TRAINED_OVER, "[]")))


def patches_beneath(ledger: Ledger, base: str) -> list[Patch]:
    """Return the patches that shards are trained over, lowest first; those of a former base are none."""
    keys = trained_over(ledger)
    if not keys:
        return []
    patches = {each.key: each for each in ledger.patches() if each.manifest_sha256}
    if absent := [key for key in keys if key not in patches]:
        raise IntegrityError(
            "the ledger lacks patches that shards are trained over",
            got=f"{len(absent)} of {len(keys)}",
            next_step="restore the model directory from a backup",
        )
    found = [patches[key] for key in keys]
    return found if all(each.job.base == base for each in found) else []


def known_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names that the ledger knows in each storage area: slice files, index files and
    checkpoints; patches that are served or trained over, unfinished ones, sets whose texts are held;
    and those files of hidden states that are held."""
    ledger = context.stores.ledger
    patches = ledger.patches()
    return {
        "records": frozenset(file.name for file in ledger.slices()),
        "index": frozenset(file.name for file in ledger.indexes()),
        "checkpoints": frozenset(each.key for each in ledger.checkpoints()),
        "patches": frozenset(each.key for each in active(patches)).union(trained_over(ledger)),
        "vault": frozenset(each.name for each in ledger.vault() if each.held),
        "runs": frozenset(each.key for each in wanted(patches)),
        "prefixes": _known_prefixes(context),
    }


def _known_prefixes(context: Context) -> frozenset[str]:
    """Return the held files of hidden states of slices as they are now."""
    if context.stores.prefixes is None or not context.settings.keeps_prefixes:
        return frozenset()
    try:
        held = context.stores.prefixes.held()
    except EnvironmentFault:
        return frozenset()  # a cache; whoever erases there meets the error again
    return held & prefix_names(
        context.stores.ledger.slices(), context.recipe, context.compute.fingerprint
    )


def areas(context: Context) -> dict[str, Area]:
    """Return the storage areas whose files the ledger knows.

    What is held there, leftover temporary files included, can be erased; of the vault and the drafts
    also keys.
    """
    found: dict[str, Area] = {
        "records": context.stores.records,
        "index": context.stores.index,
        "checkpoints": context.stores.checkpoints,
        "patches": context.stores.patches,
        "vault": context.stores.vault,
        "runs": context.stores.drafts,
    }
    return found if context.stores.prefixes is None else {**found, "prefixes": context.stores.prefixes}


def held_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names that are held in each storage area."""
    return {name: area.held() for name, area in areas(context).items()}


def purge(context: Context, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:
    """Remove old versions of what was replaced or erased, and return those that a bucket keeps."""
    found = sorted(context.stores.blobs)
    return tuple(kept for area in found for kept in context.stores.blobs[area].purge(dry_run=dry_run))


def patch_files(store: CheckpointStore, stack: Iterable[Patch]) -> list[dict[str, bytes]]:
    """Return the files of patches in order, after checking them. Raises IntegrityError."""
    return [store.load(each.key, each.manifest_sha256) for each in stack]


def held_rows(context: Context, id_digests: Iterable[str]) -> list[RecordRow]:
    """Return the rows of those records, by keyed id, that are held."""
    found = context.stores.ledger.lookup(id_digests).values()
    return [each for each in found if isinstance(each, RecordRow)]


def slices_of(context: Context, rows: Iterable[RecordRow]) -> list[SliceFile]:
    """Return the files that hold some records now."""
    places = {(row.shard, row.slice) for row in rows}
    shards = sorted({shard for shard, _ in places})
    return [f for s in shards for f in context.stores.ledger.slices(s) if (f.shard, f.slice) in places]


def stored_in(
    context: Context, files: Iterable[SliceFile], rows: Iterable[RecordRow]
) -> list[StoredRecord]:
    """Return the records of rows, read from those of the files that are of their slices."""
    wanted = {row.id_digest: (row.shard, row.slice) for row in rows}
    places = set(wanted.values())
    return [
        stored
        for file in files
        if (file.shard, file.slice) in places
        for stored in context.stores.records.read(file)
        if stored.id_digest in wanted
    ]


def first_index(files: Sequence[IndexFile]) -> IndexFile | None:
    return files[0] if files else None


def embed_records(context: Context, records: Sequence[Record]) -> list[Vectors]:
    """Return what the index holds of each record: the vector of its text, then those of what is asked
    in it."""
    texts = [(record.text, *record.asked) for record in records]
    vectors = context.compute.embed([text for each in texts for text in each])
    ends = list(accumulate(map(len, texts)))
    return [vectors[end - len(each) : end] for end, each in zip(ends, texts, strict=True)]


def embed_shard(context: Context, shard: int, rows: Sequence[RecordRow]) -> dict[int, Vectors]:
    """Embed a shard's records anew from its slice files; return what the index holds, by vector id."""
    held = {
        each.id_digest: each.record
        for file in context.stores.ledger.slices(shard)
        for each in context.stores.records.read(file)
    }
    vectors = embed_records(context, [held[row.id_digest] for row in rows])
    return dict(zip((row.vector_id for row in rows), vectors, strict=True))


def write_slice(
    context: Context,
    shard: int,
    slice_: int,
    rows: Sequence[RecordRow],
    fresh: Iterable[StoredRecord] = (),
) -> SliceFile:
    """Write the slice that holds exactly `rows`, their records taken from disk and from `fresh`."""
    by_digest = {each.id_digest: each for each in fresh}
    for file in context.stores.ledger.slices(shard):
        if file.slice == slice_:
            by_digest.update({each.id_digest: each for each in context.stores.records.read(file)})
    wanted = sorted(row.id_digest for row in rows)
    if not by_digest.keys() >= set(wanted):
        raise IntegrityError(
            "the ledger holds records that its slice file does not",
            where=f"shard {shard}, slice {slice_}",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    records = [by_digest[digest] for digest in wanted]
    return context.stores.records.write(shard, slice_, slice_root(rows), records)


def view_shard(
    context: Context,
    shard: int,
    replaced: Iterable[SliceState] = (),
    emptied: Iterable[SlicePosition] = (),
    dropped: Iterable[str] = (),
) -> ShardView:
    slices: dict[int, SliceState] = {file.slice: file for file in context.stores.ledger.slices(shard)}
    slices.update({state.slice: state for state in replaced})
    gone = {slice_ for where, slice_ in emptied if where == shard}
    without = set(dropped)
    return ShardView(
        shard,
        tuple(state for slice_, state in sorted(slices.items()) if slice_ not in gone),
        tuple(each for each in context.stores.ledger.checkpoints(shard) if each.key not in without),
    )


def view_shards(context: Context, shards: Sequence[int]) -> list[ShardView]:
    """Return several shards as they are; of many, all that is in the ledger is read at once."""
    if len(shards) <= FEW_SHARDS:
        return [view_shard(context, shard) for shard in shards]
    slices: dict[int, list[SliceState]] = {shard: [] for shard in shards}
    held: dict[int, list[HeldCheckpoint]] = {shard: [] for shard in shards}
    for file in context.stores.ledger.slices():
        if file.shard in slices:
            slices[file.shard].append(file)
    for each in context.stores.ledger.checkpoints():
        if each.shard in held:
            held[each.shard].append(each)
    return [ShardView(shard, tuple(slices[shard]), tuple(held[shard])) for shard in shards]


def plan_of(context: Context, view: ShardView) -> ShardPlan:
    """Plan a shard under the model's present recipe and fingerprint."""
    return plans_of(context, [view])[0]


def plans_of(context: Context, views: Iterable[ShardView]) -> list[ShardPlan]:
    """Plan shards under the model's present recipe and fingerprint."""
    recipe = context.recipe
    return [plan_shard(view, recipe, context.compute.fingerprint) for view in views]


def open_shards(context: Context) -> list[int]:
    """Return the shards in which stages may be missing: those that are not at their target, and all
    where there are several orders."""
    return [
        h.shard
        for h in context.stores.ledger.heads()
        if context.settings.recipe.orders or not h.converged
    ]


def check_sources(context: Context, plans: Sequence[ShardPlan]) -> None:
    """Raises IntegrityError, before anything is written, when a file to build on is damaged; with
    several orders, or the checkpoint that is to head, since no stage of order 0 may start from it."""
    ledger = context.stores.ledger
    for plan in plans:
        seen = {slice_ for job in plan.all_missing for slice_, _ in job.slices}
        for file in ledger.slices(plan.shard):
            if file.slice in seen:
                context.stores.records.check(file)
        index = first_index(ledger.indexes(plan.shard))
        if index is not None and plan.path:
            context.stores.index.check(index)
        needed = {
            *(each.key for each in plan.parents),
            plan.head.key if context.settings.recipe.orders else None,
        }
        for each in ledger.checkpoints(plan.shard) if needed != {None} else ():
            if each.key in needed:
                context.stores.checkpoints.load(each.key, each.manifest_sha256)
