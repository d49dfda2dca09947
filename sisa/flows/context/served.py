"""Return what a ledger holds and serves, and whose records are restricted: stored and not served."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sisa.core import ports
from sisa.core.digest import digest_of
from sisa.core.domain import Head, RecordRow, Restrictions
from sisa.core.ledger_meta import RESTRICTIONS
from sisa.core.patches import active
from sisa.flows.context.context import Context
from sisa.planning.plan import held_back, tainted_checkpoints


def held_state(ledger: ports.Ledger) -> str:
    """Return a digest of what a ledger holds and serves; new requests do not change it."""
    with ledger.snapshot():
        held = [[each.name for each in ledger.slices()], [each.key for each in ledger.checkpoints()]]
        patches = [each.key for each in active(ledger.patches())]
        served = [[each.key for each in served_heads(ledger)], patches]
        return digest_of([held, served, ledger.num_tombstones()])


def model_digest(context: Context) -> str:
    """Return the keyed digest of all heads' adapters in shard order, and of active patches, if any.

    Requests and cards keep it after a deletion: without the key it confirms no guess.
    """
    ledger = context.stores.ledger
    adapters = {each.key: each.adapter_sha256 for each in ledger.checkpoints()}
    heads = [adapters.get(head.key) if head.key else None for head in ledger.heads()]
    stack = [each.adapter_sha256 for each in active(ledger.patches())]
    return context.settings.assigner.model_digest(heads, stack)


def restricting(known: Restrictions, since: Mapping[str, str]) -> dict[str, str]:
    """Return the ledger's meta that replaces the known restrictions by others."""
    return {RESTRICTIONS: json.dumps([known.number + 1, dict(since)], sort_keys=True)}


def restrictions(ledger: ports.Ledger) -> Restrictions:
    """Return whose records are stored and not served."""
    number, since = json.loads(ledger.meta().get(RESTRICTIONS, "[0, {}]"))
    return Restrictions(number, since)


def restricted_rows(ledger: ports.Ledger) -> list[RecordRow]:
    """Return the held records that are stored and not served."""
    return [row for each in sorted(restrictions(ledger).since) for row in ledger.by_subject(each)[0]]


def served_heads(ledger: ports.Ledger) -> list[Head]:
    """Return what each shard serves: its head, unless that saw a record that is restricted."""
    heads, restricted = ledger.heads(), restricted_rows(ledger)
    shards = sorted({row.shard for row in restricted})
    return held_back(heads, [e for shard in shards for e in ledger.checkpoints(shard)], restricted)


def servable(ledger: ports.Ledger) -> frozenset[str]:
    """Return the keys of the held checkpoints that saw no restricted record."""
    held = ledger.checkpoints()
    return frozenset(each.key for each in held) - {*tainted_checkpoints(held, restricted_rows(ledger))}


def served_keys(ledger: ports.Ledger) -> dict[int, str]:
    """Return the key of the served adapter of each shard that serves one."""
    return {head.shard: head.key for head in served_heads(ledger) if head.key is not None}
