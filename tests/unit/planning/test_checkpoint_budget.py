"""A budget for checkpoints: what is kept spares the most training, and the planner keeps within it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.domain import HeldCheckpoint, SliceState
from sisa.planning.checkpoint_budget import best_kept, expected, split_budget
from sisa.planning.orders import rotations
from sisa.planning.plan import Recipe, ShardPlan, ShardView, plan_shard

numbers = st.floats(0.1, 10)
stages_of = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6)


@given(stages_of)
def test_no_other_choice_spares_more(stages: list[tuple[float, float]]) -> None:
    costs, hits = zip(*stages, strict=True)
    found = best_kept(costs, hits)
    assert len(found) == len(costs)
    for number, kept in enumerate(found):
        assert len(kept.stages) == number
        every = combinations(range(len(costs) - 1), number)
        least = min(expected(costs, hits, each) for each in every)
        assert expected(costs, hits, kept.stages) == pytest.approx(least)
        assert sum(costs) * sum(hits) - kept.spared == pytest.approx(least)


@given(stages_of, stages_of, st.integers(0, 8), st.sets(st.integers(0, 5)))
def test_no_other_split_of_the_room_spares_more(
    one: list[tuple[float, float]], other: list[tuple[float, float]], room: int, held: set[int]
) -> None:
    orders = [
        best_kept([c for c, _ in one], [h for _, h in one], sorted(held)),
        best_kept([c for c, _ in other], [h for _, h in other]),
    ]
    first, second = split_budget(orders, room)[-1]
    assert len(first.stages) + len(second.stages) <= room
    assert set(first.stages) <= held
    splits = ((a, b) for a in orders[0] for b in orders[1] if len(a.stages) + len(b.stages) <= room)
    best = max(a.spared + b.spared for a, b in splits)
    assert first.spared + second.spared == pytest.approx(best)


def test_what_is_expected_is_what_is_drawn() -> None:
    draw = np.random.default_rng(0)
    costs, hits = (1.0, 2.0, 3.0, 4.0, 5.0), (0.1, 0.3, 0.1, 0.2, 0.3)
    kept = best_kept(costs, hits)[2].stages
    found = []
    for stage in draw.choice(5, size=20_000, p=hits):
        deepest = max((each for each in kept if each < stage), default=-1)
        found.append(sum(costs[deepest + 1 :]))
    assert np.mean(found) == pytest.approx(expected(costs, hits, kept), rel=0.03)


SLICES = tuple(SliceState(0, n, f"root{n}", 4) for n in range(6))


def planned(recipe: Recipe) -> tuple[ShardPlan, dict[str, tuple[int, ...]]]:
    """Return a whole shard, of 10 bytes a stage, and the prefixes of what it keeps."""
    whole = plan_shard(ShardView(0, SLICES, ()), replace(recipe, shard_budget=None), "f")
    held = [
        HeldCheckpoint(key, 0, job.prefix, 1, "f", "m", "a", 10, 1.0, 1)
        for key, job in whole.stages.items()
    ]
    found = plan_shard(ShardView(0, SLICES, tuple(held)), recipe, "f")
    return found, {each.key: each.prefix for each in held if each.key not in found.retired}


@pytest.mark.parametrize(("budget", "kept"), [(10**6, 6), (60, 6), (59, 5), (30, 3), (10, 1), (1, 1)])
def test_a_shard_keeps_as_many_as_fit_and_its_target(budget: int, kept: int) -> None:
    found, left = planned(Recipe(6, "sequential", 1, {}, "base", shard_budget=budget))
    assert len(left) == kept
    assert found.head.key in left
    assert found.head.converged


def test_who_is_likely_to_go_decides_what_is_kept() -> None:
    recipe = Recipe(6, "sequential", 1, {}, "base", shard_budget=20)
    even = planned(recipe)[1]
    late = planned(replace(recipe, risks=(0.01, 0.01, 0.01, 0.01, 0.01, 1.0)))[1]
    early = planned(replace(recipe, risks=(0.01, 1.0, 0.01, 0.01, 0.01, 0.01)))[1]
    assert sorted(map(len, even.values())) == [3, 6]
    assert sorted(map(len, late.values())) == [5, 6]
    assert sorted(map(len, early.values())) == [1, 6]


def test_the_last_stage_of_every_order_stays() -> None:
    recipe = Recipe(6, "cumulative", 2, {}, "base", rotations(6, 3)[1:], shard_budget=1)
    assert sorted(map(len, planned(recipe)[1].values())) == [5, 5, 6]
    more = planned(replace(recipe, shard_budget=50))[1]
    assert len(more) == 5


def test_while_anything_is_missing_nothing_is_dropped() -> None:
    recipe = Recipe(6, "sequential", 1, {}, "base", shard_budget=1)
    path = plan_shard(ShardView(0, SLICES, ()), recipe, "f").path
    held = [HeldCheckpoint(j.key, 0, j.prefix, 1, "f", "m", "a", 9, 1.0, 1) for j in path[:4]]
    assert plan_shard(ShardView(0, SLICES, tuple(held)), recipe, "f").retired == ()
