"""Write a `Change` as rows: what one transaction of the ledger removes, replaces and adds.

Removals come before additions, so that a row can move in one change. Added records get the transaction's
number. Events without a link are chained to the last one, without a key. A request keeps the number of
its first commit, and how many records it names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from sisa.core.domain import Export, Request, RequestEvent
from sisa.core.patch import Patch
from sisa.core.ports import Change
from sisa.core.requests import chained
from sisa.store.ledger.rows import SEQ, Writing, check_row_count, expected_rows, read
from sisa.store.ledger.schema import (
    CHECKPOINTS,
    EVENTS,
    EXPORTS,
    HEADS,
    INDEXES,
    META,
    NAMED,
    PATCHES,
    RECORDS,
    REQUESTS,
    SLICES,
    TOMBSTONES,
    VAULT,
    VAULTED,
)


def apply(connection: sa.Connection, change: Change) -> int:
    """Write a change, and return the number of its transaction. Raises rows.Damaged."""
    before = read(connection, META, META.c.key == SEQ)
    seq = int(before[0][1]) + 1 if before else 1
    writing = Writing(connection)
    _remove(writing, change)
    writing.insert(RECORDS, [{**asdict(row), "seq": seq} for row in change.added])
    for table, values in (
        (TOMBSTONES, change.tombstones),
        (SLICES, change.slices),
        (INDEXES, change.indexes),
        (HEADS, change.heads),
    ):
        writing.put(table, [asdict(each) for each in values])
    checkpoints = [{**asdict(each), "prefix": json.dumps(each.prefix)} for each in change.checkpoints]
    writing.put(CHECKPOINTS, checkpoints)
    writing.put(VAULT, [{**asdict(each), "held": int(each.held)} for each in change.vault])
    writing.put(EXPORTS, [_export_row(each) for each in change.exports])
    writing.put(PATCHES, [_patch_row(each) for each in change.patches])
    writing.put(VAULTED, [{"name": name, "id_digest": each} for name, each in change.vaulted])
    meta = {**change.meta, SEQ: str(seq)}
    writing.put(META, [{"key": key, "value": value} for key, value in meta.items()])
    _put_requests(writing, change, seq)
    _append_events(writing, change.events)
    writing.end()
    writing.end_keyed(seq)
    return seq


def _export_row(export: Export) -> dict[str, Any]:
    lists = {"patches": json.dumps(export.patches), "prefix": json.dumps(export.prefix)}
    return asdict(export) | lists


def _patch_row(patch: Patch) -> dict[str, Any]:
    """Return a patch as a row."""
    row = {**asdict(patch), "key": patch.key}
    return row | {name: json.dumps(row[name], sort_keys=True) for name in ("job", "report")}


def _remove(writing: Writing, change: Change) -> None:
    writing.remove(RECORDS, [(each.id_digest,) for each in change.removed])
    writing.remove(CHECKPOINTS, [(key,) for key in change.dropped])
    writing.remove(INDEXES, [(shard,) for shard in change.unindexed])
    writing.remove(HEADS, [(shard,) for shard in change.headless])
    writing.remove(EXPORTS, list(change.unexported))
    writing.remove(SLICES, list(change.emptied))
    _remove_sets(writing, change.unvaulted)


def _remove_sets(writing: Writing, names: Collection[str]) -> None:
    """Remove sets of the vault, with the rows of their records, which are found without an index."""
    if names:
        pairs = read(writing.connection, VAULTED)
        check_row_count(VAULTED, expected_rows(writing.connection, VAULTED), len(pairs))
        writing.remove(VAULTED, [(name, each) for name, each, _ in pairs if name in set(names)])
        writing.remove(VAULT, [(name,) for name in names])


def _put_requests(writing: Writing, change: Change, seq: int) -> None:
    arriving: dict[str, list[str]] = {}
    for request_id, record in change.named:
        arriving.setdefault(request_id, []).append(record)
    requests: dict[str, Request | None] = dict.fromkeys(arriving)
    requests |= {request.request_id: request for request in change.requests}
    for request_id, request in requests.items():
        known = read(writing.connection, REQUESTS, REQUESTS.c.request_id == request_id)
        named = {row[1] for row in read(writing.connection, NAMED, NAMED.c.request_id == request_id)}
        _, first, num_named, body, _ = known[0] if known else (request_id, seq, len(named), "", 0)
        check_row_count(NAMED, num_named, len(named))
        named |= set(arriving.get(request_id, ()))
        rows = [{"request_id": request_id, "id_digest": each} for each in arriving.get(request_id, ())]
        writing.put(NAMED, rows)
        if request is not None:
            body = json.dumps(asdict(request), sort_keys=True)
        if body:
            row = {"request_id": request_id, SEQ: first, "num_named": len(named), "body": body}
            writing.put(REQUESTS, [row])


def _append_events(writing: Writing, events: Sequence[RequestEvent]) -> None:
    latest = sa.select(sa.func.max(EVENTS.c.position)).scalar_subquery()
    last = read(writing.connection, EVENTS, EVENTS.c.position == latest)
    position, link = (last[0][0], last[0][-2]) if last else (0, "")
    rows = []
    for event in events:
        position, link = position + 1, event.link or chained(link, event)
        rows.append({**asdict(event), "position": position, "link": link})
    writing.insert(EVENTS, rows)
