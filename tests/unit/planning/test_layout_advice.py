"""Advice: its closed forms against replayed streams, and what it recommends within limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.domain import HeldCheckpoint, SliceJob, SliceState
from sisa.planning.deletion_stream import Group, replay_stream
from sisa.planning.layout_advice import (
    MIN_SHARD_RECORDS,
    Advice,
    Demand,
    LayoutLimits,
    advise,
    recommended,
    stream_of,
)
from sisa.planning.orders import chosen_orders
from sisa.planning.plan import Recipe, Schedule, ShardPlan, ShardView, plan_shard
from tests.bench.deletion.serving import depth_after

GROUPS = (Group(0.9, 0.01), Group(0.1, 0.5))
demands = st.builds(
    Demand,
    st.integers(1, 10**7),
    st.floats(0.1, 1e4),
    st.sampled_from(["cumulative", "sequential"]),
    st.integers(1, 9),
    st.sampled_from([(Group(1.0, 1.0),), GROUPS]),
)


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
@pytest.mark.parametrize("groups", [(Group(1.0, 1.0),), GROUPS])
def test_forms_agree_with_replayed_streams_within_three_percent(
    schedule: Schedule, groups: tuple[Group, ...]
) -> None:
    """A month of 64 deletions, over many months' worth of them, each alone and as batches of a month."""
    demand = Demand(10_000_000, 64, schedule, 3, groups)
    months = 1000
    for advice in advise(demand, LayoutLimits(1)):
        if (advice.num_shards, advice.num_slices) not in ((16, 3), (128, 8)) or advice.num_orders > 1:
            continue
        stream = stream_of(demand, advice.num_shards, advice.num_slices)
        even = demand.num_records * demand.num_epochs
        alone = replay_stream(stream, demand.num_records, 64 * months, seed=1).record_epochs
        assert alone / even / months == pytest.approx(advice.one_by_one, rel=0.03)
        batched = replay_stream(stream, demand.num_records, 64 * months, batch=64, seed=1).record_epochs
        assert batched / even / months == pytest.approx(advice.together, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(demands, st.floats(1, 1e12))
def test_what_is_recommended_is_within_the_limits_and_the_cheapest_there(
    demand: Demand, max_bytes: float
) -> None:
    advised = advise(demand, LayoutLimits(1_000_000, max_bytes))
    best = recommended(advised)
    within = [each for each in advised if each.stored_bytes <= max_bytes]
    assert (best is None) == (not within)
    if best is not None:
        assert best in within
        assert total(best) == min(total(each) for each in within)
        assert best.num_orders == 1, "further orders cost training, and nothing was asked of them"
    assert all(each.together <= each.one_by_one * (1 + 1e-9) for each in advised)
    assert all(each.num_kept == sum(map(len, each.kept)) for each in advised)
    most = max(each.num_shards for each in advised)
    assert most == 1 or demand.num_records / most >= MIN_SHARD_RECORDS


def total(advice: Advice) -> float:
    return advice.one_by_one + advice.others_one_by_one


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
@pytest.mark.parametrize("groups", [(Group(1.0, 1.0),), GROUPS])
@pytest.mark.parametrize("num_bytes", [math.inf, 64 * 6])
def test_orders_and_kept_checkpoints_agree_with_the_planner_within_three_percent(
    schedule: Schedule, groups: tuple[Group, ...], num_bytes: float
) -> None:
    """The planner retrains a shard after a deletion from each of its slices, weighed by the chance of
    it."""
    demand = Demand(64 * 8_000, 1.0, schedule, 3, groups)
    for advice in advise(demand, LayoutLimits(1, num_bytes)):
        if (advice.num_shards, advice.num_slices) != (64, 8):
            continue
        stream = stream_of(demand, 1, 8)
        orders = chosen_orders(8, advice.num_orders, stream.layout.bands)
        recipe = Recipe(8, schedule, 3, {}, "base", orders[1:])
        sizes = [round(8_000 * share) for share in stream.held]
        whole = _plan(recipe, sizes)
        held = {path[n].key for path, kept in zip(whole.paths, advice.kept, strict=True) for n in kept}
        assert len(held) <= advice.num_kept
        first = others = depth = 0.0
        for slice_, hit in enumerate(stream.hits):
            clean = [
                job for key, job in whole.stages.items() if key in held and slice_ not in job.prefix
            ]
            after = [size - (n == slice_) for n, size in enumerate(sizes)]
            plan = _plan(recipe, after, clean, hit=slice_)
            first += hit * plan.record_epochs
            others += hit * plan.record_epochs_others
            depth += hit * plan.head.depth / 8
        even = demand.num_records * demand.num_epochs
        assert first / even == pytest.approx(advice.one_by_one, rel=0.03)
        assert others / even == pytest.approx(advice.others_one_by_one, rel=0.03)
        assert depth == pytest.approx(advice.serving_depth, rel=0.03)


def _plan(recipe: Recipe, sizes: list[int], clean: Sequence[SliceJob] = (), hit: int = -1) -> ShardPlan:
    held = [HeldCheckpoint(j.key, 0, j.prefix, 1, "f", "m", "a", 1, 1.0, 1) for j in clean]
    states = [SliceState(0, n, f"root{n}{'-' * (n == hit)}", size) for n, size in enumerate(sizes)]
    return plan_shard(ShardView(0, tuple(states), tuple(held)), recipe, "f")


def test_what_must_be_served_asks_for_orders() -> None:
    demand = Demand(100_000, 10.0)
    deep = recommended(advise(demand, LayoutLimits(1, min_depth=0.75)))
    assert deep is not None
    assert deep.num_orders > 1
    assert deep.serving_depth >= 0.75
    assert recommended(advise(demand, LayoutLimits(1, min_depth=1.0))) is None
    for each in advise(demand, LayoutLimits(1)):
        orders = chosen_orders(each.num_slices, each.num_orders, None)
        depths = [depth_after(orders, [number]) for number in range(each.num_slices)]
        assert each.serving_depth == pytest.approx(fmean(depths) / each.num_slices)


def test_hours_bind_only_with_a_rate() -> None:
    demand = Demand(100_000, 10.0)
    assert all(math.isnan(each.hours_to_utility) for each in advise(demand, LayoutLimits(1)))
    timed = advise(demand, LayoutLimits(1, max_hours=1.0, record_epochs_per_s=10.0))
    assert any("hours" in each.over for each in timed)
    best = recommended(timed)
    assert best is not None
    assert best.hours_to_utility <= 1.0
    assert best.training_hours == pytest.approx(300_000 / 36_000)


def test_likely_groups_get_bands_where_slices_suffice() -> None:
    advised = advise(Demand(100_000, 10.0, "sequential", 3, GROUPS), LayoutLimits(1))
    assert {each.num_slices for each in advised if not each.thresholds} == {1}
    assert {each.thresholds for each in advised if each.num_slices > 1} == {(0.5,)}


@pytest.mark.parametrize("num_records", [1, 10, 100, 5_000])
def test_no_slice_is_recommended_that_would_hold_nothing(num_records: int) -> None:
    for each in advise(Demand(num_records, 1.0), LayoutLimits(1)):
        assert each.num_shards * each.num_slices <= num_records
        assert each.training >= 1 - 1e-9
    hours = advise(Demand(num_records, 1.0), LayoutLimits(1, record_epochs_per_s=2.0))[0]
    assert hours.hours_to_utility * 7200 == pytest.approx(hours.record_epochs_to_utility)
