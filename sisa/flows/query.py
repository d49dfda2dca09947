"""Answer where a record is, what a content search proposes, and what state the model is in.

The index proposes, the ledger decides: a candidate that the ledger does not hold is not a hit. This
module writes nothing. Ids appear only in answers to callers who asked for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sisa.core.domain import (
    Export,
    HeldCheckpoint,
    Hit,
    Patch,
    PatchState,
    Record,
    RecordRow,
    SetRole,
    Tombstone,
    VaultSet,
)
from sisa.core.errors import IntegrityError, UnknownRecord
from sisa.core.ports import By, StoredRecord, Vectors
from sisa.core.requests import is_under_way
from sisa.data.record_rules import normal_subject
from sisa.flows.reconcile import not_erased
from sisa.flows.stale_exports import export_standing
from sisa.flows.wiring.context import Context, known_rows, lookup, slices_of, stored_in, view_shards
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
    """Describe where a record is, or when and by which request it was deleted.

    `state` is "trained", "pending" (held, but the head does not include its slice yet), "deleted", or
    "patch" (its text was given for a patch alone; it was never a record of the model, and shard and
    slice are -1).
    """

    id: str
    state: str
    shard: int
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
    not_erased: Mapping[str, int | None] = field(default_factory=dict)  # from `reconcile.not_erased`


@dataclass(frozen=True)
class Candidate:
    """Describe a candidate record.

    `match` is "subject" if the ledger named it, "content" if the index did. `text` is the beginning of
    its text, if the caller asked for it.
    """

    id: str
    score: float
    shard: int
    slice: int
    match: str
    subject: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class ExportStatus:
    """Describe an export; `standing` is that of a stale one, and None for a clean one."""

    path: str
    shard: int  # -1: made before the records moved to other shards
    key: str
    adapter_sha256: str
    made_at: str
    state: str
    request_id: str
    standing: str | None


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


def _of_spelling(context: Context, subject: str) -> tuple[list[RecordRow], list[Tombstone]]:
    shard = context.settings.assigner.shard_of_subject(subject)
    return context.stores.ledger.by_subject(context.settings.assigner.subject_digest(subject), shard)


def of_subject(context: Context, subject_id: str) -> tuple[list[RecordRow], list[Tombstone]]:
    """Return all records of a subject. Raise UnknownRecord if there is none."""
    live, dead = _of_spelling(context, normal_subject(subject_id))
    if not live and not dead:
        live, dead = _of_spelling(context, subject_id)  # an earlier version kept it as given
    if not live and not dead:
        held, deleted = context.stores.ledger.num_without_subject()
        raise UnknownRecord(
            "no record is known by that subject, but some have no subject: they may be about it"
            if held or deleted
            else "this model has never held a record of that subject",
            got=f"{held} held and {deleted} deleted records without a subject" * bool(held or deleted),
            next_step="look the records up by content with `sisa find --text`",
        )
    return live, dead


def where(context: Context, ids: Sequence[str]) -> list[Location]:
    """Return where each record is and what it influenced.

    That is its shard and slice; the checkpoints, heads, exports and patches that it influenced; the sets
    of the vault that hold its text; and the files of hidden states of its slice. Raise UnknownRecord.
    """
    ledger = context.stores.ledger
    digests = [context.settings.assigner.id_digest(each) for each in ids]
    in_sets = ledger.sets_with(digests)
    rows = known_rows(context, ids, in_sets)
    sets = {each.name: each for each in ledger.vault()} if in_sets else {}
    patches = ledger.patches() if in_sets else []
    states = context.stores.prefixes.held()
    lineage = _lineage(context, [each for each in rows.values() if isinstance(each, RecordRow)])
    locations = {
        digest: _with_states(context, _location(context, each, rows.get(digest), lineage), states)
        for each, digest in zip(ids, digests, strict=True)
    }
    left = _not_erased(context, rows.values())
    return [
        replace(
            _with_patches(locations[digest], in_sets.get(digest, ()), sets, patches),
            not_erased=left.get(locations[digest].request_id or "", {}),
        )
        for digest in digests
    ]


def _not_erased(
    context: Context, rows: Iterable[RecordRow | Tombstone]
) -> dict[str, Mapping[str, int | None]]:
    """Return what is left to erase, by the request that waits for it."""
    asked = {each.request_id for each in rows if isinstance(each, Tombstone)}
    waiting = [
        each.request_id
        for each in (context.stores.ledger.requests() if asked else ())
        if each.request_id in asked and is_under_way(each) and each.state != "erased"
    ]
    return dict.fromkeys(waiting, not_erased(context)) if waiting else {}


def _with_patches(
    location: Location,
    names: Sequence[str],
    sets: Mapping[str, VaultSet],
    patches: Sequence[Patch],
) -> Location:
    touches = tuple(
        PatchTouch(patch.version, patch.key, patch.state, sets[name].role)
        for patch in patches
        if patch.state in ("active", "wanted")
        for name in patch.job.sets
        if name in names
    )
    return replace(location, patches=touches, vault=tuple(sets[n] for n in names if sets[n].held))


def _with_states(context: Context, location: Location, held: Collection[str]) -> Location:
    """Add the files of hidden states of the record's slice.

    A deleted record has none; they were erased with it.
    """
    if location.state not in ("trained", "pending"):
        return location
    start = slice_start(location.shard, location.slice)
    names = sorted(name for name in held if name.startswith(start))
    return replace(location, kept_states=tuple(map(context.stores.prefixes.location, names)))


@dataclass(frozen=True)
class _Lineage:
    """Hold what some records may have touched, read once for all of them."""

    heads: frozenset[str | None]
    checkpoints: Mapping[int, Sequence[HeldCheckpoint]]  # by shard
    exports: Sequence[Export]


def _lineage(context: Context, rows: Collection[RecordRow]) -> _Lineage:
    views = view_shards(context, sorted({row.shard for row in rows}))
    return _Lineage(
        frozenset(head.key for head in context.stores.ledger.heads()),
        {view.shard: view.held for view in views},
        context.stores.ledger.exports() if rows else (),
    )


def _location(
    context: Context, record_id: str, held: RecordRow | Tombstone | None, lineage: _Lineage
) -> Location:
    if held is None:
        return Location(record_id, "patch", -1, -1, ())
    if isinstance(held, Tombstone):
        return Location(
            record_id,
            "deleted",
            held.shard,
            held.slice,
            (),
            held.deleted_at,
            held.request_id,
            held.checkpoints_erased,
        )
    touches = tuple(
        Touch(each.key, each.slice, each.key in lineage.heads)
        for each in lineage.checkpoints[held.shard]
        if touched(each, held)
    )
    state = "trained" if any(touch.is_head for touch in touches) else "pending"
    exports = tuple(each.path for each in lineage.exports if touched(each, held))
    generation = context.settings.assigner.layout.generation(held.slice)
    return Location(
        record_id, state, held.shard, held.slice, touches, exports=exports, generation=generation
    )


def search_index(context: Context, queries: Vectors, top_k: int) -> list[Hit]:
    """Return the best hits over all shards and queries, one for each record, best first."""
    best: dict[tuple[int, int], Hit] = {}
    for hits in search_each(context, queries, top_k):
        for hit in hits:
            position = (hit.shard, hit.vector_id)
            if position not in best or hit.score > best[position].score:
                best[position] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.shard, hit.vector_id))


def search_each(context: Context, queries: Vectors, top_k: int, by: By = "text") -> list[list[Hit]]:
    """Return the best hits over all shards for each query, best first.

    A score is relative to the query's score with itself: equal texts score 1, whatever the length of
    their vectors.
    """
    found = context.stores.index.search(context.stores.ledger.indexes(), queries, top_k, by)
    own = (queries * queries).sum(axis=1).tolist()
    return [
        [replace(hit, score=hit.score / square) for hit in hits]
        for hits, square in zip(found, own, strict=True)
    ]


def find_text(
    context: Context, texts: Sequence[str], top_k: int, *, show_text: bool = False
) -> list[Candidate]:
    """Return candidate records by content."""
    return _found(
        context, search_index(context, context.compute.embed(texts), top_k), top_k, show_text=show_text
    )


def find_like(
    context: Context, record_id: str, top_k: int, *, show_text: bool = False
) -> list[Candidate]:
    """Return near-duplicates of a held record, without the record itself."""
    ((_, row),) = lookup(context, [record_id])
    if isinstance(row, Tombstone):
        raise UnknownRecord(
            "that record is deleted: its vector is gone with it",
            next_step="`sisa where` shows when and by which request",
        )
    hits = search_index(context, _vectors(context, [row]), top_k + 1)
    others = [hit for hit in hits if (hit.shard, hit.vector_id) != (row.shard, row.vector_id)]
    return _found(context, others, top_k, show_text=show_text)


def find_subject(
    context: Context, subject_id: str, top_k: int, *, show_text: bool = False
) -> list[Candidate]:
    """Return the subject's own records, then similar records of others (possible copies)."""
    live, _ = of_subject(context, subject_id)
    own = [
        _candidate(record, 1.0, row, "subject", show_text=show_text)
        for record, row in _records(context, live)
    ]
    if not live:
        return []
    places = {(row.shard, row.vector_id) for row in live}
    hits = search_index(context, _vectors(context, live), top_k + len(live))
    near = [hit for hit in hits if (hit.shard, hit.vector_id) not in places]
    return own + _found(context, near, top_k, show_text=show_text)


def near(
    context: Context, rows: Sequence[RecordRow], threshold: float, known: Sequence[RecordRow] = ()
) -> list[Candidate]:
    """Return records at least `threshold` near one of `rows`, except `known` copies."""
    places = {(row.shard, row.vector_id) for row in (*rows, *known)}
    hits = search_index(context, _vectors(context, rows), NUM_NEAR + len(places))
    close = [h for h in hits if h.score >= threshold and (h.shard, h.vector_id) not in places]
    return _found(context, close, NUM_NEAR)


def ids_of(context: Context, rows: Sequence[RecordRow]) -> list[str]:
    """Return the plain ids of rows, sorted."""
    return sorted(record.id for record, _ in _records(context, rows))


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


def _found(
    context: Context, hits: Iterable[Hit], top_k: int, *, show_text: bool = False
) -> list[Candidate]:
    chosen: list[tuple[Hit, RecordRow]] = []
    for hit in hits:
        row = context.stores.ledger.by_vector(hit.shard, [hit.vector_id]).get(hit.vector_id)
        if row is not None:
            chosen.append((hit, row))
        if len(chosen) == top_k:
            break
    records = _records(context, [row for _, row in chosen])
    return [
        _candidate(record, round(hit.score, 6), row, "content", show_text=show_text)
        for (hit, _), (record, row) in zip(chosen, records, strict=True)
    ]


def _candidate(
    record: Record, score: float, row: RecordRow, match: str, *, show_text: bool
) -> Candidate:
    text = " ".join(record.text.split())
    shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    subject = record.subject_id
    return Candidate(
        record.id, score, row.shard, row.slice, match, subject, shown if show_text else None
    )


def _records(context: Context, rows: Sequence[RecordRow]) -> list[tuple[Record, RecordRow]]:
    """Return the records of rows, read from their slice files."""
    records = {each.id_digest: each.record for each in stored(context, rows)}
    if not records.keys() >= {row.id_digest for row in rows}:
        raise _contradiction("slices of records that it holds")
    return [(records[row.id_digest], row) for row in rows]


def stored(context: Context, rows: Sequence[RecordRow]) -> list[StoredRecord]:
    """Return the records of rows, read from the slices that hold them."""
    return stored_in(context, slices_of(context, rows), rows)


def _contradiction(what: str) -> IntegrityError:
    return IntegrityError(
        f"the ledger lacks {what}",
        next_step="run `sisa verify`; restore the model directory from a backup",
    )


def exports(context: Context) -> list[ExportStatus]:
    """Return all exports that the ledger lists, with the standing of stale ones."""
    return [
        ExportStatus(
            path=each.path,
            shard=each.shard,
            key=each.key,
            adapter_sha256=each.adapter_sha256,
            made_at=each.made_at,
            state=each.state,
            request_id=each.request_id,
            standing=export_standing(context, each) if each.stale else None,
        )
        for each in context.stores.ledger.exports()
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
            records=sum(counts.get(head.shard, {}).values()),
            slice_records=tuple(counts.get(head.shard, {}).get(s, 0) for s in range(num_slices)),
            converged=head.converged,
            adapter_path=context.stores.checkpoints.location(head.key) if head.key else None,
            adapter_sha256=held[head.key].adapter_sha256 if head.key else None,
            target=head.target,
            num_stages=sum(1 for count in counts.get(head.shard, {}).values() if count),
        )
        for head in ledger.heads()
    ]
