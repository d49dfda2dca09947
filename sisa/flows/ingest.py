"""Add records: `train` adds the first ones, `add` adds others, `rectify` replaces held ones.

They decide what remains, commit it and reconcile. New slice and index files are written under new names
before the commit that makes them current; the reconciliation erases the old ones. A crash anywhere
leaves the old or the new state and some unlisted files, and the next reconciliation has the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sisa.core.domain import Head, Record, RecordRow, SliceState, Tombstone
from sisa.core.errors import Problem, UnknownRecord
from sisa.core.events import Notice
from sisa.core.ports import Change, StoredRecord, Vectors, merged
from sisa.core.requests import RECTIFY, Request
from sisa.data.record_rules import normal_subject
from sisa.flows.answers.routing import HeldPrompts
from sisa.flows.context.commit import commit
from sisa.flows.context.consistency import check_rows
from sisa.flows.context.context import Context
from sisa.flows.context.plans import check_sources, plan_of, view_shard
from sisa.flows.context.served import model_digest
from sisa.flows.context.slices import embed_records, write_shard
from sisa.flows.reconcile import reconcile
from sisa.flows.record_checks import (
    HeldOrDeleted,
    RecordCheck,
    check_added,
    check_generations,
    check_trained,
    check_unchanged,
)
from sisa.flows.requests import Terms, forget_at_once, new_request
from sisa.planning.layout import slice_root
from sisa.planning.plan import ShardPlan


@dataclass(frozen=True)
class Taken:
    """Describe what `train` or `add` did with its records."""

    records: int
    added: int
    already_held: int
    deleted_not_taken: int
    new_not_taken: int
    record_epochs_trained: int
    slices_trained: int
    model_digest: str
    record_epochs_others: int = 0  # trained in orders other than order 0
    generation: int | None = None  # of the records appended now, for their column of that name
    prompts: HeldPrompts | None = None  # of all records held now


def train(context: Context, records: Sequence[Record], meta: Mapping[str, str] | None = None) -> Taken:
    """Train what is missing; only the first training takes records, and the model's `meta`."""
    check_generations(context.recipe.training, records)
    records, found = _normalised(context, records)
    if "config" in context.stores.ledger.meta() or context.stores.ledger.heads():
        check_trained(context, records, found)
        held = sum(isinstance(each, RecordRow) for each in found.values())
        new = len(records) - len(found)
        _update_identities(context, records, found)
        return _train_missing(context, held=held, deleted=len(found) - held, new=new)
    heads = [Head(shard, None, 0, None) for shard in range(context.settings.assigner.layout.num_shards)]
    _commit_added(context, records, heads, meta or {})
    if empty := len(heads) - len(context.stores.ledger.counts()):
        what = f"{empty} of {len(heads)} shards have no record: a subject's records share one"
        context.report(Notice(f"{what}; with so few, choose fewer shards (`sisa.shards`)"))
    return _train_missing(context, added=len(records))


def _train_missing(
    context: Context, *, added: int = 0, held: int = 0, deleted: int = 0, new: int = 0
) -> Taken:
    """Reconcile, and return what was trained, with counts of the records given."""
    done = reconcile(context)
    return Taken(
        records=sum(context.stores.ledger.counts().values()),
        added=added,
        already_held=held,
        deleted_not_taken=deleted,
        new_not_taken=new,
        record_epochs_trained=done.record_epochs_trained,
        slices_trained=done.slices_trained,
        model_digest=model_digest(context),
        record_epochs_others=done.record_epochs_others,
        prompts=done.prompts,
    )


def check_same_records(context: Context, records: Sequence[Record]) -> None:
    """Raise InvalidInput if a record of a source differs from the held record of the same id."""
    check_unchanged(context, *_normalised(context, records))


def _normalised(
    context: Context, records: Sequence[Record], new_generation: int | None = None
) -> tuple[list[Record], dict[str, RecordRow | Tombstone]]:
    """Return the records with normalised subjects and settled generations, and what is known of them.

    A record without a generation takes that of the held record of its id, else `new_generation`.
    """
    assigner = context.settings.assigner
    found = context.stores.ledger.lookup(assigner.id_digest(record.id) for record in records)
    settled = []
    for record in records:
        if record.subject_id is not None:
            record = replace(record, subject_id=normal_subject(record.subject_id))
        row = found.get(assigner.id_digest(record.id))
        if isinstance(row, RecordRow):
            generation = assigner.layout.generation(row.slice) or None
            record = replace(record, generation=record.generation or generation)
        elif new_generation is not None:
            record = replace(record, generation=record.generation or new_generation)
        settled.append(record)
    return settled, found


def add(
    context: Context,
    records: Sequence[Record],
    *,
    allow_deleted: bool = False,
    append: bool = False,
    checks: Iterable[RecordCheck] = (),
) -> Taken:
    """Add new records to the slices that they hash to and retrain from there, or `append` them.

    Appended records form slices of a new generation, so that no trained slice is trained again. The
    result equals training on all records from scratch. A record that is already held, unchanged, is
    counted and skipped. Raise InvalidInput with every problem.
    """
    check_generations(context.recipe.training, records, append=append)
    assigner, generation = context.settings.assigner, None
    if append:  # as the generation after the last one; the first has none
        held = (assigner.layout.generation(file.slice) for file in context.stores.ledger.slices())
        generation = max(held, default=-1) + 1 or None
    records, found = _normalised(context, records, generation)
    check_added(
        context, records, found, (context.compute.count_tokens, *checks), allow_deleted=allow_deleted
    )
    fresh = [
        record
        for record in records
        if not isinstance(found.get(assigner.id_digest(record.id)), RecordRow)
    ]
    _update_identities(context, records, found)
    if fresh:
        readmitted = [each.id_digest for each in found.values() if isinstance(each, Tombstone)]
        _commit_added(context, fresh, readmitted=readmitted)
    taken = _train_missing(context, added=len(fresh), held=len(records) - len(fresh))
    carried = {record.generation for record in fresh}
    return replace(taken, generation=generation if generation in carried else None)


def _update_identities(context: Context, records: Sequence[Record], found: HeldOrDeleted) -> None:
    """Replace the identities of held records by those in their source, if it has any."""
    assigner, ledger = context.settings.assigner, context.stores.ledger
    given = {assigner.id_digest(each.id): each for each in records if each.identifiers}
    held = [key for key in given if isinstance(found.get(key), RecordRow)]
    if not held:
        return
    before: dict[str, set[str]] = {key: set() for key in held}
    for each in ledger.identities(id_digests=held):
        before[each.id_digest].add(each.key)
    now = {key: assigner.identities(given[key]) for key in held}
    changed = [key for key in held if {each.key for each in now[key]} != before[key]]
    if changed:
        new = [each for key in changed for each in now[key]]
        commit(context, Change(unidentified=changed, identities=new))


@dataclass(frozen=True)
class Rectified:
    """Describe what `rectify` did: the request that deleted the old versions, None without any."""

    request: Request | None
    taken: Taken


def rectify(
    context: Context,
    records: Sequence[Record],
    checks: Sequence[RecordCheck] = (),
) -> Rectified:
    """Delete the held records of these ids exactly, add the new versions, and train once.

    Unchanged records get the identities in their source, and are skipped. A rectification that was cut
    short after the deletion is continued. Raise UnknownRecord for ids that are not held, InvalidInput
    with every problem of the new versions.
    """
    settled, found = _normalised(context, records)
    digests = [context.settings.assigner.id_digest(each.id) for each in settled]
    begun = {r.request_id for r in context.stores.ledger.requests() if r.reason == RECTIFY}
    problems = [
        Problem(f"record {number}", "no record with its id is held")
        for number, digest in enumerate(digests, start=1)
        if not isinstance(each := found.get(digest), RecordRow)
        and not (each is not None and each.request_id in begun)
    ]
    if problems:
        raise UnknownRecord(
            f"{len(problems)} of {len(settled)} records replace nothing; nothing was changed",
            next_step="add new records with `sisa add`",
            problems=problems,
        )
    # As if none were held: the new versions differ from the held ones.
    check_added(context, settled, {}, (context.compute.count_tokens, *checks), allow_deleted=True)
    rows = {key: each for key, each in found.items() if isinstance(each, RecordRow)}
    changed = {
        digest: record
        for record, digest in zip(settled, digests, strict=True)
        if digest not in rows
        or rows[digest].record_digest != context.settings.assigner.record_digest(record)
    }
    unchanged = [each for each, digest in zip(settled, digests, strict=True) if digest not in changed]
    _update_identities(context, unchanged, found)
    old = [row for key, row in rows.items() if key in changed]
    request = None
    if old:
        new = new_request(context, old, (), Terms(approver=RECTIFY, reason=RECTIFY))
        (request,) = forget_at_once(context, new, defer=True).requests
    taken = add(context, list(changed.values()), allow_deleted=True, checks=checks)
    taken = replace(taken, already_held=len(settled) - len(changed))
    if request is not None:  # as it is after training
        requests = {each.request_id: each for each in context.stores.ledger.requests()}
        request = requests[request.request_id]
    return Rectified(request, taken)


def _commit_added(
    context: Context,
    records: Sequence[Record],
    heads: Sequence[Head] = (),
    meta: Mapping[str, str] | None = None,
    *,
    readmitted: Sequence[str] = (),
) -> None:
    assigner, counts = context.settings.assigner, context.compute.count_tokens(records)
    rows = [assigner.row(record, tokens) for record, tokens in zip(records, counts, strict=True)]
    check_rows(context.stores.ledger)
    vectors = embed_records(context, records)
    arrived: dict[int, list[tuple[RecordRow, Record, Vectors]]] = {}
    for each in zip(rows, records, vectors, strict=True):
        arrived.setdefault(each[0].shard, []).append(each)
    new = {shard: [row for row, _, _ in fresh] for shard, fresh in sorted(arrived.items())}
    plans = [_plan_with(context, shard, its) for shard, its in new.items()]
    check_sources(context, plans)
    written = merged(
        write_shard(
            context,
            shard,
            [*context.stores.ledger.rows(shard), *its],
            {row.slice for row in its},
            {row.id_digest: StoredRecord(row.id_digest, record) for row, record, _ in arrived[shard]},
            {row.vector_id: vectors for row, _, vectors in arrived[shard]},
        )
        for shard, its in new.items()  # one shard's rows in memory at a time
    )
    moved = {head.shard: head for head in (*heads, *(plan.head for plan in plans))}
    added = Change(
        added=rows,
        heads=list(moved.values()),
        meta=meta or {},
        readmitted=readmitted,
        identities=[each for record in records for each in assigner.identities(record)],
    )
    commit(context, merged([added, written]))


def _plan_with(context: Context, shard: int, new: Sequence[RecordRow]) -> ShardPlan:
    states = []
    for slice_ in sorted({row.slice for row in new}):
        held = context.stores.ledger.rows(shard, slice_)
        rows = [*held, *(row for row in new if row.slice == slice_)]
        states.append(SliceState(shard, slice_, slice_root(rows), len(rows)))
    return plan_of(context, view_shard(context, shard, states))
