"""The fleet's simulation at a small scale: its sums balance, and more requests cost less each."""

from __future__ import annotations

import pytest

from tests.bench.scale.fleet import VECTOR_BYTES, Scale, Shards, measure

SMALL = Scale(records=40_000, shards=20, slices=5, workers=4, days=40, mean_life_h=0.05)


def test_the_books_balance_at_a_small_scale() -> None:
    found = measure(SMALL, [0.5, 20.0])
    training, (few, many) = found["first_training"], found["deletions"]
    assert training["record_epochs"] == found["full_record_epochs"]
    assert training["stages"] == SMALL.shards * SMALL.slices
    assert training["worker_deaths"] > 0
    assert training["given_up"] == 0
    assert training["makespan_h"] > training["makespan_h_without_deaths"]
    assert 0 < training["utilisation"] < 1
    for stream in (few, many):
        assert stream["completed"] > 0
        assert stream["overdue"] == 0
        assert stream["least_days_left"] >= 0
    assert many["shards_worth_retrained_per_request"] < few["shards_worth_retrained_per_request"] < 1
    assert found["limits"]["index_bytes"] == 40_000 * VECTOR_BYTES
    assert found["ledger"]["bytes_per_record"] > 100


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fleet_is_drawn_as_records_hash(seed: int) -> None:
    counts = Shards.drawn(Scale(records=100_000, shards=10, slices=10, seed=seed))
    assert counts.sizes.sum() == 100_000
    assert abs(counts.sizes / 1000 - 1).max() < 0.15  # five standard deviations
