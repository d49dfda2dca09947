"""Search the index, route prompts to shards, and tell how those of held records would be routed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from sisa.config.config import SisaBlock
from sisa.core import ports
from sisa.core.digest import digest_of
from sisa.core.domain import Hit, Kind
from sisa.core.errors import SisaError
from sisa.core.ledger_meta import HELD_PROMPTS
from sisa.core.ports import Change
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricted_rows, restrictions, served_keys
from sisa.lm.routing.route import NUM_ROUTING_HITS, Route, choose_route, resolve_aggregation
from sisa.store.index import EXACT_UP_TO

MAX_LOOKED_UP = 200  # records whose prompts `held_prompts` looks up


def routing_hits(context: Context, queries: ports.Vectors, top_k: int) -> list[list[Hit]]:
    """Return the best hits for prompts, as if no restricted record were in the index."""
    hidden = {(row.shard, row.vector_id) for row in restricted_rows(context.stores.ledger)}
    indexes = context.stores.ledger.indexes()
    found = context.stores.index.search(indexes, queries, top_k + len(hidden), by="prompts")
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


@dataclass(frozen=True)
class HeldPrompts:
    """Count what happens to prompts of held records when they are asked word for word."""

    looked_up: int
    turned_away: int  # near no record, or the shard serves nothing: `below` decides who answers
    elsewhere: int  # answered first by another shard than the record's own


def held_prompts(context: Context, *, note: bool = False) -> HeldPrompts | None:
    """Return how held prompts would be routed: as noted in this state of the model, or looked up.

    With `note`, it is noted in the ledger, so that `sisa status` need not search for it.
    """
    block = context.settings.config.sisa
    if block.aggregation.method != "routed":
        return None
    ledger = context.stores.ledger
    indexes = sorted([each.shard, each.sha256] for each in ledger.indexes())
    how = block.model_dump(mode="json", include={"aggregation", "embedder"})
    number = restrictions(ledger).number
    state = digest_of([indexes, sorted(served_keys(ledger)), how, *([number] if number else [])])
    noted = json.loads(ledger.meta().get(HELD_PROMPTS, "null"))
    if noted and noted["of"] == state:
        return HeldPrompts(**noted["found"]) if noted["found"] else None
    found = _look_up_prompts(context, block)
    if note:
        text = json.dumps({"of": state, "found": found and asdict(found)})
        commit(context, Change(meta={HELD_PROMPTS: text}))
    return found


def _look_up_prompts(context: Context, block: SisaBlock) -> HeldPrompts | None:
    """Look up the prompts of held records: of all, or of the first ones of each shard by keyed id.

    Return None without prompts, or if the index can't be read or searched quickly.
    """
    files = [each for each in context.stores.ledger.indexes() if each.num_vectors]
    if sum(each.num_vectors for each in files) > EXACT_UP_TO:
        return None
    aggregation = block.aggregation.model_copy(update={"below": "base"})
    block = block.model_copy(update={"aggregation": aggregation})
    live_shards = frozenset(served_keys(context.stores.ledger))
    routed: list[tuple[int, Route]] = []  # with the shard of the record
    restricted = {row.id_digest for row in restricted_rows(context.stores.ledger)}
    for file in files:
        rows = context.stores.ledger.rows(file.shard)[: math.ceil(MAX_LOOKED_UP / len(files))]
        served = [row for row in rows if row.kind != "text" and row.id_digest not in restricted]
        asking = sorted(row.vector_id for row in served)
        try:
            vectors = context.stores.index.vectors(file, asking, by="prompts")
            found = routing_hits(context, vectors, NUM_ROUTING_HITS)
        except SisaError:
            return None  # `sisa doctor` says what is damaged
        routed += [(file.shard, route_of(context, block, hits, live_shards)) for hits in found]
    if not routed:
        return None
    turned_away = sum(not route.shards for _, route in routed)
    own = sum(route.shards[:1] == (shard,) for shard, route in routed)
    return HeldPrompts(len(routed), turned_away, elsewhere=len(routed) - turned_away - own)
