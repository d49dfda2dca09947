"""Which constituent models answer a prompt, and with what weight.

    routed      the `top_k` shards of the nearest records; weights are the softmax of each shard's best
                score over `temperature`. Below `min_score` nobody's records are near: the base alone
                answers (or the mean of all), instead of a stranger's shard
    others      all shards, with equal weights

Rules: a choice depends on the remaining records alone: on the index's hits and on which shards serve
a model. Only the prompt is looked up, never what is to follow it. With no live shard, or for `routed`
no hit in one, the answer is the base model's alone.

Not covered: what the chosen say together (`aggregate.py`).

>>> hits = [Hit(7, 0.9, 2), Hit(1, 0.8, 0), Hit(3, 0.7, 2)]
>>> choose_route(hits, Aggregation(), live_shards={0, 1}).shards
(0,)
>>> choose_route(hits, Aggregation(method="mean_prob"), live_shards={1, 0})
Route(shards=(0, 1), weights=(0.5, 0.5))
>>> choose_route(hits, Aggregation(min_score=0.95), live_shards={0, 2})
Route(shards=(), weights=())
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sisa.config import Aggregation
from sisa.domain import Hit


@dataclass(frozen=True)
class Route:
    """The shards that answer a prompt and their weights, whose sum is 1; none: the base alone."""

    shards: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def all_of(live_shards: Collection[int]) -> Route:
    """All shards, by number, with equal weights."""
    return Route(tuple(sorted(live_shards)), (1 / max(1, len(live_shards)),) * len(live_shards))


def choose_route(hits: Sequence[Hit], how: Aggregation, live_shards: Collection[int]) -> Route:
    """Who answers; nearest first where it is routed. `live_shards` are those that serve an adapter."""
    if how.method != "routed":
        return all_of(live_shards)
    best: dict[int, float] = {}
    for hit in hits:
        if hit.shard in live_shards:
            best[hit.shard] = max(hit.score, best.get(hit.shard, hit.score))
    chosen = tuple(sorted(best, key=lambda shard: (-best[shard], shard))[: how.top_k])
    if how.min_score is not None and (not chosen or best[chosen[0]] < how.min_score):
        return all_of(live_shards) if how.below == "mean_prob" else Route()
    parts = [math.exp((best[each] - best[chosen[0]]) / how.temperature) for each in chosen]
    return Route(chosen, tuple(part / sum(parts) for part in parts))
