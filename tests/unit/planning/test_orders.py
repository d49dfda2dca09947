"""Orders: their form, what they share, and that matching serves the most slices after a deletion."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.domain import HeldCheckpoint, RecordRow, SliceState, record_epochs
from sisa.planning.bands import Bands
from sisa.planning.cost import full_record_epochs
from sisa.planning.orders import Order, arranged, chosen_orders, matched, rotations
from sisa.planning.plan import (
    Recipe,
    Schedule,
    ShardPlan,
    ShardView,
    gaps,
    jobs,
    plan_shard,
    tainted_checkpoints,
)
from tests.bench.deletion.serving import (
    deletions_until_base,
    depth_after,
    simulate_until_base,
)

schedules = st.sampled_from(["cumulative", "sequential"])


def states(*sizes: int) -> tuple[SliceState, ...]:
    return tuple(SliceState(0, n, f"root{n}", size) for n, size in enumerate(sizes) if size)


def recipe_of(num_slices: int, orders: tuple[Order, ...], schedule: Schedule = "cumulative") -> Recipe:
    return Recipe(num_slices, schedule, 3, {}, "base", orders[1:])


def trained(plan: ShardPlan) -> tuple[HeldCheckpoint, ...]:
    """Return everything that a plan wants, as held."""
    return tuple(
        HeldCheckpoint(key, 0, job.prefix, 1, job.fingerprint, "m", "a", 1, 1.0, 1)
        for key, job in plan.stages.items()
    )


def plan(recipe: Recipe, slices: tuple[SliceState, ...], *held: HeldCheckpoint) -> ShardPlan:
    return plan_shard(ShardView(0, slices, held), recipe, "f")


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_rotations_are_orders_that_begin_differently(sizes: tuple[int, int]) -> None:
    num_slices, num_orders = sizes
    found = rotations(num_slices, num_orders)
    assert found[0] == tuple(range(num_slices))
    assert len(found) == len({order[0] for order in found}) == num_orders
    assert all(sorted(order) == list(range(num_slices)) for order in found)


risks_of = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(risks_of.flatmap(lambda each: st.tuples(st.just(each), st.integers(1, len(each)))))
def test_matched_orders_are_orders_and_order_0_is_the_first(found: tuple[list[float], int]) -> None:
    risks, num_orders = found
    orders = matched(risks, num_orders)
    assert orders[0] == tuple(range(len(risks)))
    assert len(orders) == num_orders
    assert all(sorted(order) == list(range(len(risks))) for order in orders)


def served_after_one(orders: tuple[Order, ...], risks: tuple[float, ...]) -> float:
    return sum(risk * depth_after(orders, [slice_]) for slice_, risk in enumerate(risks))


@pytest.mark.parametrize("num_orders", [2, 3])
@settings(max_examples=20, deadline=None)
@given(risks=st.tuples(*[st.floats(0.01, 1)] * 4))
def test_no_other_orders_serve_more_after_one_deletion(
    num_orders: int, risks: tuple[float, ...]
) -> None:
    plain = tuple(range(4))
    others = product(permutations(plain), repeat=num_orders - 1)
    best = max(served_after_one((plain, *each), risks) for each in others)
    assert served_after_one(matched(risks, num_orders), risks) == pytest.approx(best)


def test_bands_choose_who_stands_late() -> None:
    bands = Bands(thresholds=(0.5,))  # slices 3 to 5 go most often, and order 0 has them late already
    assert chosen_orders(6, 2, None) == rotations(6, 2)
    _, other = chosen_orders(6, 2, bands)
    assert other.index(3) > 3, "the likeliest slice that order 0 serves worst stands late in the other"


def test_generations_follow_one_another() -> None:
    assert arranged(range(9), (2, 0, 1)) == [2, 0, 1, 5, 3, 4, 8, 6, 7]
    assert arranged([8, 1, 3, 2], (2, 0, 1)) == [2, 1, 3, 8]


def test_equal_prefixes_are_one_checkpoint() -> None:
    found = plan(recipe_of(4, ((0, 1, 2, 3), (0, 1, 3, 2))), states(2, 2, 2, 2))
    first, second = found.paths
    assert [a.key == b.key for a, b in zip(first, second, strict=False)] == [True, True, False]
    assert len(found.stages) == 5  # the last stage of another order is never a stage
    assert [job.prefix for job in found.missing[1].train] == [(0, 1, 3)]


@given(schedules, st.lists(st.integers(0, 5), min_size=3, max_size=8), st.integers(1, 3))
def test_no_key_names_its_order(schedule: Schedule, sizes: list[int], num_orders: int) -> None:
    """A stage depends on its own prefix, not on the order that reaches it; counts price it equally."""
    recipe = recipe_of(3, rotations(3, num_orders), schedule)
    slices = states(*sizes)
    found = plan(recipe, slices)
    by_prefix = {job.prefix: job for path in found.paths for job in path}
    assert len(by_prefix) == len(found.stages)
    assert found.path == jobs(0, slices, replace(recipe, other_orders=()), "f")
    priced = sum(record_epochs(job) for job in found.stages.values())
    view = ShardView(0, slices, ())
    assert full_record_epochs([view], recipe, recipe.other_orders) == priced
    assert priced - full_record_epochs([view], recipe) == found.record_epochs_others


@given(st.integers(2, 6), st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_the_planner_serves_the_deepest_prefix_that_nothing_hit(
    num_slices: int, num_orders: int, hit: list[int]
) -> None:
    """`depth_after`, on which closed forms and simulations rest, is what planner and taint do."""
    orders = rotations(num_slices, min(num_orders, num_slices))
    recipe, whole = recipe_of(num_slices, orders), [3] * num_slices
    held = trained(plan(recipe, states(*whole)))
    gone = [RecordRow("i", None, "r", "t", "text", 0, each % num_slices, 1, 1, 1) for each in hit]
    lost = set(tainted_checkpoints(held, gone))
    left = tuple(each for each in held if each.key not in lost)
    after = tuple(
        replace(s, root=s.root + "-", num_records=2) if s.slice in {r.slice for r in gone} else s
        for s in states(*whole)
    )
    found = plan(recipe, after, *left)
    assert found.head.depth == depth_after(orders, (row.slice for row in gone))
    assert gaps(found, {each.key for each in left}) == []


def test_at_equal_depth_order_0_heads() -> None:
    recipe = recipe_of(4, rotations(4, 2))
    slices = states(2, 2, 2, 2)
    stages = {each.prefix: each for each in trained(plan(recipe, slices))}
    later = replace(stages[2, 3], seq=9)
    found = plan(recipe, slices, stages[0, 1], later)
    assert (found.head.key, found.head.depth) == (stages[0, 1].key, 2)
    assert found.retired == ()
    assert plan(recipe, slices, later).head.key == later.key


def test_fewer_orders_retire_what_they_no_longer_need_and_more_retrain_nothing() -> None:
    slices = states(2, 2, 2, 2)
    one, two = recipe_of(4, rotations(4, 1)), recipe_of(4, rotations(4, 2))
    held = trained(plan(two, slices))
    fewer = plan(one, slices, *held)
    assert {each.prefix for each in held if each.key in fewer.retired} == {(2,), (2, 3), (2, 3, 0)}
    more = plan(two, slices, *trained(plan(one, slices)))
    assert more.train == ()
    assert more.head.converged
    assert [job.prefix for job in more.missing[1].train] == [(2,), (2, 3), (2, 3, 0)]


def test_other_orders_wait_for_the_environment_that_they_were_begun_in() -> None:
    slices, recipe = states(2, 2), recipe_of(2, rotations(2, 2))
    target = trained(plan(recipe, slices))[1]
    elsewhere = plan_shard(ShardView(0, slices, (target,)), recipe, "other")
    assert (elsewhere.train, len(elsewhere.missing)) == ((), 1)


@pytest.mark.parametrize(("shards", "slices", "orders"), [(3, 8, 1), (4, 8, 2), (8, 8, 4), (5, 6, 6)])
def test_deletions_until_the_base_as_the_collectors_form_says(
    shards: int, slices: int, orders: int
) -> None:
    """m L H(m B), of S3T (Chowdhury et al. 2025), within 3% of what is drawn."""
    drawn = simulate_until_base(shards, rotations(slices, orders), runs=4_000, seed=1)
    assert drawn.error < 0.012 * drawn.mean
    assert deletions_until_base(shards, slices, orders) == pytest.approx(drawn.mean, rel=0.03)
