"""How long orders last: what is still served after deletions while nothing is retrained.

    expected_depth           mean number of slices that a shard still serves after some deletions
    deletions_until_base     deletions until no shard serves more than the base: m L H(m B)
    simulate_until_base      the same by simulation
    simulate_depth           `expected_depth` by simulation

There are m shards, L slices and B orders. A deletion hits one slice of one shard; slices are equally
likely or weighted by `risks`, whatever was hit before. A shard then serves what `depth_after`
returns and the planner does (tests compare them): the longest prefix of any order that no deletion hit.

A shard is back at its base once the first slice of every order was hit. These are m B of m L equally
likely slices, so that collecting them all takes m L (1 + 1/2 + ... + 1/(m B)) deletions on average. The
formula is exact if the orders begin with B different slices (rotations do) and slices are equally
likely. It does not hold with risks, where orders may begin alike, when slices run out of records, when
a batch deletes one person's records, or when training continues between deletions (then the base is
hardly ever reached).

>>> round(deletions_until_base(num_shards=1, num_slices=4, num_orders=1), 2)
4.0
>>> from sisa.planning.orders import rotations
>>> [round(expected_depth(rotations(4, b), num_deletions=1), 2) for b in (1, 2, 4)]
[1.5, 2.5, 3.0]

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3: the deletion rate, after the
coupon collector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sisa.planning.orders import Order

MAX_ORDERS = 12  # `expected_depth` visits all sets of them


def deletions_until_base(num_shards: int, num_slices: int, num_orders: int) -> float:
    """Return the expected deletions until every shard serves the base alone, without retraining.

    `num_orders` is at most `num_slices`.
    """
    collected = num_shards * num_orders
    return num_shards * num_slices * math.fsum(1 / each for each in range(1, collected + 1))


def expected_depth(
    orders: Sequence[Order],
    num_deletions: float,
    num_shards: int = 1,
    risks: Sequence[float] | None = None,
) -> float:
    """Return the mean number of slices that a shard serves after `num_deletions` in all shards together.

    Order 0 is the first of `orders`. The closed form is by inclusion and exclusion: d slices are served
    if the first d of any order were not hit. Raise ValueError for more than MAX_ORDERS orders.
    """
    if len(orders) > MAX_ORDERS:
        raise ValueError(f"at most {MAX_ORDERS} orders")
    chances = _chances(len(orders[0]), risks)
    depth = 0.0
    for served in range(1, len(orders[0]) + 1):
        prefixes = {frozenset(order[:served]) for order in _with_stage(orders, served)}
        for size in range(1, len(prefixes) + 1):
            for chosen in combinations(prefixes, size):
                hit = sum(chances[each] for each in frozenset().union(*chosen)) / num_shards
                depth += (-1) ** (size - 1) * max(0.0, 1 - hit) ** num_deletions
    return float(depth)


def depth_after(orders: Sequence[Order], hit: Iterable[int]) -> int:
    """Return the depth of the deepest clean prefix after these slices lost a record.

    The longest prefix of an order other than order 0 is one slice short of all.

    >>> orders = ((0, 1, 2, 3), (2, 3, 0, 1))
    >>> [depth_after(orders, [each]) for each in range(4)], depth_after(orders, [0, 2])
    ([2, 3, 2, 3], 0)
    """
    gone = set(hit)
    if not gone:
        return len(orders[0])
    return max(next(at for at, each in enumerate(order) if each in gone) for order in orders)


def _with_stage(orders: Sequence[Order], served: int) -> Sequence[Order]:
    """Return the orders with a stage of so many slices: all but order 0 end one short."""
    return orders if served < len(orders[0]) else orders[:1]


def _chances(num_slices: int, risks: Sequence[float] | None) -> NDArray[np.float64]:
    weights = np.ones(num_slices) if risks is None else np.array(risks, dtype=np.float64)
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


@dataclass(frozen=True, slots=True)
class Drawn:
    """A mean over random runs, with its standard error."""

    mean: float
    error: float


def _drawn(found: Sequence[float]) -> Drawn:
    return Drawn(float(np.mean(found)), float(np.std(found) / math.sqrt(len(found))))


def simulate_until_base(
    num_shards: int,
    orders: Sequence[Order],
    *,
    runs: int = 1_000,
    seed: int = 0,
    risks: Sequence[float] | None = None,
) -> Drawn:
    """Return the deletions until every shard serves the base alone.

    Every slice that an order begins with needs a risk above 0.
    """
    draw = np.random.default_rng(seed)
    num_slices = len(orders[0])
    chances = np.tile(_chances(num_slices, risks), num_shards) / num_shards
    firsts = sorted({order[0] for order in _with_stage(orders, 1)})
    needed = np.zeros(num_shards * num_slices, dtype=bool)
    needed[[shard * num_slices + first for shard in range(num_shards) for first in firsts]] = True
    chunk = math.ceil(num_shards * num_slices * (1 + math.log(1 + needed.sum())))
    return _drawn([_until_all(draw, chances, needed, chunk) for _ in range(runs)])


def _until_all(
    draw: np.random.Generator, chances: NDArray[np.float64], needed: NDArray[np.bool_], chunk: int
) -> float:
    left, before = needed.copy(), 0
    while True:
        hits = draw.choice(len(chances), size=chunk, p=chances)
        cells, first = np.unique(hits, return_index=True)
        wanted = left[cells]
        left[cells] = False
        if not left.any():
            return before + float(first[wanted].max()) + 1
        before += chunk


def simulate_depth(
    orders: Sequence[Order],
    num_deletions: int,
    num_shards: int = 1,
    *,
    runs: int = 1_000,
    seed: int = 0,
    risks: Sequence[float] | None = None,
) -> Drawn:
    """Return the mean number of slices that a shard serves after so many deletions in all shards."""
    draw = np.random.default_rng(seed)
    num_slices = len(orders[0])
    chances = np.tile(_chances(num_slices, risks), num_shards) / num_shards
    found = []
    for _ in range(runs):
        hit = draw.choice(len(chances), size=num_deletions, p=chances)
        shards = [hit[hit // num_slices == shard] % num_slices for shard in range(num_shards)]
        found.append(sum(depth_after(orders, map(int, each)) for each in shards) / num_shards)
    return _drawn(found)
