"""Answer where a record is, what a content search proposes, and what state the model is in.

The index proposes, the ledger decides: a candidate that the ledger does not hold is not a hit. This
module writes nothing. Ids appear only in answers to callers who asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from sisa.core.domain import (
    Export,
    HeldCheckpoint,
    Hit,
    Kind,
    PatchState,
    Record,
    RecordRow,
    Request,
    SetRole,
    Tombstone,
    VaultSet,
    WitnessHead,
)
from sisa.core.errors import IntegrityError, InvalidInput, Problem, UnknownRecord
from sisa.core.ledger_meta import TRAINED_ANEW
from sisa.core.ports import Vectors
from sisa.data.record_rules import normal_subject
from sisa.flows.context.context import Context
from sisa.flows.context.plans import view_shards
from sisa.flows.context.served import restrictions, served_heads
from sisa.flows.context.slices import slices_of, stored_in
from sisa.flows.context.stale_exports import export_standing
from sisa.flows.reconcile import BEGINNING, not_erased, under_way
from sisa.flows.restored_backup import WitnessStanding
from sisa.flows.routing import HeldPrompts, search_each
from sisa.planning.plan import slice_start, touched

NUM_NEAR = 50  # most near-duplicates that are proposed
SHOWN_CHARS = 100  # shown of a candidate's text


@dataclass(frozen=True)
class Touch:
    """Describe a checkpoint whose lineage includes a record."""

    key: str
    slice: int
    is_head: bool


@dataclass(frozen=True)
class PatchTouch:
    """Describe an active or wanted patch, made or to be made from a set with the record's text."""

    version: int
    key: str
    state: PatchState
    role: SetRole


@dataclass(frozen=True)
class Location:
    """Describe where a record is, or when and by which request it was deleted."""

    id: str
    state: str  # trained, pending (the head lacks its slice), deleted, or patch (never a record)
    shard: int  # -1 for `patch`
    slice: int
    checkpoints: tuple[Touch, ...]
    deleted_at: str | None = None
    request_id: str | None = None
    checkpoints_erased: int | None = None
    exports: tuple[str, ...] = ()  # paths of exported adapters that include it
    patches: tuple[PatchTouch, ...] = ()
    vault: tuple[VaultSet, ...] = ()  # sets that hold its text now
    kept_states: tuple[str, ...] = ()  # files of hidden states of its slice
    generation: int = 0  # in which it was appended
    restricted_since: str | None = None  # it is stored and not served
    not_erased: Mapping[str, int | None] = field(default_factory=dict)  # from `reconcile.not_erased`


@dataclass(frozen=True)
class Candidate:
    """Describe a candidate record."""

    id: str
    score: float
    shard: int
    slice: int
    match: str  # "subject" if the ledger named it, "content" if the index did
    subject: str | None = None
    text: str | None = None  # its beginning, if the caller asked for it


@dataclass(frozen=True)
class ExportStatus:
    """Describe an export; `standing` is that of a stale one, and None for a clean one."""

    path: str
    shard: int  # the first one; -1: made before the records moved to other shards
    key: str
    adapter_sha256: str
    made_at: str
    state: str
    request_id: str
    standing: str | None
    shards: tuple[int, ...]  # several in a merged export


@dataclass(frozen=True)
class ShardStatus:
    """Describe a shard. Its head is None if it holds no records or serves the base for now."""

    shard: int
    head: str | None
    depth: int
    num_slices: int
    records: int
    slice_records: tuple[int, ...]
    converged: bool
    adapter_path: str | None
    adapter_sha256: str | None
    target: str | None = None  # the head once training is done
    num_stages: int = 0  # slices that hold records: the full `depth`
    served: str | None = None  # the head, unless that saw a restricted record; None: nothing
    served_depth: int = 0


@dataclass(frozen=True)
class SliceStanding:
    """Describe a slice of a shard.

    clean         served
    retrained     served, and trained again after a deletion since the model was last trained as a whole
    rolled back   not in the head until it is trained again
    restricted    in the head, which is not served
    """

    slice: int
    records: int
    state: Literal["clean", "retrained", "rolled back", "restricted", "empty"]


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
    shards: tuple[ShardStatus, ...]
    requests: tuple[Request, ...]
    sizes_bytes: dict[str, int]
    witness: tuple[str, WitnessStanding] = ("", "absent")  # its location, and its standing
    event_head: WitnessHead = BEGINNING  # the last link of the event log, and how many events
    exports: tuple[ExportStatus, ...] = ()
    num_orders: int = 1
    serving_depth: float = 1.0  # mean share of their slices that shards serve
    record_epochs_full: int = 0  # of training order 0 from scratch
    record_epochs_others: int = 0  # of training the other orders beside it
    checkpoint_budget_bytes: int | None = None
    checkpoint_bytes: int = 0  # of the stages that the ledger holds
    records_without_subject: int = 0
    form: Kind = "text"  # in which shards get prompts
    prompts: HeldPrompts | None = None
    restricted_subjects: int = 0  # whose records are stored and not served
    restricted_records: int = 0


def lookup(context: Context, ids: Sequence[str]) -> list[tuple[str, RecordRow | Tombstone]]:
    """Return rows and tombstones of ids, in their order. Raise UnknownRecord with every unknown id."""
    found = known_rows(context, ids)
    return [(each, found[context.settings.assigner.id_digest(each)]) for each in ids]


def known_rows(
    context: Context, ids: Sequence[str], elsewhere: Collection[str] = ()
) -> dict[str, RecordRow | Tombstone]:
    """Return rows and tombstones by keyed id.

    Raise UnknownRecord with every id that has neither, unless its keyed id is in `elsewhere`.
    """
    digests = [context.settings.assigner.id_digest(each) for each in ids]
    found = context.stores.ledger.lookup(digests)
    unknown = [
        Problem(f"id {position + 1} of {len(ids)}", "this model has never held it")
        for position, digest in enumerate(digests)
        if digest not in found and digest not in elsewhere
    ]
    if unknown:
        raise UnknownRecord(
            f"{len(unknown)} of {len(ids)} ids are unknown; nothing was changed",
            next_step="look the records up by content with `sisa find`",
            problems=unknown,
        )
    return found


def of_subject(context: Context, subject_id: str) -> tuple[list[RecordRow], list[Tombstone]]:
    """Return all records of a subject. Raise UnknownRecord if there is none."""
    assigner, ledger = context.settings.assigner, context.stores.ledger
    for spelling in (normal_subject(subject_id), subject_id):  # an earlier version kept it as given
        digest, shard = assigner.subject_digest(spelling), assigner.shard_of_subject(spelling)
        held, deleted = ledger.by_subject(digest, shard)
        if held or deleted:
            return held, deleted
    num_held, num_deleted = ledger.num_without_subject()
    what, got = "this model has never held a record of that subject", ""
    if num_held or num_deleted:
        what = "no record is known by that subject, but some have no subject: they may be about it"
        got = f"{num_held} held and {num_deleted} deleted records without a subject"
    raise UnknownRecord(
        what, got=got, next_step="look the records up by content with `sisa find --text`"
    )


def of_digest(context: Context, digest: str) -> tuple[list[RecordRow], list[Tombstone]]:
    """Return all records of a subject, given its keyed digest. Raise UnknownRecord if there is none."""
    held, deleted = context.stores.ledger.by_subject(digest)
    if not held and not deleted:
        raise UnknownRecord("this model has never held a record of that subject")
    return held, deleted


def held_and_deleted(
    context: Context, ids: Sequence[str], subject: str | None
) -> tuple[list[RecordRow], list[Tombstone]]:
    """Return the held and the deleted records of these ids, or of a subject. Raise UnknownRecord."""
    if (subject is None) == (not ids):
        raise InvalidInput("give either record ids or a subject")
    if subject is not None:
        return of_subject(context, subject)
    found = [each for _, each in lookup(context, list(dict.fromkeys(ids)))]
    held = [each for each in found if isinstance(each, RecordRow)]
    return held, [each for each in found if isinstance(each, Tombstone)]


def where(context: Context, ids: Sequence[str]) -> list[Location]:
    """Return where each record is and what it influenced. Raise UnknownRecord."""
    ledger = context.stores.ledger
    digests = [context.settings.assigner.id_digest(each) for each in ids]
    in_sets = ledger.sets_with(digests)
    rows = known_rows(context, ids, in_sets)
    sets = {each.name: each for each in ledger.vault()} if in_sets else {}
    patches = ledger.patches() if in_sets else []
    held = [each for each in rows.values() if isinstance(each, RecordRow)]
    lineage = _Lineage(
        frozenset(head.key for head in ledger.heads()),
        {e.shard: e.held for e in view_shards(context, sorted({row.shard for row in held}))},
        ledger.exports() if held else (),
        sorted(context.stores.hidden_states.held()) if held else (),
        restrictions(ledger).since,
    )
    deleted_by = {each.request_id for each in rows.values() if isinstance(each, Tombstone)}
    begun = under_way(context) if deleted_by else ()
    waiting = deleted_by & {each.request_id for each in begun if each.state != "erased"}
    left = not_erased(context) if waiting else {}
    locations = []
    for record_id, digest in zip(ids, digests, strict=True):
        names = in_sets.get(digest, ())
        touches = tuple(
            PatchTouch(patch.version, patch.key, patch.state, sets[name].role)
            for patch in patches
            if patch.state in ("active", "wanted")
            for name in patch.job.sets
            if name in names
        )
        found = _location(context, record_id, rows.get(digest), lineage)
        locations.append(
            replace(
                found,
                patches=touches,
                vault=tuple(sets[name] for name in names if sets[name].held),
                not_erased=left if found.request_id in waiting else {},
            )
        )
    return locations


@dataclass(frozen=True)
class _Lineage:
    """Hold what some records may have touched, read once for all of them."""

    heads: frozenset[str | None]
    checkpoints: Mapping[int, Sequence[HeldCheckpoint]]  # by shard
    exports: Sequence[Export]
    states: Sequence[str]  # files of hidden states
    restricted: Mapping[str, str]  # subjects, since when


def _location(
    context: Context, record_id: str, held: RecordRow | Tombstone | None, lineage: _Lineage
) -> Location:
    if held is None:
        return Location(record_id, "patch", -1, -1, ())
    if isinstance(held, Tombstone):
        deleted = Location(record_id, "deleted", held.shard, held.slice, (), held.deleted_at)
        return replace(deleted, request_id=held.request_id, checkpoints_erased=held.checkpoints_erased)
    touches = tuple(
        Touch(each.key, each.slice, each.key in lineage.heads)
        for each in lineage.checkpoints[held.shard]
        if touched(each, held)
    )
    start, stored = slice_start(held.shard, held.slice), context.stores.hidden_states
    return Location(
        record_id,
        "trained" if any(touch.is_head for touch in touches) else "pending",
        held.shard,
        held.slice,
        touches,
        exports=tuple(dict.fromkeys(e.path for e in lineage.exports if touched(e, held))),
        kept_states=tuple(stored.location(name) for name in lineage.states if name.startswith(start)),
        generation=context.settings.assigner.layout.generation(held.slice),
        restricted_since=lineage.restricted.get(held.subject_digest or ""),
    )


def find_candidates(
    context: Context,
    *,
    text: str | None,
    subject: str | None,
    like: str | None,
    top_k: int,
    show_text: bool,
) -> list[Candidate]:
    """Return candidates: like a text, of a subject and like those, or like the record with an id."""
    if subject is not None:
        rows, _ = of_subject(context, subject)
        own = [
            _candidate(record, 1.0, row, "subject")
            for record, row in zip(records_of(context, rows), rows, strict=True)
        ]
        found = own + _similar(context, rows, top_k) if rows else []
    elif like is not None:
        ((_, row),) = lookup(context, [like])
        if isinstance(row, Tombstone):
            raise UnknownRecord(
                "that record is deleted: its vector is gone with it",
                next_step="`sisa where` shows when and by which request",
            )
        found = _similar(context, [row], top_k)
    else:
        vectors = context.compute.embed([str(text)])
        found = _candidates(context, _search(context, vectors, top_k), top_k)
    return found if show_text else _without_text(found)


def near(
    context: Context, rows: Sequence[RecordRow], threshold: float, known: Sequence[RecordRow] = ()
) -> list[Candidate]:
    """Return records at least `threshold` near one of `rows`, except `known` copies."""
    return _without_text(_similar(context, rows, NUM_NEAR, threshold, known))


def _without_text(found: Iterable[Candidate]) -> list[Candidate]:
    return [replace(each, text=None) for each in found]


def _similar(
    context: Context,
    rows: Sequence[RecordRow],
    top_k: int,
    threshold: float = -math.inf,
    known: Sequence[RecordRow] = (),
) -> list[Candidate]:
    """Return the records that are most like some rows, except these rows and `known` ones."""
    places = {(row.shard, row.vector_id) for row in (*rows, *known)}
    hits = _search(context, _vectors(context, rows), top_k + len(places))
    close = [h for h in hits if h.score >= threshold and (h.shard, h.vector_id) not in places]
    return _candidates(context, close, top_k)


def _search(context: Context, queries: Vectors, top_k: int) -> list[Hit]:
    """Return the best hits over all shards and queries, one for each record, best first."""
    found = [hit for hits in search_each(context, queries, top_k) for hit in hits]
    best: dict[tuple[int, int], Hit] = {}
    for hit in sorted(found, key=lambda hit: (-hit.score, hit.shard, hit.vector_id)):
        best.setdefault((hit.shard, hit.vector_id), hit)
    return list(best.values())


def ids_of(context: Context, rows: Sequence[RecordRow]) -> list[str]:
    """Return the plain ids of rows, sorted."""
    return sorted(record.id for record in records_of(context, rows))


def _vectors(context: Context, rows: Sequence[RecordRow]) -> Vectors:
    import numpy as np

    found = []
    for file in context.stores.ledger.indexes():
        wanted = [row.vector_id for row in rows if row.shard == file.shard]
        if wanted:
            found.append(context.stores.index.vectors(file, wanted))
    if sum(map(len, found)) < len(rows):
        raise _contradiction("vectors of records that it holds")
    return np.concatenate(found)


def _candidates(context: Context, hits: Iterable[Hit], top_k: int) -> list[Candidate]:
    """Return the records of the best hits; a hit that the ledger does not hold is none."""
    by_vector = context.stores.ledger.by_vector
    rows = ((hit, by_vector(hit.shard, [hit.vector_id]).get(hit.vector_id)) for hit in hits)
    chosen = list(islice(((hit, row) for hit, row in rows if row is not None), top_k))
    records = records_of(context, [row for _, row in chosen])
    return [
        _candidate(record, round(hit.score, 6), row, "content")
        for (hit, row), record in zip(chosen, records, strict=True)
    ]


def _candidate(record: Record, score: float, row: RecordRow, match: str) -> Candidate:
    text = " ".join(record.text.split())
    shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    return Candidate(record.id, score, row.shard, row.slice, match, record.subject_id, shown)


def records_of(context: Context, rows: Sequence[RecordRow]) -> list[Record]:
    """Return the records of rows, in their order, from their slice files. Raise IntegrityError."""
    held = stored_in(context, slices_of(context, rows), rows)
    records = {each.id_digest: each.record for each in held}
    if not records.keys() >= {row.id_digest for row in rows}:
        raise _contradiction("slices of records that it holds")
    return [records[row.id_digest] for row in rows]


def _contradiction(what: str) -> IntegrityError:
    return IntegrityError(
        f"the ledger lacks {what}",
        next_step="run `sisa verify`; restore the model directory from a backup",
    )


def exports(context: Context) -> list[ExportStatus]:
    """Return all exports that the ledger lists, with the standing of stale ones.

    A merged export, which has a row for each of its shards in the ledger, is returned once.
    """
    found: dict[tuple[str, ...], list[Export]] = {}
    for row in sorted(context.stores.ledger.exports(), key=lambda each: (each.path, each.shard)):
        name = (row.path, row.adapter_sha256, row.state, row.request_id)
        found.setdefault(name, []).append(row)
    return [
        ExportStatus(
            path=first.path,
            shard=first.shard,
            key=first.key,
            adapter_sha256=first.adapter_sha256,
            made_at=first.made_at,
            state=first.state,
            request_id=first.request_id,
            standing=export_standing(context, first) if first.stale else None,
            shards=tuple(dict.fromkeys([first.shard, *(each.shard for each in others)])),
        )
        for first, *others in found.values()
    ]


def shards(context: Context) -> list[ShardStatus]:
    """Return the state of every shard, in order."""
    ledger = context.stores.ledger
    counts: dict[int, dict[int, int]] = {}
    for file in ledger.slices():
        counts.setdefault(file.shard, {})[file.slice] = file.num_records
    held = {each.key: each for each in ledger.checkpoints()}
    appended = max((slice_ + 1 for found in counts.values() for slice_ in found), default=0)
    num_slices = max(context.settings.recipe.num_slices, appended)
    if any(head.key not in held for head in ledger.heads() if head.key is not None):
        raise _contradiction("a checkpoint that it serves")
    return [
        ShardStatus(
            shard=head.shard,
            head=head.key,
            depth=head.depth,
            num_slices=num_slices,
            records=sum(sizes.values()),
            slice_records=tuple(sizes.get(slice_, 0) for slice_ in range(num_slices)),
            converged=head.converged,
            adapter_path=context.stores.checkpoints.location(head.key) if head.key else None,
            adapter_sha256=held[head.key].adapter_sha256 if head.key else None,
            target=head.target,
            num_stages=sum(map(bool, sizes.values())),
            served=serves.key,
            served_depth=serves.depth,
        )
        for head, serves in zip(ledger.heads(), served_heads(ledger), strict=True)
        for sizes in [counts.get(head.shard, {})]
    ]


def slice_standings(context: Context) -> dict[int, list[SliceStanding]]:
    """Return the standing of every slice of every shard."""
    ledger = context.stores.ledger
    prefixes = {each.key: each.prefix for each in ledger.checkpoints()} | {None: ()}
    since = ledger.meta().get(TRAINED_ANEW, "")
    first: dict[int, int] = {}  # slice that a deletion retrained, by shard
    for request in ledger.requests():
        for shard, slice_, _ in request.shards if request.committed_at > since else ():
            first[shard] = min(slice_, first.get(shard, slice_))
    return {
        each.shard: [
            _standing(slice_, size, prefixes[each.head], prefixes[each.served], first.get(each.shard))
            for slice_, size in enumerate(each.slice_records)
        ]
        for each in shards(context)
    }


def _standing(
    slice_: int, size: int, trained: Sequence[int], served: Sequence[int], retrained: int | None
) -> SliceStanding:
    if not size:
        return SliceStanding(slice_, size, "empty")
    if slice_ not in served:
        return SliceStanding(slice_, size, "restricted" if slice_ in trained else "rolled back")
    again = retrained is not None and slice_ >= retrained
    return SliceStanding(slice_, size, "retrained" if again else "clean")
