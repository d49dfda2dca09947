"""Keep deletions deleted when a backup is restored: the ledger catches up with its witness.

A restored model directory brings back its own, older ledger. The witness is outside the directory and
holds the head of the event log and the tombstones. A ledger that does not know the witness's head is
behind it.

    behind    restrictions become those of the witness; what it records as deleted is removed again in
              one commit, under the requests that deleted it; tombstones that the ledger lacks are
              restored; bytes are erased
    ahead     (a crash fell between a commit and its record in the witness) the witness is updated
    absent    (another machine, or a new place for it) the witness is written

This precedes anything else that a command does, even one that only reads; the next writing command then
trains what is missing. A legal hold of the older ledger does not stop it, since the deletion was carried
out once. A readmitted id is not deleted. Requests that came in after the backup are lost with it. A
witness that is restored together with the model goes unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from sisa.core.domain import RecordRow, Restrictions, Testimony, Tombstone
from sisa.core.errors import IntegrityError
from sisa.core.events import Notice
from sisa.core.hooks import Removal
from sisa.core.ledger_meta import READMITTED
from sisa.core.ports import Change, Ledger
from sisa.core.requests import Request, due_date, event
from sisa.flows.context.commit import is_behind, unrecorded
from sisa.flows.context.consistency import check_consistent
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricting, restrictions
from sisa.flows.context.slices import held_rows
from sisa.flows.deletion import commit_removed
from sisa.flows.reconcile import adopt_and_erase

WitnessStanding = Literal["absent", "ahead of the ledger", "to be caught up", "current"]
REPLAYED = "replayed from the witness"


def _is_unrecorded(context: Context) -> bool:
    """Return whether the witness lacks something: a process was killed before it recorded that."""
    ledger, witness = context.stores.ledger, context.stores.witness
    if witness.head() != ledger.event_head() or ledger.meta().get(READMITTED):
        return True
    return restrictions(ledger).number > witness.num_restrictions()


def witness_standing(context: Context) -> WitnessStanding:
    """Return the standing of the witness: current, to be caught up, or absent."""
    head = context.stores.witness.head()
    if head is None:
        return "absent"
    if is_behind(context):
        return "ahead of the ledger"
    return "to be caught up" if _is_unrecorded(context) else "current"


def catch_up(context: Context) -> None:
    """Bring ledger and witness together; the caller holds the writer lock."""
    with context.stores.ledger.exclusive():
        if is_behind(context):
            apply_testimony(context)
        elif _is_unrecorded(context):
            _record_unrecorded(context)


def _record_unrecorded(context: Context) -> None:
    """Record in the witness what it lacks of a ledger that is not behind it."""
    ledger = context.stores.ledger
    context.stores.witness.append(ledger.event_head(), *unrecorded(context), restrictions(ledger))
    if ledger.meta().get(READMITTED):
        ledger.commit(Change(meta={READMITTED: ""}))


def _restrict_again(context: Context, restricted: Restrictions) -> None:
    """Bring newer restrictions of the witness into force, and end those that have ended since.

    Nothing is written to the witness: its head is still to be compared.
    """
    if restricted.number > restrictions(context.stores.ledger).number:
        number = len(restricted.since)
        what = f"a backup was restored: restrictions are as they were since ({number} in force)"
        context.report(Notice(what))
        before = replace(restricted, number=restricted.number - 1)
        context.stores.ledger.commit(Change(meta=restricting(before, restricted.since)))


def apply_testimony(context: Context) -> None:
    """Delete again and erase what the witness records as deleted; training is left to `reconcile`."""
    check_consistent(context)  # a damaged ledger must not be taken for an older one
    ledger, testimony = context.stores.ledger, context.stores.witness.read()
    _restrict_again(context, testimony.restrictions)
    if not is_behind(context):
        return
    again = unknown_deletions(ledger, testimony)
    held = held_rows(context, again)
    text = f"a backup was restored: {len(held)} records that were deleted since are deleted again"
    witnessed = testimony.head.num_events if testimony.head else 0
    if (lost := witnessed - ledger.event_head().num_events) > 0:
        text += f"; {lost} events are lost: submit requests that came in since once more"
    context.report(Notice(text))
    if again:
        named: dict[str, list[RecordRow]] = {each.request_id: [] for each in again.values()}
        for row in held:
            named[again[row.id_digest].request_id].append(row)
        requests, change = _requests_again(context, again.values())
        absent = [again[key] for key in again.keys() - {row.id_digest for row in held}]
        try:
            removal = Removal(requests, named)
            commit_removed(context, removal, replace(change, tombstones=absent), held_too=True)
        except IntegrityError as error:  # keys of slices that were rewritten since are destroyed
            raise IntegrityError(
                "a backup was restored, and what was deleted since can't be deleted again",
                where=error.where,
                got=error.what,
                next_step="run `sisa doctor --repair`; if that can't repair it, restore a backup made "
                "after the last deletion: of an encrypted model an older one can't be read where "
                "records were deleted",
            ) from error
    _record_unrecorded(context)
    if again:
        adopt_and_erase(context)


def unknown_deletions(ledger: Ledger, testimony: Testimony) -> dict[str, Tombstone]:
    """Return what a witness records as deleted and the ledger does not, by keyed id.

    A record that is held although its ledger knows of its deletion came in again afterwards.
    """
    known = {each.id_digest: each for each in ledger.tombstones()}
    return {key: each for key, each in testimony.tombstones.items() if known.get(key) != each}


def _requests_again(context: Context, again: Collection[Tombstone]) -> tuple[list[Request], Change]:
    """Return the requests that deleted these records, approved again, and what adds them to the ledger.

    A request that the ledger lacks is made again.
    """
    known = {each.request_id: each for each in context.stores.ledger.requests()}
    now = context.now()
    requests, events = [], []
    for request_id, count in Counter(each.request_id for each in again).items():
        new = Request(request_id, now, due_date(now, "gdpr"), count, reason=REPLAYED)
        request = known.get(request_id, new)
        approver = request.approver or REPLAYED  # no consent: it may have ended since
        approved = replace(request, state="approved", approver=approver, cause="", consent="")
        states = [approved] if request_id in known else [request, approved]
        requests.append(approved)
        events += [event(each, now, REPLAYED) for each in states]
    named = [(each.request_id, each.id_digest) for each in again]
    return requests, Change(named=named, events=events)
