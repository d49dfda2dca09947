"""Restrict the processing of a subject's records, and release it (GDPR Art. 18).

While a subject is restricted, their records are stored and not served: each shard that holds one serves
the deepest held checkpoint that saw none of them, or nothing, and prompts are routed as if they were not
in the index (`context/served.py`, `answers/routing.py`). Records that are added later for the subject
are covered, too. Nothing is erased or trained, and heads stay as they are in the ledger, so a release
gives back the same bytes. The deletion of a subject's last record ends their restriction; a
rectification does not.

The ledger's meta holds the keyed digest of each restricted subject, and since when; the witness records
the same, so that a restored backup does not serve what was restricted since.
"""

from __future__ import annotations

from dataclasses import dataclass

from sisa.core.errors import ConfigConflict, UnknownRecord
from sisa.core.ports import Change
from sisa.data.record_rules import normal_subject
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricting, restrictions, served_heads
from sisa.flows.locations import of_subject


@dataclass(frozen=True)
class Restriction:
    """Describe a subject's restriction, or its end; `since` is None if none is in force.

    `served` is what the shards of the subject's records serve now: (shard, slices, of how many).
    """

    since: str | None
    changed: bool  # by this call
    num_records: int
    served: tuple[tuple[int, int, int], ...]


def restrict(context: Context, subject_id: str) -> Restriction:
    """Restrict a subject's records; a restriction that is in force stays as it is.

    The caller keeps other commits out. Raise UnknownRecord if no record of the subject is held.
    """
    rows, _ = of_subject(context, subject_id)
    if not rows:
        raise UnknownRecord(
            "every record of that subject is deleted: there is nothing to restrict",
            next_step="`sisa where` shows when and by which request",
        )
    subject, known = str(rows[0].subject_digest), restrictions(context.stores.ledger)
    if subject not in known.since:
        change = Change(meta=restricting(known, {**known.since, subject: context.now()}))
        commit(context, change)
    return _restriction(context, subject, changed=subject not in known.since)


def lift(context: Context, subject_id: str) -> Restriction:
    """End a subject's restriction: the same is served as before. Raise ConfigConflict without one."""
    known, digest = restrictions(context.stores.ledger), context.settings.assigner.subject_digest
    names = {digest(each) for each in (normal_subject(subject_id), subject_id)} & known.since.keys()
    if not names:
        of_subject(context, subject_id)  # raises UnknownRecord for a subject that is not known
        raise ConfigConflict(
            "this subject is not restricted; nothing was changed",
            next_step="`sisa restrict` restricts a subject",
        )
    left = {each: since for each, since in known.since.items() if each not in names}
    commit(context, Change(meta=restricting(known, left)))
    return _restriction(context, names.pop(), changed=True)


def _restriction(context: Context, subject: str, *, changed: bool) -> Restriction:
    ledger = context.stores.ledger
    rows = ledger.by_subject(subject)[0]
    shards = {row.shard for row in rows}
    stages = {shard: len(ledger.slices(shard)) for shard in shards}
    return Restriction(
        since=restrictions(ledger).since.get(subject),
        changed=changed,
        num_records=len(rows),
        served=tuple(
            (e.shard, e.depth, stages[e.shard]) for e in served_heads(ledger) if e.shard in shards
        ),
    )
