"""Deletion streams by counts: as the planner prices them one by one, and as the closed forms expect."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.planning.bands import Bands
from sisa.planning.cost import suffix_record_epochs
from sisa.planning.deletion_stream import Group, Stream, points_one_by_one, replay_stream
from sisa.planning.layout import Layout
from sisa.planning.plan import Recipe, Schedule

schedules = st.sampled_from(["cumulative", "sequential"])
layouts = st.builds(Layout, st.integers(1, 6), st.integers(1, 5))
streams = st.builds(Stream, layouts, schedules, st.integers(1, 7))


def slowly(stream: Stream, num_records: int, num_deletions: int, batch: int, seed: int) -> int:
    """Run the same stream a batch at a time, priced as plans are."""
    draw = np.random.default_rng(seed)
    layout = stream.layout
    cells = layout.num_shards * layout.num_slices
    flat = draw.multinomial(num_records, np.full(cells, 1 / cells)).astype(np.int64)
    gone = draw.multivariate_hypergeometric(flat, num_deletions, method="marginals")
    where = draw.permutation(np.repeat(np.arange(cells), gone))
    sizes = flat.reshape(layout.num_shards, layout.num_slices).tolist()
    recipe = Recipe(layout.num_slices, stream.schedule, stream.num_epochs, {}, "base")
    cost = 0
    for start in range(0, num_deletions, batch):
        first: dict[int, int] = {}
        for cell in where[start : start + batch].tolist():
            shard, slice_ = divmod(cell, layout.num_slices)
            sizes[shard][slice_] -= 1
            first[shard] = min(slice_, first.get(shard, slice_))
        for shard, slice_ in first.items():
            cost += suffix_record_epochs(dict(enumerate(sizes[shard])), recipe)[slice_]
    return cost


@given(streams, st.integers(0, 60), st.integers(0, 60), st.integers(1, 7), st.integers(0, 99))
def test_counting_gives_what_the_planner_prices_one_by_one(
    stream: Stream, num_records: int, num_deletions: int, batch: int, seed: int
) -> None:
    num_deletions = min(num_deletions, num_records)
    found = replay_stream(stream, num_records, num_deletions, batch=batch, seed=seed)
    assert found.record_epochs == slowly(stream, num_records, num_deletions, batch, seed)
    assert found.num_runs <= num_deletions


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
@pytest.mark.parametrize(("num_shards", "num_slices"), [(1, 1), (1, 10), (20, 1), (50, 5), (8, 20)])
@pytest.mark.parametrize("batch", [1, 10, 100])
def test_closed_forms_agree_with_replayed_streams_within_three_percent(
    num_shards: int, num_slices: int, schedule: Schedule, batch: int
) -> None:
    found = replay_stream(
        Stream(Layout(num_shards, num_slices), schedule), 200_000, 4_000, batch=batch, seed=5
    )
    assert found.record_epochs == pytest.approx(found.expected_record_epochs, rel=0.03)


def points_at_once(num_records: int, num_shards: int, num_deletions: float) -> float:
    """Return the expected points that K requests carried out together retrain, without slices."""
    spared = math.pow(1 - 1 / num_shards, num_deletions)
    return num_records * (1 - spared) - num_deletions


def test_points_of_sharding_alone_are_the_papers() -> None:
    """Bourtoule et al. 2021, section V: sums written out for small cases."""
    assert points_one_by_one(100, 10, 1) == pytest.approx(100 / 10 - 1)
    two = (100 / 10 - 1) + (99 / 10 - 1)  # the second falls into a shard that lost a tenth of one
    assert points_one_by_one(100, 10, 2) == pytest.approx(two)
    assert points_at_once(100, 10, 1) == pytest.approx(9)
    assert points_at_once(100, 1, 7) == 93
    one_by_one = [
        replay_stream(Stream(Layout(10, 1), "cumulative", 1), 1000, 50, seed=s) for s in range(40)
    ]
    mean = float(np.mean([each.record_epochs for each in one_by_one]))
    in_large_ones = 50 * (1 - 1 / 10)
    assert mean == pytest.approx(points_one_by_one(1000, 10, 50) + in_large_ones, rel=0.01)
    at_once = [
        replay_stream(Stream(Layout(10, 1), "cumulative", 1), 1000, 8, batch=8, seed=s)
        for s in range(300)
    ]
    mean = float(np.mean([each.record_epochs for each in at_once]))
    assert mean == pytest.approx(points_at_once(1000, 10, 8), rel=0.03)


@given(st.integers(1, 40), schedules, st.floats(0, 50), st.floats(0, 50))
def test_a_batchs_share_grows_with_it_from_nothing_to_the_whole_shard(
    num_slices: int, schedule: Schedule, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    stream = Stream(Layout(7, num_slices), schedule)
    assert 0 <= stream.batch_share(low) <= stream.batch_share(high) + 1e-12
    assert stream.batch_share(high) <= 1 + 1e-9
    assert stream.batch_share(1e-6) / 1e-6 == pytest.approx(stream.one_share, rel=1e-3)
    r = num_slices
    papers = 2 / 3 + 1 / (3 * r) if schedule == "cumulative" else (r + 1) / (2 * r)
    assert stream.one_share == pytest.approx(papers)
    assert stream.epochs == pytest.approx(3)


def test_more_together_cost_less_each() -> None:
    stream = Stream(Layout(50, 5))
    costs: Sequence[int] = [
        replay_stream(stream, 100_000, 2_000, batch=batch).record_epochs for batch in (1, 10, 100, 2_000)
    ]
    assert sorted(costs, reverse=True) == list(costs)
    assert stream.expected(100_000, 2_000, 100) < stream.expected(100_000, 2_000)


def test_nothing_deleted_costs_nothing() -> None:
    found = replay_stream(Stream(Layout(3, 3)), 30, 0)
    assert (found.record_epochs, found.num_runs, found.expected_record_epochs) == (0, 0, 0.0)


GROUPS = (Group(0.8, 0.01), Group(0.15, 0.1), Group(0.05, 1.0))
BANDED = Layout(200, 6, Bands(thresholds=(0.1, 1.0)))


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
@pytest.mark.parametrize("layout", [BANDED, Layout(200, 6)])
@pytest.mark.parametrize("batch", [1, 200])
def test_forms_hold_for_unequal_risks_with_and_without_bands(
    schedule: Schedule, layout: Layout, batch: int
) -> None:
    stream = Stream(layout, schedule, 3, GROUPS)
    found = replay_stream(stream, 100_000_000, 100_000, batch=batch, seed=7)
    assert found.record_epochs == pytest.approx(found.expected_record_epochs, rel=0.03)
    assert found.full_record_epochs == pytest.approx(100_000_000 * stream.epochs, rel=0.001)


def test_bands_spare_most_of_the_cost_of_likely_deletions() -> None:
    plain, banded = (Stream(each, "cumulative", 3, GROUPS) for each in (Layout(200, 6), BANDED))
    assert banded.one_share < 0.65 * plain.one_share
    assert banded.hits[-2:].sum() > 0.5
    assert banded.held[:2].sum() == pytest.approx(0.8)


def test_more_than_ever_asked_for_can_not_be_deleted() -> None:
    groups = (Group(0.5, 0.0), Group(0.5, 1.0))
    with pytest.raises(ValueError, match="more deletions than records"):
        replay_stream(Stream(Layout(1, 2, Bands(thresholds=(1.0,))), "cumulative", 3, groups), 100, 90)


def test_a_batch_of_more_than_all_deletions_is_one_batch() -> None:
    stream = Stream(Layout(3, 3))
    found = replay_stream(stream, 3_000, 50, batch=10**12)
    assert found == replay_stream(stream, 3_000, 50, batch=50)
    assert stream.expected(3_000, 50, 10**12) == stream.expected(3_000, 50, 50) > 0
    assert stream.expected(3_000, 1, 9) == stream.expected(3_000, 1)


def test_more_records_than_can_be_drawn_in_one_piece_are_counted_too() -> None:
    found = replay_stream(Stream(Layout(50, 4)), 3 * 10**9, 5_000, seed=3)
    assert found.record_epochs == pytest.approx(found.expected_record_epochs, rel=0.03)


def test_a_million_deletions_of_a_hundred_million_records_take_less_than_a_minute() -> None:
    began = time.process_time()
    found = replay_stream(Stream(Layout(10_000, 5)), 100_000_000, 1_000_000)
    assert found.num_runs == 1_000_000
    assert time.process_time() - began < 60
