"""Count the cost of training in record-epochs, and estimate its seconds.

A record-epoch is one presentation of one record to the trainer, so it does not depend on the machine.
Seconds are estimated from the stages that this model has measured.

>>> from sisa.core.domain import HeldCheckpoint
>>> old = HeldCheckpoint("k", 0, (0,), 1, "f", "m", "a", 10, seconds=4.0, record_epochs=8)
>>> estimate_seconds(6, [old])
3.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from sisa.core.domain import HeldCheckpoint, count_record_epochs
from sisa.planning.batching import ShardCosts
from sisa.planning.orders import Order, arranged
from sisa.planning.plan import Recipe, ShardView


def full_record_epochs(views: Iterable[ShardView], recipe: Recipe, others: Sequence[Order] = ()) -> int:
    """Return the record-epochs of training every shard from scratch in order 0 and in other orders.

    Stages of shared prefixes count once.
    """
    total = 0
    for view in views:
        sizes = {each.slice: each.num_records for each in view.slices}
        paths = [sorted(sizes), *(arranged(sizes, order)[:-1] for order in others)]
        stages = {
            tuple(path[:end]): cost
            for path in paths
            for end, cost in enumerate(_stage_record_epochs(path, sizes, recipe), start=1)
        }
        total += sum(stages.values())
    return total


def _stage_record_epochs(path: Iterable[int], sizes: Mapping[int, int], recipe: Recipe) -> list[int]:
    """Return the cost of each stage of some slices in an order; an empty slice has none."""
    costs, seen, highest = [], 0, 0
    for slice_ in path:
        seen = seen + sizes[slice_] if recipe.schedule == "cumulative" else sizes[slice_]
        highest = max(highest, slice_)
        costs.append(count_record_epochs(recipe.passes(highest), seen) if sizes[slice_] else 0)
    return costs


def suffix_record_epochs(sizes: Mapping[int, int], recipe: Recipe) -> list[int]:
    """Return the record-epochs of training a shard from each of its slices on, first slice first.

    `sizes` are the records of the slices, by the slices' numbers. An empty slice has no stage: its cost
    is that of the next slice.

    >>> suffix_record_epochs({0: 5, 1: 0, 2: 4}, Recipe(3, "cumulative", 4, {}, "base"))
    [28, 18, 18]
    """
    costs = _stage_record_epochs(sorted(sizes), sizes, recipe)
    return list(accumulate(reversed(costs)))[::-1]


def shard_costs(
    pending: float, sizes: Mapping[int, int], num_records: int, recipe: Recipe
) -> ShardCosts:
    """Return the costs of a shard for `batching.choose`.

    `pending` is the cost of the requests that wait in it, `num_records` the size of the whole model.
    """
    costs = map(float, suffix_record_epochs(sizes, recipe))
    shares = (sizes[slice_] / num_records for slice_ in sorted(sizes))
    return ShardCosts(pending, tuple(zip(costs, shares, strict=True)))


def estimate_seconds(epochs: int, measured: Iterable[HeldCheckpoint]) -> float | None:
    """Return the seconds of record-epochs on one worker, at the mean rate of measured stages."""
    stages = [each for each in measured if each.record_epochs and each.seconds]
    total = sum(each.record_epochs for each in stages)
    if not total:
        return None
    return epochs * sum(each.seconds for each in stages) / total
