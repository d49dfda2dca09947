"""The flows that take records in: train and add; each decides what remains and reconciles.

    train  = commit what remains, the first time -> reconcile
    add    = commit what remains                 -> reconcile
    forget = commit what remains                 -> reconcile      (`deletion.py`)

Rules: new slice and index files are written under new names before the commit that makes them
current; old ones are unknown to the ledger after it and are swept. So a crash anywhere leaves either
the old state and some unknown files, or the new state and some unknown files, and the next
reconciliation ends the same. Nothing is erased before the commit that allows it.

Not covered: reading sources and opening a model (`api.py`), questions (`query.py`), proof
(`verify.py`), a changed run file (`reconfigure.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sisa.assign import Assigner, index_root, slice_root
from sisa.bands import Bands, risk_problems
from sisa.domain import Head, IndexFile, Record, RecordRow, Risk, SliceFile, SliceState, Tombstone
from sisa.errors import ConfigConflict, InvalidInput, Problem
from sisa.plan import LAYERWISE, ShardPlan, plan_shard
from sisa.ports import Change, StoredRecord
from sisa.reconcile import Trained, reconcile, refuse_lost_rows
from sisa.world import World, check_sources, commit, model_digest, only, view_shard, write_slice


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
    record_epochs_others: int = 0  # trained in the orders beside order 0


def train(world: World, records: Sequence[Record], meta: Mapping[str, str] | None = None) -> Taken:
    """Train what is missing. Takes records at the first training only (with the model's `meta`);
    later ones need `add`.

    Raises InvalidInput when a record of the source differs from the held one of the same id.
    """
    refuse_generations(world, records)
    found = _lookup(world, records)
    records = _as_held(world, records, found)
    held = sum(isinstance(each, RecordRow) for each in found.values())
    if "config" in world.ledger.meta() or world.ledger.heads():
        _refuse_all([_differing(_changed(world, records, found))])
        done = reconcile(world)
        new = len(records) - len(found)
        return _taken(world, done, held=held, deleted=len(found) - held, new=new)
    rows = _rows(world, records)
    heads = [Head(shard, None, 0, None) for shard in range(world.assigner.layout.num_shards)]
    _commit_added(world, records, rows, heads, meta or {})
    return _taken(world, reconcile(world), added=len(rows))


def refuse_generations(
    world: World, records: Sequence[Record], *, append: bool = False, appended: bool = False
) -> None:
    """Raises ConfigConflict where slices would be appended to a chain that has a block of layers for
    those of the first generation alone."""
    if LAYERWISE in world.recipe.training and (append or appended or any(r.generation for r in records)):
        raise ConfigConflict(
            "layers are trained slice by slice: none are left for appended slices; nothing was changed",
            where="sisa.layerwise",
            expected="records without a generation",
            next_step="`sisa add` without --append, or train without sisa.layerwise",
        )


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
        record_epochs_others=done.record_epochs_others,
    )


def refuse_changed(world: World, records: Sequence[Record]) -> None:
    """Raises InvalidInput when a record of a source differs from the held one of the same id."""
    found = _lookup(world, records)
    _refuse_all([_differing(_changed(world, _as_held(world, records, found), found))])


def _as_held(
    world: World,
    records: Sequence[Record],
    found: Mapping[str, RecordRow | Tombstone],
    new: int | None = None,
) -> list[Record]:
    """Records that say no generation take that of the held one of their id, or else the `new` one."""
    settled = []
    for record in records:
        row = found.get(world.assigner.id_digest(record.id))
        if isinstance(row, RecordRow):
            generation = world.assigner.layout.generation(row.slice) or None
            record = replace(record, generation=record.generation or generation)
        elif new is not None:
            record = replace(record, generation=record.generation or new)
        settled.append(record)
    return settled


def _next_generation(world: World) -> int | None:
    """That of records to append: one more than the last that holds any; a model of none has no last."""
    layout = world.assigner.layout
    last = max((layout.generation(file.slice) for file in world.ledger.slices()), default=-1)
    return last + 1 or None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Records that are not taken for one kind of reason; none, where there are no problems."""

    problems: Sequence[Problem]
    what: str
    next_step: str


def _refuse_all(refusals: Sequence[Refusal]) -> None:
    """Raises InvalidInput where there are problems, all of them listed in the records' order."""
    met = [each for each in refusals if each.problems]
    if not met:
        return
    problems = sorted(
        (each for refusal in met for each in refusal.problems),
        key=lambda each: int(each.where.rpartition(" ")[2]),
    )
    count = len({each.where for each in problems})
    what = met[0].what if len(met) == 1 else "can't be taken, for several reasons"
    raise InvalidInput(
        f"{count} records {what}; nothing was changed",
        next_step="; ".join(each.next_step for each in met),
        problems=problems,
    )


def _differing(problems: Sequence[Problem]) -> Refusal:
    return Refusal(
        problems,
        "differ from the held ones of the same id",
        "`sisa forget` the held ones, then `sisa add` the new text under new ids",
    )


def _misplaced(problems: Sequence[Problem]) -> Refusal:
    return Refusal(
        problems,
        "can't be placed by their deletion risk",
        "name the class in sisa.bands.classes, and give all records of a subject one risk",
    )


def _deleted(problems: Sequence[Problem], done: str) -> Refusal:
    return Refusal(
        problems,
        f"can't be {done}",
        "leave them out of the file, give new content a new id, or say --allow-deleted",
    )


def _changed(
    world: World,
    records: Sequence[Record],
    found: Mapping[str, RecordRow | Tombstone],
    unplaced: Collection[int] = (),
) -> list[Problem]:
    problems = []
    for position, record in enumerate(records):
        if position in unplaced:
            continue
        row = world.assigner.row(record, 0)
        held = found.get(row.id_digest)
        if isinstance(held, RecordRow) and held.record_digest != row.record_digest:
            problems.append(Problem(f"record {position + 1}", "its content is not the held one"))
    return problems


def refuse_risks(bands: Bands | None, records: Sequence[Record]) -> None:
    """Raises InvalidInput where a risk is of no class, or one subject carries several."""
    _refuse_all([_misplaced(list(risk_problems(bands, records)))])


def _other_risks(world: World, fresh: Sequence[tuple[int, Record]]) -> list[Problem]:
    """New records whose risk is not that of the held ones of their subject."""
    new = {each.subject_id for _, each in fresh if each.subject_id is not None}
    named = [(world.assigner.subject_digest(s), world.assigner.shard_of_subject(s)) for s in new]
    places = {(row.shard, row.slice) for who in named for row in world.ledger.by_subject(*who)[0]}
    known: dict[str | None, Risk] = {
        each.record.subject_id: each.record.deletion_risk
        for file in (f for shard in {n for n, _ in places} for f in world.ledger.slices(shard))
        if (file.shard, file.slice) in places
        for each in world.records.read(file)
        if each.record.subject_id in new
    }
    return [
        Problem(f"record {position + 1}", "its deletion risk is not that of its subject's held records")
        for position, record in fresh
        if known.get(record.subject_id, record.deletion_risk) != record.deletion_risk
    ]


def add(
    world: World, records: Sequence[Record], *, allow_deleted: bool = False, append: bool = False
) -> Taken:
    """Take new records into the slices that they hash to and retrain from there; or `append` them as
    slices of a new generation, so that nothing that is trained is trained again.

    The result equals training on all records from scratch. A record that is held already, unchanged,
    is counted and skipped. Raises InvalidInput for changed ids, for a second deletion risk of a subject
    and, unless `allow_deleted`, for deleted ids and deleted texts, all of them listed.
    """
    refuse_generations(world, records, append=append)
    found = _lookup(world, records)
    records = _as_held(world, records, found, _next_generation(world) if append else None)
    fresh = [
        (position, record)
        for position, record in enumerate(records)
        if not isinstance(found.get(world.assigner.id_digest(record.id)), RecordRow)
    ]
    dead = [each for each in found.values() if isinstance(each, Tombstone)]
    _refuse_all(_refusals(world, records, found, fresh, None if allow_deleted else dead))
    fresh_records = [record for _, record in fresh]
    rows = _rows(world, fresh_records)
    if rows:
        readmitted = [each.id_digest for each in dead]
        _commit_added(world, fresh_records, rows, readmitted=readmitted)
    return _taken(world, reconcile(world), added=len(rows), held=len(records) - len(fresh))


def _refusals(
    world: World,
    records: Sequence[Record],
    found: Mapping[str, RecordRow | Tombstone],
    fresh: Sequence[tuple[int, Record]],
    dead: Sequence[Tombstone] | None,
) -> list[Refusal]:
    """All that speaks against taking records; `dead` are those of a deleted id, or None where they may
    come back. A record whose risk is of no class has no place, and is not looked at further."""
    bands = world.assigner.layout.bands
    unplaced = {n for n, record in enumerate(records) if any(risk_problems(bands, [record]))}
    placed = [(n, record) for n, record in fresh if n not in unplaced]
    risks = [*risk_problems(bands, records), *_other_risks(world, placed)]
    refusals = [_differing(_changed(world, records, found, unplaced)), _misplaced(risks)]
    if dead is not None:
        texts = {world.assigner.row(record, 0).text_digest for _, record in placed}
        _, deleted = world.ledger.by_text(texts, sure=True)
        refusals.append(_deleted(deleted_before(world.assigner, placed, [*deleted, *dead]), "added"))
    return refusals


def deleted_before(
    assigner: Assigner, records: Iterable[tuple[int, Record]], deleted: Sequence[Tombstone]
) -> list[Problem]:
    """Records (with their positions) whose id or normalised text was deleted, and by which request."""
    ids = {each.id_digest: each for each in deleted}
    texts = {each.text_digest: each for each in deleted}
    problems = []
    for position, record in records:
        row = assigner.row(record, 0)
        by_id = ids.get(row.id_digest)
        gone = by_id or texts.get(row.text_digest)
        if gone is not None:
            what = "was deleted" if by_id else "has the text of a record that was deleted"
            what += f" at {gone.deleted_at} by request {gone.request_id}"
            problems.append(Problem(f"record {position + 1}", what))
    return problems


def refuse_deleted(problems: Sequence[Problem], done: str) -> None:
    """Raises InvalidInput where there are problems, all of them listed."""
    _refuse_all([_deleted(problems, done)])


def _rows(world: World, records: Sequence[Record]) -> list[RecordRow]:
    counts = world.count_tokens(records)
    return [world.assigner.row(record, tokens) for record, tokens in zip(records, counts, strict=True)]


def _commit_added(
    world: World,
    records: Sequence[Record],
    rows: Sequence[RecordRow],
    heads: Sequence[Head] = (),
    meta: Mapping[str, str] | None = None,
    *,
    readmitted: Sequence[str] = (),
) -> None:
    refuse_lost_rows(world.ledger)
    vectors = world.embed([record.text for record in records])
    arrived: dict[int, list[_Arrived]] = {}
    for record, row, vector in zip(records, rows, vectors, strict=True):
        arrived.setdefault(row.shard, []).append(_Arrived(row, record, vector))
    plans = [_plan_with(world, shard, arrived[shard]) for shard in sorted(arrived)]
    check_sources(world, plans)
    slices: list[SliceFile] = []
    indexes = []
    for shard, fresh in sorted(arrived.items()):  # never the rows of more than one shard in memory
        slices += _write_slices(world, shard, fresh)
        indexes.append(_write_index(world, shard, fresh))
    planned = {plan.shard: plan.head for plan in plans}
    moved = [planned.pop(head.shard, head) for head in heads] + list(planned.values())
    commit(
        world,
        Change(
            added=rows,
            slices=slices,
            indexes=indexes,
            heads=moved,
            meta=meta or {},
            readmitted=readmitted,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A new record with its place and its vector."""

    row: RecordRow
    record: Record
    vector: object


def _merged(world: World, shard: int, fresh: Iterable[_Arrived]) -> dict[int, list[RecordRow]]:
    """The rows of the slices that new records of a shard come into, those held already among them."""
    merged: dict[int, list[RecordRow]] = {}
    for each in fresh:
        merged.setdefault(each.row.slice, []).append(each.row)
    return {slice_: world.ledger.rows(shard, slice_) + merged[slice_] for slice_ in sorted(merged)}


def _plan_with(world: World, shard: int, fresh: Sequence[_Arrived]) -> ShardPlan:
    states = [
        SliceState(shard, slice_, slice_root(rows), len(rows))
        for slice_, rows in _merged(world, shard, fresh).items()
    ]
    return plan_shard(view_shard(world, shard, states), world.recipe, world.fingerprint)


def _write_slices(world: World, shard: int, fresh: Sequence[_Arrived]) -> list[SliceFile]:
    stored: dict[int, list[StoredRecord]] = {}
    for each in fresh:
        stored.setdefault(each.row.slice, []).append(StoredRecord(each.row.id_digest, each.record))
    return [
        write_slice(world, shard, slice_, rows, stored[slice_])
        for slice_, rows in _merged(world, shard, fresh).items()
    ]


def _write_index(world: World, shard: int, fresh: Sequence[_Arrived]) -> IndexFile:
    vectors = {each.row.vector_id: each.vector for each in fresh}
    merged = world.ledger.rows(shard) + [each.row for each in fresh]
    wanted = {row.vector_id: vectors.get(row.vector_id) for row in merged}
    if len(wanted) < len(merged):
        raise InvalidInput(
            "two record ids share a vector id (chance below 1 in 10^9)",
            where=f"shard {shard}",
            next_step="give one of the new records another id",
        )
    base = only(world.ledger.indexes(shard))
    return world.index.build(shard, index_root(merged), base, wanted)
