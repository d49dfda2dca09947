"""Simulated training: nothing is trained twice or left out, and deaths cost no more than they must."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.scale.simulate import Fleet, simulate

CALM = Fleet(num_workers=3, record_epochs_per_s=2.0, start_s=1.0)
tasks = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=30)
workers = st.integers(1, 8)


def total_s(some: list[list[int]], fleet: Fleet) -> float:
    return sum(map(sum, some)) / fleet.record_epochs_per_s


@given(tasks, workers)
def test_without_deaths_each_task_runs_once_within_the_bounds_of_list_scheduling(
    some: list[list[int]], num_workers: int
) -> None:
    """Graham 1969: no list schedule ends later than the mean load plus the longest task."""
    fleet = replace(CALM, num_workers=num_workers)
    ran = simulate(some, fleet, seed=0)
    longest = max(map(sum, some)) / fleet.record_epochs_per_s + fleet.start_s
    load = total_s(some, fleet) + len(some) * fleet.start_s
    assert ran.num_deaths == 0
    assert ran.busy_s == pytest.approx(total_s(some, fleet))
    assert ran.lost_s == pytest.approx(len(some) * fleet.start_s)
    assert max(longest, load / num_workers) <= ran.makespan_s + 1e-6
    assert ran.makespan_s <= load / num_workers + longest + 1e-6
    assert ran.given_up == ()
    assert 0 < ran.utilisation <= 1


@given(tasks, workers, st.integers(0, 9), st.floats(30, 3000))
def test_with_deaths_what_is_kept_is_the_same_and_what_is_lost_is_more(
    some: list[list[int]], num_workers: int, seed: int, mean_life_s: float
) -> None:
    fleet = replace(CALM, num_workers=num_workers, mean_life_s=mean_life_s, max_retries=10**6)
    ran = simulate(some, fleet, seed)
    assert ran.given_up == ()
    assert ran.busy_s == pytest.approx(total_s(some, fleet))
    assert ran.lost_s >= len(some) * fleet.start_s - 1e-6
    assert ran.busy_s + ran.lost_s <= ran.makespan_s * num_workers + 1e-6
    assert ran == simulate(some, fleet, seed)


def test_a_finished_stage_is_not_lost_with_its_worker() -> None:
    """Stages as long as a worker lives: a task of many gets through, one as long as all does not."""
    fleet = Fleet(1, 1.0, start_s=0.0, mean_life_s=100.0, replace_s=0.0, max_retries=5)
    assert simulate([[50] * 100], fleet, seed=1).given_up == ()
    whole = simulate([[5000]], fleet, seed=1)
    assert whole.given_up == (0,)
    assert whole.num_deaths == 6  # the first attempt and five more
    assert whole.finished_s == (math.inf,)


def test_lost_time_is_what_a_memoryless_life_costs() -> None:
    """Until a stage of d seconds is through, a worker of mean life m spends m (exp(d/m) - 1)."""
    length, life = 100, 50.0
    fleet = Fleet(50, 1.0, start_s=0.0, mean_life_s=life, replace_s=0.0, max_retries=10**6)
    ran = simulate([[length]] * 20_000, fleet, seed=3)
    expected = life * (math.exp(length / life) - 1)
    assert (ran.busy_s + ran.lost_s) / 20_000 == pytest.approx(expected, rel=0.03)


def test_a_dead_workers_place_stays_empty_for_a_while() -> None:
    fleet = Fleet(1, 1.0, start_s=0.0, mean_life_s=40.0, replace_s=1000.0, max_retries=10**6)
    ran = simulate([[10] * 20], fleet, seed=2)
    assert ran.num_deaths > 0
    assert ran.makespan_s == pytest.approx(ran.busy_s + ran.lost_s + 1000 * ran.num_deaths)


def test_nothing_to_train_takes_no_time() -> None:
    assert simulate([], CALM, seed=0).makespan_s == 0.0
    assert simulate([], CALM, seed=0).utilisation == 1.0
