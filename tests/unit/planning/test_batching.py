"""When requests run: the price of waiting against its definition, and due dates that no price can move.

The price is compared with a simulation of what it is the expectation of: arrivals that hit slices.
"""

from __future__ import annotations

import math
import random
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.planning.batching import MARGIN_DAYS, WORTH_WAITING, ShardCosts, choose, price

DAY = "2026-01-31"
NUM_DRAWS = 4_000


@st.composite
def models(draw: st.DrawFn) -> list[ShardCosts]:
    """Draw shards whose slices share all records, with costs falling from the first slice on."""
    num_shards, num_slices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 50), min_size=num_slices, max_size=num_slices)
    records = draw(st.lists(weights, min_size=num_shards, max_size=num_shards))
    total = sum(map(sum, records)) or 1
    shards = []
    for of_shard in records:
        costs = [float(sum(of_shard[position:])) for position in range(num_slices)]
        pending = draw(st.sampled_from([0.0, *costs]))
        pairs = zip(costs, of_shard, strict=True)
        shards.append(ShardCosts(pending, tuple((cost, size / total) for cost, size in pairs)))
    return shards


arrivals = st.one_of(st.integers(0, 1_000).map(float), st.floats(0, 1_000))


@given(models(), arrivals)
def test_waiting_never_costs_more(shards: list[ShardCosts], expected: float) -> None:
    now, waiting = price(shards, expected)
    pending = sum(shard.pending for shard in shards)
    assert now >= waiting - 1e-9
    assert waiting >= pending - 1e-9
    assert now >= pending - 1e-9


@given(models())
def test_with_nobody_to_wait_for_the_prices_are_equal(shards: list[ShardCosts]) -> None:
    pending = sum(shard.pending for shard in shards)
    now, waiting = price(shards, 0.0)
    assert now == waiting == pytest.approx(pending)


@given(models(), st.integers(0, 50))
def test_more_arrivals_cost_more(shards: list[ShardCosts], num: int) -> None:
    fewer, more = price(shards, float(num)), price(shards, float(num + 1))
    assert all(one <= other + 1e-9 for one, other in zip(fewer, more, strict=True))


@given(models(), arrivals)
def test_waiting_saves_nothing_where_nothing_is_pending(
    shards: list[ShardCosts], expected: float
) -> None:
    idle = [ShardCosts(0.0, shard.suffixes) for shard in shards]
    now, waiting = price(idle, expected)
    assert now == pytest.approx(waiting)


def simulated(
    shards: list[ShardCosts], num: int, dice: random.Random
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (mean, standard error) of running now and then, and of waiting, for `num` arrivals."""
    places = [(s, position) for s, shard in enumerate(shards) for position in range(len(shard.suffixes))]
    shares = [shards[s].suffixes[position][1] for s, position in places]
    costs: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_DRAWS):
        hit: dict[int, int] = {}
        for s, position in dice.choices(places, shares, k=num):
            hit[s] = min(position, hit.get(s, position))
        later = {s: shards[s].suffixes[position][0] for s, position in hit.items()}
        costs[0].append(sum(shard.pending for shard in shards) + sum(later.values()))
        costs[1].append(sum(max(shard.pending, later.get(s, 0.0)) for s, shard in enumerate(shards)))
    means = [sum(each) / NUM_DRAWS for each in costs]
    errors = [
        math.sqrt(sum((x - mean) ** 2 for x in each) / (NUM_DRAWS - 1) / NUM_DRAWS)
        for each, mean in zip(costs, means, strict=True)
    ]
    return (means[0], errors[0]), (means[1], errors[1])


UNEVEN = [
    ShardCosts(12.0, ((30.0, 0.2), (12.0, 0.1), (5.0, 0.05))),
    ShardCosts(0.0, ((8.0, 0.05), (3.0, 0.15))),
    ShardCosts(20.0, ((20.0, 0.15), (6.0, 0.3))),
]


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7, 40])
def test_the_prices_are_those_of_simulated_arrivals(num: int) -> None:
    found = price(UNEVEN, float(num))
    for priced, (mean, error) in zip(found, simulated(UNEVEN, num, random.Random(num)), strict=True):
        assert abs(priced - mean) <= 4.5 * error + 1e-6, (priced, mean, error)


def due_in(left: int) -> date:
    return date.fromisoformat(DAY) + timedelta(days=left)


waiting_requests = st.lists(st.integers(-60, 120), min_size=1, max_size=6).map(
    lambda days: [(f"req-{n}", left) for n, left in enumerate(sorted(days))]
)


@given(waiting_requests, models(), st.floats(0, 100))
def test_no_price_makes_it_wait_past_a_due_date(
    requests: list[tuple[str, int]], shards: list[ShardCosts], per_day: float
) -> None:
    found = choose(requests, shards, per_day, DAY)
    first_due = min(due_in(left) for _, left in requests)
    assert found.requests == tuple(name for name, _ in requests)
    assert found.run_by is not None
    run_by = date.fromisoformat(found.run_by)
    assert run_by >= date.fromisoformat(DAY)
    if found.choice == "wait":
        assert date.fromisoformat(DAY) < run_by <= first_due - timedelta(days=MARGIN_DAYS)
        assert found.cost_now - found.cost_waiting >= WORTH_WAITING * found.cost_now > 0
    else:
        assert found.choice == "run now"
    if first_due <= date.fromisoformat(DAY) + timedelta(days=MARGIN_DAYS):
        assert (found.choice, found.expected_arrivals) == ("run now", 0.0)


BUSY = [ShardCosts(100.0, ((100.0, 1.0),))]  # whoever comes hits what is to be retrained anyway


@pytest.mark.parametrize(
    ("left", "choice"),
    [(-1, "run now"), (0, "run now"), (MARGIN_DAYS, "run now"), (MARGIN_DAYS + 1, "wait"), (30, "wait")],
)
def test_it_waits_for_company_until_the_margin(left: int, choice: str) -> None:
    found = choose([("req-1", left), ("req-2", 90)], BUSY, 50.0, DAY)
    assert found.choice == choice
    assert ("is due within" in found.why) == (0 <= left <= MARGIN_DAYS)
    assert ("overdue" in found.why) == (left < 0)
    assert found.run_by == due_in(max(0, left - MARGIN_DAYS)).isoformat()


def test_the_most_urgent_request_decides_whatever_the_order() -> None:
    requests = [("a", 80), ("b", 10), ("c", 40)]
    assert choose(requests, BUSY, 1.0, DAY).run_by == choose(requests[::-1], BUSY, 1.0, DAY).run_by
    assert choose(requests, BUSY, 1.0, DAY).run_by == due_in(10 - MARGIN_DAYS).isoformat()


def test_a_saving_that_is_not_worth_it_runs_now() -> None:
    elsewhere = [ShardCosts(10.0, ()), ShardCosts(0.0, ((10.0, 1.0),))]
    found = choose([("req-1", 90)], elsewhere, 5.0, DAY)
    assert (found.choice, found.cost_now, found.cost_waiting) == ("run now", 20.0, 20.0)
    assert choose([("req-1", 90)], BUSY, 0.0, DAY).choice == "run now"


def test_a_deletion_that_costs_nothing_runs_now() -> None:
    assert choose([("req-1", 90)], [ShardCosts(0.0, ())], 5.0, DAY).choice == "run now"


def test_without_requests_there_is_nothing_to_do() -> None:
    found = choose([], BUSY, 5.0, DAY)
    assert (found.choice, found.requests, found.run_by) == ("nothing to do", (), None)
