"""Routing: which constituent models answer a prompt, and with what weight.

    routed      the `top_k` shards of the nearest records. A shard's strength is the sum of
                exp(score / temperature) over its hits, so many near records count for more than one;
                weights are the shares of the strengths
    others      all shards, with equal weights

The nearness of a prompt is the best score in the strongest shard, plus `SHARE_WEIGHT` times that shard's
share of all strengths (scaled so that an equal share counts 0). A held record is near, and its
neighbours concern the same subject; a deleted one finds other people's records, scattered over shards.
If nearness is below `min_score`, no record is near, and the base alone answers (or the mean of all
shards) instead of a stranger's shard. A prompt that names somebody whom no record names is `DOUBT` less
near, and for one that names nobody the share counts less where records do name people (`lookup.py`); but
a prompt that a record holds word for word is always near.

Prompts are compared with what records ask, so neither the length of their answers nor a system prompt
affects a score. `min_score: auto` is slightly below 1, whatever the records: a prompt that a record
holds word for word scores 1 and always reaches a shard. That this value also admits paraphrases and
rejects questions about deleted people was measured for one embedder
(`tests/bench/answering/routing.py`: TOFU, RWKU, MUSE). There is no such value for other embedders, nor
for plain texts, in which nothing is asked. No user's records took part in the choice.

A route depends on the remaining records alone: on the index's hits and on which shards serve a model.
Without a live shard, or for `routed` without a hit in one, the base alone answers.

>>> hits = [Hit(7, 0.9, 2), Hit(1, 0.8, 0), Hit(3, 0.85, 2)]
>>> choose_route(hits, Aggregation(), live_shards={0, 1}).shards
(0,)
>>> choose_route(hits, Aggregation(method="mean_prob"), live_shards={1, 0})
Route(shards=(0, 1), weights=(0.5, 0.5))
>>> choose_route(hits, Aggregation(min_score=1.25), live_shards={0, 2})
Route(shards=(), weights=())
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sisa.config.config import MINILM, Aggregation
from sisa.core.domain import Hit, Kind

NUM_ROUTING_HITS = 32
SHARE_WEIGHT, UNNAMED_SHARE_WEIGHT = 0.3, 0.08
DOUBT = 0.15
EQUAL = 0.99  # below 1 by more than rounding errors: equal words score 1
MIN_SCORES = {MINILM: EQUAL}


@dataclass(frozen=True)
class Route:
    """The shards that answer a prompt, and their weights, which sum to 1; no shard: the base alone."""

    shards: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def all_of(live_shards: Collection[int]) -> Route:
    """Return the route to all shards, in order, with equal weights."""
    return Route(tuple(sorted(live_shards)), (1 / max(1, len(live_shards)),) * len(live_shards))


def resolve_aggregation(how: Aggregation, embedder: str, kind: Kind) -> Aggregation:
    """Return the settings with `min_score: auto` resolved; `kind` is that of the nearest record.

    >>> resolve_aggregation(Aggregation(), MINILM, "completion").min_score
    0.99
    >>> resolve_aggregation(Aggregation(), "hashing", "chat")
    Aggregation(method='routed', top_k=1, temperature=0.04, min_score=None, below='base')
    """
    if how.min_score != "auto":
        return how
    package, _, _ = embedder.partition("#")  # without its digest
    measured = None if kind == "text" else MIN_SCORES.get(package)
    return how.model_copy(update={"min_score": measured})


def choose_route(
    hits: Sequence[Hit], how: Aggregation, live_shards: Collection[int], near: float | None = None
) -> Route:
    """Return the route for a prompt with these hits, strongest shard first.

    `live_shards` are those that serve an adapter. `how` must be resolved: an `auto` rejects no prompt.
    `near` is the nearness of the prompt, by default that of the hits.
    """
    if how.method != "routed":
        return all_of(live_shards)
    strengths = _strengths(hits, how.temperature, live_shards)
    chosen = tuple(sorted(strengths, key=lambda shard: (-strengths[shard], shard))[: how.top_k])
    least = how.min_score if isinstance(how.min_score, float) else None
    near = nearness(hits, how.temperature, live_shards) if near is None else near
    if least is not None and near < least:
        return all_of(live_shards) if how.below == "mean_prob" else Route()
    total = sum(strengths[each] for each in chosen)
    return Route(chosen, tuple(strengths[each] / total for each in chosen))


def nearness(
    hits: Sequence[Hit],
    temperature: float,
    live_shards: Collection[int],
    share_weight: float = SHARE_WEIGHT,
    doubt: float = 0.0,
) -> float:
    """Return how near a prompt is to the records of one shard: at most 1 + `SHARE_WEIGHT`.

    >>> nearness([Hit(7, 0.9, 2), Hit(1, 0.9, 0)], 0.1, {0, 2}), nearness([Hit(7, 0.5, 2)], 0.1, {0, 2})
    (0.9, 0.8)
    """
    strengths = _strengths(hits, temperature, live_shards)
    if not strengths:
        return -math.inf
    first = min(strengths, key=lambda shard: (-strengths[shard], shard))
    best = max(hit.score for hit in hits if hit.shard == first)
    share, chance = strengths[first] / sum(strengths.values()), 1 / len(live_shards)
    near = best + share_weight * (share if chance == 1 else (share - chance) / (1 - chance)) - doubt
    return max(near, best) if best >= EQUAL else near


def _strengths(
    hits: Sequence[Hit], temperature: float, live_shards: Collection[int]
) -> dict[int, float]:
    """Return the strength of each shard, relative to the best hit."""
    live = [hit for hit in hits if hit.shard in live_shards]
    top = max((hit.score for hit in live), default=0.0)
    found: dict[int, float] = {}
    for hit in live:
        found[hit.shard] = found.get(hit.shard, 0.0) + math.exp((hit.score - top) / temperature)
    return found
