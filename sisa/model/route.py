"""Which constituent models answer a prompt.

Rules: a choice depends on the remaining records alone: on the index's hits and on which shards serve
a model. `routed` takes the shards of the best hits; `mean_prob` takes all (the mean of probability
vectors of Bourtoule et al. 2021, section IV). With no live shard, or for `routed` no hit in one, the
answer is the base model's alone: no shards.

Not covered: a threshold under which a prompt is treated as being about nobody.

>>> hits = [Hit(7, 0.9, 2), Hit(1, 0.8, 0), Hit(3, 0.7, 2)]
>>> choose_shards(hits, "routed", top_k=1, live_shards={0, 1})
(0,)
>>> choose_shards(hits, "mean_prob", top_k=1, live_shards={1, 0})
(0, 1)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from sisa.domain import Hit

Method = Literal["routed", "mean_prob"]


def choose_shards(
    hits: Sequence[Hit], method: Method, top_k: int, live_shards: Collection[int]
) -> tuple[int, ...]:
    """Shards that answer: for `routed` at most `top_k`, nearest first; for `mean_prob` all, by number.

    `live_shards` are those that serve an adapter.
    """
    if method == "mean_prob":
        return tuple(sorted(live_shards))
    best: dict[int, float] = {}
    for hit in hits:
        if hit.shard in live_shards:
            best[hit.shard] = max(hit.score, best.get(hit.shard, hit.score))
    return tuple(sorted(best, key=lambda shard: (-best[shard], shard))[:top_k])
