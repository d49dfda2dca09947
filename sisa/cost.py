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

from collections.abc import Iterable

from sisa.domain import HeldCheckpoint, presentations
from sisa.plan import Recipe, ShardPlan, ShardView, passes, stage_sizes


def full_record_epochs(views: Iterable[ShardView], recipe: Recipe) -> int:
    """Record-epochs of training every shard from scratch."""
    share = passes(recipe.schedule, recipe.num_epochs, recipe.num_slices)
    sizes = (size for view in views for size in stage_sizes(view.slices, recipe.schedule))
    return sum(presentations(share, size) for size in sizes)


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
