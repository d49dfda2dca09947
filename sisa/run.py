"""The flows: train, add and forget; each decides what remains and ends in the one reconciliation.

    forget = commit what remains (heads roll back in the same transaction) -> reconcile
    add    = commit what remains                                           -> reconcile
    train  = commit what remains, the first time                           -> reconcile

Rules: new slice and index files are written under new names before the commit that makes them
current; old ones are unknown to the ledger after it and are swept. So a crash anywhere leaves either
the old state and some unknown files, or the new state and some unknown files, and the next
reconciliation ends the same. Nothing is erased before the commit that allows it.

Not covered: reading sources and opening a model (`api.py`), questions (`query.py`), proof
(`verify.py`), a changed run file (`reconfigure.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sisa.assign import index_root, slice_root
from sisa.cost import full_record_epochs, plan_record_epochs
from sisa.domain import Head, Record, RecordRow, Request, SliceState, Tombstone
from sisa.errors import InvalidInput, Problem
from sisa.plan import ShardPlan, ShardView, plan_shard, tainted
from sisa.ports import Change, StoredRecord
from sisa.reconcile import Trained, reconcile
from sisa.world import Place, World, model_digest, only, view_shard, write_slice


@dataclass(frozen=True)
class Taken:
    """What `train` or `add` made of its records."""

    records: int
    added: int
    already_held: int
    deleted_not_taken: int
    new_not_taken: int
    record_epochs_trained: int
    slices_trained: int
    model_digest: str


@dataclass(frozen=True)
class Forgetting:
    """A deletion before it is carried out: pure numbers and keys."""

    removed: tuple[RecordRow, ...]
    already_deleted: tuple[Tombstone, ...]
    plans: tuple[ShardPlan, ...]
    remaining: tuple[SliceState, ...]  # of the slices that lose records
    emptied: tuple[Place, ...]
    tainted: tuple[str, ...]
    record_epochs_retrained: int
    record_epochs_full: int

    def first_slice(self, shard: int) -> int:
        return min(row.slice for row in self.removed if row.shard == shard)


def train(world: World, records: Sequence[Record], meta: Mapping[str, str] | None = None) -> Taken:
    """Train what is missing. Takes records at the first training only (with the model's `meta`);
    later ones need `add`.

    Raises InvalidInput when a record of the source differs from the held one of the same id.
    """
    found = _lookup(world, records)
    held = sum(isinstance(each, RecordRow) for each in found.values())
    if world.ledger.heads():
        _refuse(_changed(world, records, found))
        done = reconcile(world)
        new = len(records) - len(found)
        return _taken(world, done, held=held, deleted=len(found) - held, new=new)
    rows = _rows(world, records)
    heads = [Head(shard, None, 0, None) for shard in range(world.assigner.layout.num_shards)]
    _commit_added(world, records, rows, heads, meta or {})
    return _taken(world, reconcile(world), added=len(rows))


def _lookup(world: World, records: Sequence[Record]) -> dict[str, RecordRow | Tombstone]:
    return world.ledger.lookup(world.assigner.id_digest(record.id) for record in records)


def _taken(
    world: World, done: Trained, *, added: int = 0, held: int = 0, deleted: int = 0, new: int = 0
) -> Taken:
    return Taken(
        records=sum(world.ledger.counts().values()),
        added=added,
        already_held=held,
        deleted_not_taken=deleted,
        new_not_taken=new,
        record_epochs_trained=done.record_epochs_trained,
        slices_trained=done.slices_trained,
        model_digest=model_digest(world.ledger),
    )


def refuse_changed(world: World, records: Sequence[Record]) -> None:
    """Raises InvalidInput when a record of a source differs from the held one of the same id."""
    _refuse(_changed(world, records, _lookup(world, records)))


def _refuse(changed: Sequence[Problem]) -> None:
    if changed:
        raise InvalidInput(
            f"{len(changed)} records differ from the held ones of the same id; nothing was changed",
            next_step="`sisa forget` the held ones, then `sisa add` the new text under new ids",
            problems=changed,
        )


def _changed(
    world: World, records: Sequence[Record], found: Mapping[str, RecordRow | Tombstone]
) -> list[Problem]:
    problems = []
    for position, record in enumerate(records):
        row = world.assigner.row(record, 0)
        held = found.get(row.id_digest)
        if isinstance(held, RecordRow) and held.record_digest != row.record_digest:
            problems.append(Problem(f"record {position + 1}", "its content is not the held one"))
    return problems


def add(world: World, records: Sequence[Record]) -> Taken:
    """Take new records into the slices that they hash to and retrain from there.

    The result equals training on all records from scratch. A record that is held already, unchanged,
    is counted and skipped. Raises InvalidInput for changed or deleted ids, all of them listed.
    """
    found = _lookup(world, records)
    problems = _changed(world, records, found)
    fresh = []
    for position, record in enumerate(records):
        held = found.get(world.assigner.id_digest(record.id))
        if held is None:
            fresh.append(record)
        elif isinstance(held, Tombstone):
            what = f"was deleted at {held.deleted_at} by request {held.request_id}"
            problems.append(Problem(f"record {position + 1}", what))
    if problems:
        raise InvalidInput(
            f"{len(problems)} records can't be added; nothing was changed",
            next_step="leave them out of the file, or give new content a new id",
            problems=problems,
        )
    rows = _rows(world, fresh)
    if rows:
        _commit_added(world, fresh, rows)
    return _taken(world, reconcile(world), added=len(rows), held=len(found))


def _rows(world: World, records: Sequence[Record]) -> list[RecordRow]:
    counts = world.count_tokens(records)
    return [world.assigner.row(record, tokens) for record, tokens in zip(records, counts, strict=True)]


def _commit_added(
    world: World,
    records: Sequence[Record],
    rows: Sequence[RecordRow],
    heads: Sequence[Head] = (),
    meta: Mapping[str, str] | None = None,
) -> None:
    vectors = world.embed([record.text for record in records])
    stored: dict[Place, list[StoredRecord]] = {}
    embedded: dict[int, dict[int, object]] = {}
    for record, row, vector in zip(records, rows, vectors, strict=True):
        stored.setdefault((row.shard, row.slice), []).append(StoredRecord(row.id_digest, record))
        embedded.setdefault(row.shard, {})[row.vector_id] = vector
    merged_rows = {
        place: world.ledger.rows(*place) + [row for row in rows if (row.shard, row.slice) == place]
        for place in sorted(stored)
    }
    states = [
        SliceState(*place, slice_root(merged), len(merged)) for place, merged in merged_rows.items()
    ]
    plans = [
        plan_shard(
            view_shard(world, shard, [each for each in states if each.shard == shard]),
            world.recipe,
            world.fingerprint,
        )
        for shard in sorted(embedded)
    ]
    check_sources(world, plans)
    slices = [write_slice(world, *place, merged, stored[place]) for place, merged in merged_rows.items()]
    indexes = []
    for shard, fresh_vectors in sorted(embedded.items()):
        held = world.ledger.rows(shard)
        merged = held + [row for row in rows if row.shard == shard]
        wanted = {row.vector_id: fresh_vectors.get(row.vector_id) for row in merged}
        if len(wanted) < len(merged):
            raise InvalidInput(
                "two record ids share a vector id (chance below 1 in 10^9)",
                where=f"shard {shard}",
                next_step="give one of the new records another id",
            )
        base = only(world.ledger.indexes(shard))
        indexes.append(world.index.build(shard, index_root(merged), base, wanted))
    planned = {plan.shard: plan.head for plan in plans}
    moved = [planned.pop(head.shard, head) for head in heads] + list(planned.values())
    world.ledger.commit(Change(added=rows, slices=slices, indexes=indexes, heads=moved, meta=meta or {}))


def check_sources(world: World, plans: Sequence[ShardPlan]) -> None:
    """Raises IntegrityError, before anything is written, when a file to build on is damaged."""
    for plan in plans:
        seen = {slice_ for job in plan.train for slice_, _ in job.slices}
        for file in world.ledger.slices(plan.shard):
            if file.slice in seen:
                world.records.read(file)
        index = only(world.ledger.indexes(plan.shard))
        if index is not None and plan.path:
            world.index.vectors(index, [row.vector_id for row in world.ledger.rows(plan.shard)])
        if plan.parent is not None:
            world.checkpoints.load(plan.parent.key, plan.parent.manifest_sha256)


def plan_forget(
    world: World, rows: Sequence[RecordRow], already: Sequence[Tombstone] = ()
) -> Forgetting:
    """What deleting these rows would do. Reads only the shards concerned, changes nothing."""
    gone = {row.id_digest for row in rows}
    remaining: list[SliceState] = []
    emptied: list[Place] = []
    for shard, slice_ in sorted({(row.shard, row.slice) for row in rows}):
        left = [row for row in world.ledger.rows(shard, slice_) if row.id_digest not in gone]
        if left:
            remaining.append(SliceState(shard, slice_, slice_root(left), len(left)))
        else:
            emptied.append((shard, slice_))
    plans: list[ShardPlan] = []
    dropped: list[str] = []
    for shard in sorted({row.shard for row in rows}):
        lost = tainted(world.ledger.checkpoints(shard), rows)
        dropped.extend(lost)
        here = [state for state in remaining if state.shard == shard]
        view = view_shard(world, shard, here, emptied, lost)
        plans.append(plan_shard(view, world.recipe, world.fingerprint))
    return Forgetting(
        removed=tuple(rows),
        already_deleted=tuple(already),
        plans=tuple(plans),
        remaining=tuple(remaining),
        emptied=tuple(emptied),
        tainted=tuple(dropped),
        record_epochs_retrained=plan_record_epochs(plans),
        record_epochs_full=full_record_epochs(_all_views(world, remaining, emptied), world.recipe),
    )


def _all_views(
    world: World, replaced: Sequence[SliceState], emptied: Sequence[Place]
) -> list[ShardView]:
    slices: dict[Place, SliceState] = {(f.shard, f.slice): f for f in world.ledger.slices()}
    slices.update({(state.shard, state.slice): state for state in replaced})
    by_shard: dict[int, list[SliceState]] = {}
    for place, state in sorted(slices.items()):
        if place not in set(emptied):
            by_shard.setdefault(state.shard, []).append(state)
    return [ShardView(shard, tuple(states), ()) for shard, states in by_shard.items()]


def forget(world: World, planned: Forgetting, request_id: str) -> Request:
    """Delete exactly: the served model is clean at the commit, the bytes are gone and the affected
    suffixes are retrained when this returns."""
    before = model_digest(world.ledger)
    now = world.now()
    request = Request(
        request_id=request_id,
        created_at=now,
        num_records=len(planned.removed),
        shards=tuple(
            (plan.shard, planned.first_slice(plan.shard), len(plan.train)) for plan in planned.plans
        ),
        record_epochs_retrained=planned.record_epochs_retrained,
        record_epochs_full=planned.record_epochs_full,
        model_digest_before=before,
    )
    _commit_removed(world, planned, request)
    reconcile(world)
    return next(each for each in world.ledger.requests() if each.request_id == request_id)


def _commit_removed(world: World, planned: Forgetting, request: Request) -> None:
    check_sources(world, planned.plans)
    gone = {row.id_digest for row in planned.removed}
    slices = []
    for state in planned.remaining:
        rows = [r for r in world.ledger.rows(state.shard, state.slice) if r.id_digest not in gone]
        slices.append(write_slice(world, state.shard, state.slice, rows))
    indexes, unindexed = [], []
    for plan in planned.plans:
        rows = [row for row in world.ledger.rows(plan.shard) if row.id_digest not in gone]
        base = only(world.ledger.indexes(plan.shard))
        if rows:
            kept = {row.vector_id: None for row in rows}
            indexes.append(world.index.build(plan.shard, index_root(rows), base, kept))
        else:
            unindexed.append(plan.shard)
    held = world.ledger.checkpoints()
    tombstones = [
        Tombstone(
            row.id_digest,
            row.subject_digest,
            row.shard,
            row.slice,
            request.request_id,
            request.created_at,
            len(tainted(held, [row])),
        )
        for row in planned.removed
    ]
    world.ledger.commit(
        Change(
            removed=planned.removed,
            tombstones=tombstones,
            slices=slices,
            emptied=planned.emptied,
            indexes=indexes,
            unindexed=unindexed,
            heads=[plan.head for plan in planned.plans],
            dropped=planned.tainted,
            request=request,
        )
    )
