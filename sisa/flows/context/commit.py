"""Commit a transaction, and record in the witness what a restored backup must not bring back."""

from __future__ import annotations

from dataclasses import replace

from sisa.core import ports
from sisa.core.domain import Tombstone
from sisa.core.ledger_meta import READMITTED, RESTRICTIONS
from sisa.core.requests import RECTIFY
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricting, restrictions
from sisa.flows.context.slices import held_rows


def commit(context: Context, change: ports.Change) -> int:
    """Commit a transaction, and record its requests, deletions and restrictions in the witness.

    After a crash between the two, the next such commit or the next writer completes the record. A change
    that depends on what was read is read, decided and committed within one `ledger.exclusive()`, since
    people decide about requests while a deletion trains.
    """
    ledger, witness, chain = context.stores.ledger, context.stores.witness, context.settings.chain
    with ledger.exclusive():
        if change.removed and RESTRICTIONS not in change.meta:
            change = replace(change, meta={**change.meta, **_end_restrictions(ledger, change)})
        if change.readmitted:  # moves no event: after a crash the heads alone would not differ
            change = replace(change, meta={**change.meta, READMITTED: "unrecorded"})
        before = ledger.event_head()
        seq = ledger.commit(replace(change, events=[*chain.linked(before.link, change.events)]))
        witnessed = change.meta.keys() & {"model", RESTRICTIONS}
        if witnessed or change.events or change.tombstones or change.readmitted:
            current = witness.head() == before or is_behind(context)  # behind: it catches up now
            new = (change.tombstones, change.readmitted) if current else unrecorded(context)
            witness.append(ledger.event_head(), *new, restrictions(ledger))
        if change.readmitted:
            ledger.commit(ports.Change(meta={READMITTED: ""}))
    return seq


def _end_restrictions(ledger: ports.Ledger, change: ports.Change) -> dict[str, str]:
    """Return the meta that ends the restrictions of subjects who lose their last record by a change.

    A rectification adds the records again, so it ends none.
    """
    if any(each.reason == RECTIFY for each in change.requests):
        return {}
    known, gone = restrictions(ledger), {row.id_digest for row in change.removed}
    losing = {row.subject_digest for row in change.removed} - {r.subject_digest for r in change.added}
    left = {
        subject: since
        for subject, since in known.since.items()
        if subject not in losing
        or any(row.id_digest not in gone for row in ledger.by_subject(subject)[0])
    }
    return {} if left == known.since else restricting(known, left)


def is_behind(context: Context) -> bool:
    """Return whether the ledger does not know the witness's head, or has older restrictions.

    The witness is read first: a ledger that is written meanwhile can only be ahead of it.
    """
    head, number = context.stores.witness.head(), context.stores.witness.num_restrictions()
    ledger = context.stores.ledger
    unknown = head is not None and head.link != "" and not ledger.has_event(head.link)
    return unknown or (number > 0 and number > restrictions(ledger).number)


def unrecorded(context: Context) -> tuple[list[Tombstone], list[str]]:
    """Return the deletions that the witness lacks, and the ids that it takes for deleted by mistake."""
    ledger, known = context.stores.ledger, context.stores.witness.read().tombstones
    missing = [each for each in ledger.tombstones() if known.get(each.id_digest) != each]
    asked = {*known, *(each.id_digest for each in missing)}
    held = {row.id_digest for row in held_rows(context, asked)}  # added again after their deletion
    return [each for each in missing if each.id_digest not in held], sorted(held & known.keys())
