"""What a plan costs: record-epochs, and seconds estimated from what this model's stages took.

Rules: pure. A record-epoch is one presentation of one record to the trainer; it is the unit in which
layouts and deletions are compared, since it does not depend on the machine. Seconds are an estimate
from the ledger's own measurements and None before there are any.

Not covered: closed forms for streams of deletions.

>>> from sisa.domain import HeldCheckpoint
>>> old = HeldCheckpoint("k", 0, 0, 1, "f", "m", "a", 10, seconds=4.0, record_epochs=8)
>>> estimate_seconds(6, [old])
3.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from sisa.domain import HeldCheckpoint, presentations
from sisa.plan import Recipe, ShardPlan, ShardView
from sisa.schedule import ShardCosts


def full_record_epochs(views: Iterable[ShardView], recipe: Recipe) -> int:
    """Record-epochs of training every shard from scratch."""
    sizes = ({each.slice: each.num_records for each in view.slices} for view in views)
    return sum(suffix_record_epochs(each, recipe)[0] for each in sizes if each)


def suffix_record_epochs(sizes: Mapping[int, int], recipe: Recipe) -> list[int]:
    """Record-epochs of training a shard from each of its slices on, first slice first.

    `sizes` are the records of the slices, by the slices' numbers. An empty slice is no stage: from it
    costs what the next one does.

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
    """What the schedule of requests must know of a shard: the cost of what waits in it, and of each of
    its slices with its share of the model's `num_records`."""
    costs = suffix_record_epochs(sizes, recipe)
    counts = [size for _, size in sorted(sizes.items())]
    return ShardCosts(
        pending,
        tuple((float(cost), size / num_records) for cost, size in zip(costs, counts, strict=True)),
    )


def plan_record_epochs(plans: Iterable[ShardPlan]) -> int:
    """Record-epochs that the plans will train."""
    return sum(plan.record_epochs for plan in plans)


def estimate_seconds(epochs: int, measured: Iterable[HeldCheckpoint]) -> float | None:
    """Seconds of one worker for `epochs` record-epochs, by the mean rate of measured stages."""
    stages = [each for each in measured if each.record_epochs and each.seconds]
    total = sum(each.record_epochs for each in stages)
    if not total:
        return None
    return epochs * sum(each.seconds for each in stages) / total
