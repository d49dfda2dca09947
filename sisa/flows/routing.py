"""Search the index, and route prompts to shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from sisa.config.config import SisaBlock
from sisa.core import ports
from sisa.core.domain import Hit, Kind
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricted_rows
from sisa.lm.answer.route import Route, choose_route, resolve_aggregation


def search_each(
    context: Context, queries: ports.Vectors, top_k: int, by: ports.By = "text"
) -> list[list[Hit]]:
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


def routing_hits(context: Context, queries: ports.Vectors, top_k: int) -> list[list[Hit]]:
    """Return the best hits for prompts, as if no restricted record were in the index."""
    hidden = {(row.shard, row.vector_id) for row in restricted_rows(context.stores.ledger)}
    found = search_each(context, queries, top_k + len(hidden), by="asked")
    return [[hit for hit in hits if (hit.shard, hit.vector_id) not in hidden][:top_k] for hits in found]


def route_of(
    context: Context,
    block: SisaBlock,
    hits: Sequence[Hit],
    live_shards: Collection[int],
    near: float | None = None,
) -> Route:
    """Return the route of a prompt with these hits, as `choose_route` does."""
    kind: Kind = "completion"
    if hits:
        rows = context.stores.ledger.by_vector(hits[0].shard, [hits[0].vector_id])
        kind = rows[hits[0].vector_id].kind if rows else kind
    how = resolve_aggregation(block.aggregation, block.embedder, kind)
    return choose_route(hits, how, live_shards, near)
