"""Advice: its closed forms against replayed streams, and what it recommends within limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.advice import MIN_SHARD_RECORDS, Demand, Limits, advise, recommended, stream_of
from sisa.plan import Schedule
from sisa.stream import Group, replay

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
    for advice in advise(demand, Limits(1)):
        if (advice.num_shards, advice.num_slices) not in ((16, 3), (128, 8)):
            continue
        stream = stream_of(demand, advice.num_shards, advice.num_slices)
        even = demand.num_records * demand.num_epochs
        alone = replay(stream, demand.num_records, 64 * months, seed=1).record_epochs
        assert alone / even / months == pytest.approx(advice.one_by_one, rel=0.03)
        batched = replay(stream, demand.num_records, 64 * months, batch=64, seed=1).record_epochs
        assert batched / even / months == pytest.approx(advice.together, rel=0.03)


@given(demands, st.floats(1, 1e12))
def test_what_is_recommended_is_within_the_limits_and_the_cheapest_there(
    demand: Demand, max_bytes: float
) -> None:
    advised = advise(demand, Limits(1_000_000, max_bytes))
    best = recommended(advised)
    within = [each for each in advised if each.stored_bytes <= max_bytes]
    assert (best is None) == (not within)
    if best is not None:
        assert best in within
        assert best.one_by_one == min(each.one_by_one for each in within)
    assert all(each.together <= each.one_by_one * (1 + 1e-9) for each in advised)
    most = max(each.num_shards for each in advised)
    assert most == 1 or demand.num_records / most >= MIN_SHARD_RECORDS


def test_hours_bind_only_with_a_rate() -> None:
    demand = Demand(100_000, 10.0)
    assert all(math.isnan(each.hours_to_utility) for each in advise(demand, Limits(1)))
    timed = advise(demand, Limits(1, max_hours=1.0, record_epochs_per_s=10.0))
    assert any("hours" in each.over for each in timed)
    best = recommended(timed)
    assert best is not None
    assert best.hours_to_utility <= 1.0
    assert best.training_hours == pytest.approx(300_000 / 36_000)


def test_likely_groups_get_bands_where_slices_suffice() -> None:
    advised = advise(Demand(100_000, 10.0, "sequential", 3, GROUPS), Limits(1))
    assert {each.num_slices for each in advised if not each.thresholds} == {1}
    assert {each.thresholds for each in advised if each.num_slices > 1} == {(0.5,)}
