"""Locate records: the rows of ids and subjects, where each record is, and what it touched.

This module writes nothing. Ids appear only in answers to callers who asked for them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sisa.core.domain import Export, HeldCheckpoint, RecordRow, Tombstone
from sisa.core.errors import InvalidInput, Problem, UnknownRecord
from sisa.core.patches import PatchState, SetRole, VaultSet
from sisa.data.record_rules import normal_subject
from sisa.flows.context.context import Context
from sisa.flows.context.plans import view_shards
from sisa.flows.context.served import restrictions
from sisa.flows.reconcile import not_erased, under_way
from sisa.planning.hidden_state_files import slice_start
from sisa.planning.plan import touched


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


def lookup(context: Context, ids: Sequence[str]) -> list[RecordRow | Tombstone]:
    """Return rows and tombstones of ids, in their order. Raise UnknownRecord with every unknown id."""
    found = known_rows(context, ids)
    return [found[context.settings.assigner.id_digest(each)] for each in ids]


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
    found = lookup(context, list(dict.fromkeys(ids)))
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
    made = _Made(
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
        found = _location(context, record_id, rows.get(digest), made)
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
class _Made:
    """Hold what was made from records, read once for all that are asked for."""

    heads: frozenset[str | None]
    checkpoints: Mapping[int, Sequence[HeldCheckpoint]]  # by shard
    exports: Sequence[Export]
    states: Sequence[str]  # files of hidden states
    restricted: Mapping[str, str]  # subjects, since when


def _location(
    context: Context, record_id: str, held: RecordRow | Tombstone | None, made: _Made
) -> Location:
    if held is None:
        return Location(record_id, "patch", -1, -1, ())
    if isinstance(held, Tombstone):
        deleted = Location(record_id, "deleted", held.shard, held.slice, (), held.deleted_at)
        return replace(deleted, request_id=held.request_id, checkpoints_erased=held.checkpoints_erased)
    touches = tuple(
        Touch(each.key, each.slice, each.key in made.heads)
        for each in made.checkpoints[held.shard]
        if touched(each, held)
    )
    start, stored = slice_start(held.shard, held.slice), context.stores.hidden_states
    return Location(
        record_id,
        "trained" if any(touch.is_head for touch in touches) else "pending",
        held.shard,
        held.slice,
        touches,
        exports=tuple(dict.fromkeys(e.path for e in made.exports if touched(e, held))),
        kept_states=tuple(stored.location(name) for name in made.states if name.startswith(start)),
        generation=context.settings.assigner.layout.generation(held.slice),
        restricted_since=made.restricted.get(held.subject_digest or ""),
    )
