"""Keep deletions deleted when a backup is restored: the ledger catches up with its witness.

A restored model directory brings back its own, older ledger. The witness is outside the directory and
holds the head of the event log and the tombstones. A ledger that does not know the witness's head is
behind it.

    behind    what the witness records as deleted is removed again in one commit, under the requests that
              deleted it; tombstones that the ledger lacks are restored; bytes are erased
    ahead     (a crash fell between a commit and its record in the witness) the witness is updated
    absent    (another machine, or a new place for it) the witness is written

This precedes anything else that a command does, even one that only reads; the next writing command then
trains what is missing. A legal hold of the older ledger does not stop it, since the deletion was carried
out once. A readmitted id is not deleted. Requests that were submitted after the backup and not carried
out are lost with it; a notice says how many events are lost. A witness that is restored together with
the model goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from sisa.core.domain import RecordRow, Request, Testimony, Tombstone
from sisa.core.errors import IntegrityError
from sisa.core.events import Notice
from sisa.core.ports import Change, Removal
from sisa.core.requests import due_date, event
from sisa.flows.deletion import Arrival, commit_removed
from sisa.flows.reconcile import check_consistent, erase_unknown
from sisa.flows.wiring.context import Context

WitnessStanding = Literal["absent", "ahead of the ledger", "to be caught up", "current"]
REPLAYED = "replayed from the witness"


def is_behind(context: Context) -> bool:
    """Return whether the ledger does not know the witness's head.

    The witness is read first: a ledger that is written meanwhile can only be ahead of it.
    """
    head = context.stores.witness.head()
    return head is not None and head.link != "" and not context.stores.ledger.has_event(head.link)


def witness_standing(context: Context) -> WitnessStanding:
    """Return the standing of the witness: current, to be caught up, or absent."""
    head = context.stores.witness.head()
    if head is None:
        return "absent"
    if is_behind(context):
        return "ahead of the ledger"
    return "current" if head == context.stores.ledger.event_head() else "to be caught up"


def catch_up(context: Context) -> None:
    """Bring ledger and witness together; the caller holds the writer lock.

    Raise the errors of effects.
    """
    head = context.stores.witness.head()
    if is_behind(context):
        apply_testimony(context)
    elif head != context.stores.ledger.event_head():
        testimony = context.stores.witness.read().tombstones
        missing = [each for each in _standing(context) if testimony.get(each.id_digest) != each]
        context.stores.witness.append(context.stores.ledger.event_head(), missing, ())


def _standing(context: Context) -> list[Tombstone]:
    """Return the tombstones of ids that were not readmitted."""
    dead = {each.id_digest: each for each in context.stores.ledger.tombstones()}
    live = context.stores.ledger.lookup(dead)
    return [each for key, each in dead.items() if not isinstance(live[key], RecordRow)]


def apply_testimony(context: Context) -> None:
    """Delete again and erase what the witness records as deleted; training is left to `reconcile`."""
    check_consistent(context)  # a damaged ledger must not be taken for an older one
    testimony = context.stores.witness.read()
    found = context.stores.ledger.lookup(testimony.tombstones)
    again = [
        each for key, each in testimony.tombstones.items() if not isinstance(found.get(key), Tombstone)
    ]
    live = [each for each in found.values() if isinstance(each, RecordRow)]
    _announce(context, testimony, len(live))
    if again:
        named: dict[str, list[RecordRow]] = {each.request_id: [] for each in again}
        for row in live:
            named[testimony.tombstones[row.id_digest].request_id].append(row)
        arrivals = _arrivals(context, again)
        absent = [each for each in again if each.id_digest not in found]
        removal = Removal([each.request for each in arrivals], named)
        try:
            commit_removed(context, removal, _arriving(arrivals, absent), held_too=True)
        except IntegrityError as error:
            raise _too_old(error) from error
    context.stores.witness.append(context.stores.ledger.event_head(), (), ())
    if again:
        erase_unknown(context)


def _too_old(error: IntegrityError) -> IntegrityError:
    """Return the error for a backup that can't be read: keys of its rewritten slices are destroyed."""
    return IntegrityError(
        "a backup was restored, and what was deleted since can't be deleted again",
        where=error.where,
        got=error.what,
        next_step="run `sisa doctor --repair`; if that can't repair it, restore a backup made after the "
        "last deletion: of an encrypted model an older one can't be read where records were deleted",
    )


def _announce(context: Context, testimony: Testimony, num_live: int) -> None:
    lost = (
        testimony.head.num_events if testimony.head else 0
    ) - context.stores.ledger.event_head().num_events
    text = f"a backup was restored: {num_live} records that were deleted since are deleted again"
    if lost > 0:
        text += f"; {lost} events are lost: submit requests that came in since once more"
    context.report(Notice(text))


def _arrivals(context: Context, again: Sequence[Tombstone]) -> list[Arrival]:
    """Return the requests that deleted these records, from the ledger or made again."""
    named: dict[str, list[str]] = {}
    for each in again:
        named.setdefault(each.request_id, []).append(each.id_digest)
    known = {each.request_id: each for each in context.stores.ledger.requests()}
    now = context.now()
    arrivals = []
    for request_id, digests in named.items():
        request = known.get(request_id) or Request(
            request_id, now, due_date(now, "gdpr"), len(digests), reason=REPLAYED
        )
        approver = request.approver or REPLAYED  # no consent: it may have ended since
        approved = replace(request, state="approved", approver=approver, cause="", consent="")
        states = [approved] if request_id in known else [request, approved]
        events = tuple(event(each, now, REPLAYED) for each in states)
        arrivals.append(Arrival(approved, (), tuple(digests), events))
    return arrivals


def _arriving(arrivals: Sequence[Arrival], absent: Sequence[Tombstone]) -> Change:
    changes = [each.change() for each in arrivals]
    return Change(
        named=[pair for each in changes for pair in each.named],
        events=[passed for each in changes for passed in each.events],
        tombstones=absent,
    )
