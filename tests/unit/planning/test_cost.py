"""Costs: record-epochs come from the jobs that would be trained, seconds from measurement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.domain import HeldCheckpoint, SliceState
from sisa.planning.cost import estimate_seconds, full_record_epochs
from sisa.planning.plan import Recipe, ShardView, plan_shard

RECIPE = Recipe(3, "cumulative", 2, {}, "base")


def measured(seconds: float, epochs: int) -> HeldCheckpoint:
    return HeldCheckpoint("k", 0, (0,), 1, "f", "m", "a", 1, seconds, epochs)


def view(shard: int, *sizes: int) -> ShardView:
    slices = [SliceState(shard, number, "root", size) for number, size in enumerate(sizes) if size]
    return ShardView(shard, tuple(slices), ())


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4))
def test_training_from_nothing_costs_the_full_price(sizes: list[list[int]]) -> None:
    views = [view(shard, *each) for shard, each in enumerate(sizes)]
    plans = [plan_shard(each, RECIPE, "f") for each in views]
    assert sum(each.record_epochs for each in plans) == full_record_epochs(views, RECIPE)


def test_golden_price() -> None:
    """2 epochs, 3 slices: one pass over 4, 8 and 12 records."""
    assert full_record_epochs([view(0, 4, 4, 4), view(1, 0, 5)], RECIPE) == 24 + 5


def test_seconds_follow_the_mean_rate_of_all_stages() -> None:
    assert estimate_seconds(30, [measured(2.0, 10), measured(8.0, 40)]) == pytest.approx(6.0)
    assert estimate_seconds(0, [measured(2.0, 10)]) == 0


@pytest.mark.parametrize("stages", [[], [measured(0.0, 0)], [measured(0.0, 5), measured(1.0, 0)]])
def test_without_a_measurement_there_is_no_estimate(stages: list[HeldCheckpoint]) -> None:
    """Stages adopted after a crash have no time of their own and must not dilute the rate."""
    assert estimate_seconds(9, stages) is None
    assert estimate_seconds(4, [*stages, measured(2.0, 4)]) == 2.0
