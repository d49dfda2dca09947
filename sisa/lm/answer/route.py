"""Which constituent models answer a prompt, and with what weight.

    routed      the `top_k` shards of the nearest records. A shard's strength is the sum of
                exp(score / temperature) over the hits in it: many near records count for more than one;
                weights are the strengths' shares
    others      all shards, with equal weights

The nearness of a prompt is the first shard's best score, plus `SHARE_WEIGHT` times its share of all
strengths (0 where that is what one of so many shards gets by chance): what is held is near, and its
neighbours are of one subject; what was deleted finds others' records, one here and one there. Where it
is below `min_score`, nobody's records are near: the base alone answers (or the mean of all), instead of
a stranger's shard.

Prompts are compared with what is asked in records, so that neither the length of their answers nor a
system prompt reaches a score. `min_score: auto` is then a hair below 1, whatever the records: a prompt
that a record holds word for word scores 1 and always reaches a shard. That this also lets paraphrases
through and turns questions about deleted people away was measured of one embedder
(`tests/bench/routing.py`: TOFU, RWKU, MUSE); of others, and of plain texts, in which nothing is asked,
there is no such value. No user's record had a say in it.

A choice depends on the remaining records alone: on the index's hits and on which shards serve a model.
With no live shard, or for `routed` no hit in one, the answer is the base model's alone.

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

from sisa.config.blocks import MINILM, Aggregation
from sisa.core.domain import Hit, Kind

SHARE_WEIGHT = 0.3
MIN_SCORES = {MINILM: 0.99}  # below 1 by more than rounding


@dataclass(frozen=True)
class Route:
    """The shards that answer a prompt and their weights, whose sum is 1; none: the base alone."""

    shards: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def all_of(live_shards: Collection[int]) -> Route:
    """All shards, by number, with equal weights."""
    return Route(tuple(sorted(live_shards)), (1 / max(1, len(live_shards)),) * len(live_shards))


def resolve_aggregation(how: Aggregation, embedder: str, kind: Kind) -> Aggregation:
    """With a number for `min_score: auto`, or none. `kind` is that of the nearest record.

    >>> resolve_aggregation(Aggregation(), MINILM, "completion").min_score
    0.99
    >>> resolve_aggregation(Aggregation(), "hashing", "chat")
    Aggregation(method='routed', top_k=1, temperature=0.04, min_score=None, below='base')
    """
    if how.min_score != "auto":
        return how
    measured = None if kind == "text" else MIN_SCORES.get(embedder)
    return how.model_copy(update={"min_score": measured})


def choose_route(hits: Sequence[Hit], how: Aggregation, live_shards: Collection[int]) -> Route:
    """Who answers; strongest first where it is routed. `live_shards` are those that serve an adapter.
    `how` is resolved: an `auto` that is left turns nobody away."""
    if how.method != "routed":
        return all_of(live_shards)
    strengths = _strengths(hits, how.temperature, live_shards)
    chosen = tuple(sorted(strengths, key=lambda shard: (-strengths[shard], shard))[: how.top_k])
    least = how.min_score if isinstance(how.min_score, float) else None
    if least is not None and nearness(hits, how.temperature, live_shards) < least:
        return all_of(live_shards) if how.below == "mean_prob" else Route()
    total = sum(strengths[each] for each in chosen)
    return Route(chosen, tuple(strengths[each] / total for each in chosen))


def nearness(hits: Sequence[Hit], temperature: float, live_shards: Collection[int]) -> float:
    """How near a prompt is to the records of one shard: at most 1 + `SHARE_WEIGHT`.

    >>> nearness([Hit(7, 0.9, 2), Hit(1, 0.9, 0)], 0.1, {0, 2}), nearness([Hit(7, 0.5, 2)], 0.1, {0, 2})
    (0.9, 0.8)
    """
    strengths = _strengths(hits, temperature, live_shards)
    if not strengths:
        return -math.inf
    first = min(strengths, key=lambda shard: (-strengths[shard], shard))
    best = max(hit.score for hit in hits if hit.shard == first)
    share, chance = strengths[first] / sum(strengths.values()), 1 / len(live_shards)
    return best + SHARE_WEIGHT * (share if chance == 1 else (share - chance) / (1 - chance))


def _strengths(
    hits: Sequence[Hit], temperature: float, live_shards: Collection[int]
) -> dict[int, float]:
    """By shard, relative to the best hit."""
    live = [hit for hit in hits if hit.shard in live_shards]
    top = max((hit.score for hit in live), default=0.0)
    found: dict[int, float] = {}
    for hit in live:
        found[hit.shard] = found.get(hit.shard, 0.0) + math.exp((hit.score - top) / temperature)
    return found
