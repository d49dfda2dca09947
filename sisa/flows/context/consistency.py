"""Refuse a ledger that contradicts itself: lost rows, or requests that contradict their events."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sisa.core.domain import WitnessHead
from sisa.core.errors import IntegrityError
from sisa.core.event_chain import contradicted
from sisa.core.ledger_meta import CHECKED
from sisa.core.ports import Change, Ledger
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context

MANY_EVENTS = 256  # number of new events after which the last checked one is stored
BEGINNING = WitnessHead("", 0)


def check_consistent(context: Context, since: WitnessHead = BEGINNING) -> WitnessHead:
    """Raise IntegrityError if the ledger lost rows or contradicts the events after `since`.

    Return the last event that was checked.
    """
    ledger = context.stores.ledger
    with ledger.snapshot():  # people decide about requests meanwhile
        events, held = ledger.events(since.num_events), ledger.requests()
    check_rows(ledger)
    heads, slices = ledger.heads(), ledger.slices()
    known = {each.key for each in ledger.checkpoints()}
    lost = {
        "heads": len(heads) != context.settings.assigner.layout.num_shards,
        "records or slices": sum(ledger.kinds().values()) != sum(f.num_records for f in slices),
        "indexes": {f.shard for f in slices} != {f.shard for f in ledger.indexes()},
        "checkpoints": any(head.key not in known for head in heads if head.key is not None),
        "requests or events": contradicted(held, events, context.settings.chain, since.link),
    }
    _raise_lost([name for name, each in lost.items() if each])
    return WitnessHead(events[-1].link, since.num_events + len(events)) if events else since


def check_since_last_time(context: Context) -> None:
    """Refuse contradictions in the history since the last checked event; `verify` checks all of it."""
    kept = json.loads(context.stores.ledger.meta().get(CHECKED, "null"))
    since = WitnessHead(*kept) if kept else BEGINNING
    head = check_consistent(context, since)
    if head.num_events - since.num_events >= MANY_EVENTS:
        commit(context, Change(meta={CHECKED: json.dumps([head.link, head.num_events])}))


def check_rows(ledger: Ledger) -> None:
    """Raise IntegrityError if tables lost rows. This check is cheap enough for every commit."""
    _raise_lost(ledger.lost())


def _raise_lost(lost: Sequence[str]) -> None:
    if lost:
        raise IntegrityError(
            "the ledger contradicts itself; nothing was changed",
            got=", ".join(lost) + " are missing",
            next_step="restore the model directory from a backup",
        )
