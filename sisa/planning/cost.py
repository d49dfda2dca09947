"""Costs of plans: record-epochs, and seconds estimated from this model's measured stages.

A record-epoch is one presentation of one record to the trainer. Layouts and deletions are compared in
this unit, since it does not depend on the machine. Seconds are an estimate from the ledger's own
measurements, and None before there are any.

>>> from sisa.core.domain import HeldCheckpoint
>>> old = HeldCheckpoint("k", 0, (0,), 1, "f", "m", "a", 10, seconds=4.0, record_epochs=8)
>>> estimate_seconds(6, [old])
3.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from sisa.core.domain import Head, HeldCheckpoint, presentations
from sisa.planning.batching import ShardCosts
from sisa.planning.orders import arranged
from sisa.planning.plan import Recipe, ShardPlan, ShardView


def full_record_epochs(views: Iterable[ShardView], recipe: Recipe) -> int:
    """Return the record-epochs of training every shard from scratch."""
    sizes = ({each.slice: each.num_records for each in view.slices} for view in views)
    return sum(suffix_record_epochs(each, recipe)[0] for each in sizes if each)


def orders_record_epochs(views: Iterable[ShardView], recipe: Recipe) -> int:
    """Return the record-epochs of training every shard from scratch in all of its orders.

    Stages of shared prefixes count once; with one order the result is that of `full_record_epochs`.
    """
    return sum(_orders_of_shard({e.slice: e.num_records for e in view.slices}, recipe) for view in views)


def _orders_of_shard(sizes: Mapping[int, int], recipe: Recipe) -> int:
    filled = [slice_ for slice_, size in sizes.items() if size]
    others = (arranged(filled, order)[:-1] for order in recipe.orders)
    paths = [arranged(filled, ()), *others]
    stages = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    return sum(_stage_record_epochs(stage, sizes, recipe) for stage in stages)


def _stage_record_epochs(prefix: tuple[int, ...], sizes: Mapping[int, int], recipe: Recipe) -> int:
    seen = prefix if recipe.schedule == "cumulative" else prefix[-1:]
    return presentations(recipe.passes(max(prefix)), sum(sizes[slice_] for slice_ in seen))


def serving_depth(heads: Iterable[Head], views: Iterable[ShardView]) -> float:
    """Return the mean share of their slices that shards with records serve; 1 without such shards."""
    whole = {view.shard: len(view.slices) for view in views if view.slices}
    shares = [min(1.0, each.depth / whole[each.shard]) for each in heads if each.shard in whole]
    return sum(shares) / len(shares) if shares else 1.0


def suffix_record_epochs(sizes: Mapping[int, int], recipe: Recipe) -> list[int]:
    """Return the record-epochs of training a shard from each of its slices on, first slice first.

    `sizes` are the records of the slices, by the slices' numbers. An empty slice has no stage: its cost
    is that of the next slice.

    >>> suffix_record_epochs({0: 5, 1: 0, 2: 4}, Recipe(3, "cumulative", 4, {}, "base"))
    [28, 18, 18]
    """
    costs, seen = [], 0
    for slice_, size in sorted(sizes.items()):
        seen = seen + size if recipe.schedule == "cumulative" else size
        costs.append(presentations(recipe.passes(slice_), seen) if size else 0)
    return list(accumulate(reversed(costs)))[::-1]


def shard_costs(
    pending: float, sizes: Mapping[int, int], num_records: int, recipe: Recipe
) -> ShardCosts:
    """Return the costs of a shard for `batching.choose`.

    `pending` is the cost of the requests that wait in it, `num_records` the size of the whole model.
    """
    costs = suffix_record_epochs(sizes, recipe)
    counts = [size for _, size in sorted(sizes.items())]
    return ShardCosts(
        pending,
        tuple((float(cost), size / num_records) for cost, size in zip(costs, counts, strict=True)),
    )


def plan_record_epochs(plans: Iterable[ShardPlan]) -> int:
    """Return the record-epochs that the plans will train."""
    return sum(plan.record_epochs for plan in plans)


def estimate_seconds(epochs: int, measured: Iterable[HeldCheckpoint]) -> float | None:
    """Return the seconds that one worker needs for `epochs` record-epochs.

    The rate is the mean of the measured stages; None without any.
    """
    stages = [each for each in measured if each.record_epochs and each.seconds]
    total = sum(each.record_epochs for each in stages)
    if not total:
        return None
    return epochs * sum(each.seconds for each in stages) / total
