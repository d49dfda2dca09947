"""How long orders last: deletions until nothing but the base is served, while nothing is retrained.

There are m shards, L slices and B orders. A deletion hits one slice of one shard, all equally likely. A
shard then serves what `depth_after` returns and the planner does (tests compare them): the longest
prefix of any order that no deletion hit.

A shard is back at its base once the first slice of every order was hit. These are m B of m L slices, so
that collecting them all takes m L (1 + 1/2 + ... + 1/(m B)) deletions on average. The formula is exact
if the orders begin with B different slices (rotations do). It does not hold where slices are not equally
likely, when slices run out of records, when a batch deletes one person's records, or when training
continues between deletions (then the base is hardly ever reached).

>>> round(deletions_until_base(num_shards=1, num_slices=4, num_orders=1), 2)
4.0

Source: S3T, Chowdhury et al., ICLR 2025 (arXiv 2406.16257), section 3: the deletion rate, after the
coupon collector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sisa.planning.orders import Order


def deletions_until_base(num_shards: int, num_slices: int, num_orders: int) -> float:
    """Return the expected deletions until every shard serves the base alone, without retraining.

    `num_orders` is at most `num_slices`.
    """
    collected = num_shards * num_orders
    return num_shards * num_slices * math.fsum(1 / each for each in range(1, collected + 1))


def depth_after(orders: Sequence[Order], hit: Iterable[int]) -> int:
    """Return the depth of the deepest clean prefix after these slices lost a record.

    Order 0 is the first. The longest prefix of another order is one slice short of all.

    >>> orders = ((0, 1, 2, 3), (2, 3, 0, 1))
    >>> [depth_after(orders, [each]) for each in range(4)], depth_after(orders, [0, 2])
    ([2, 3, 2, 3], 0)
    """
    gone = set(hit)
    if not gone:
        return len(orders[0])
    return max(next(at for at, each in enumerate(order) if each in gone) for order in orders)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A mean over random runs, with its standard error."""

    mean: float
    error: float


def simulate_until_base(
    num_shards: int, orders: Sequence[Order], *, runs: int = 1_000, seed: int = 0
) -> Drawn:
    """Return the deletions until every shard serves the base alone."""
    draw, num_slices = np.random.default_rng(seed), len(orders[0])
    needed = np.zeros((num_shards, num_slices), dtype=bool)
    needed[:, [order[0] for order in orders]] = True
    chunk = math.ceil(needed.size * (1 + math.log(1 + needed.sum())))
    found = [_until_all(draw, needed.ravel(), chunk) for _ in range(runs)]
    return Drawn(float(np.mean(found)), float(np.std(found) / math.sqrt(runs)))


def _until_all(draw: np.random.Generator, needed: NDArray[np.bool_], chunk: int) -> float:
    left, before = needed.copy(), 0
    while True:
        cells, first = np.unique(draw.integers(len(left), size=chunk), return_index=True)
        wanted = left[cells]
        left[cells] = False
        if not left.any():
            return before + float(first[wanted].max()) + 1
        before += chunk
