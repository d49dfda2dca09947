"""Routing is a function of the hits and of the shards that serve."""

from __future__ import annotations

from sisa.domain import Hit
from sisa.model.route import choose_shards

HITS = [Hit(1, 0.5, 1), Hit(2, 0.9, 2), Hit(3, 0.7, 1), Hit(4, 0.7, 0)]


def test_routed_takes_the_nearest_shards_ties_by_number() -> None:
    assert choose_shards(HITS, "routed", 1, {0, 1, 2}) == (2,)
    assert choose_shards(HITS, "routed", 3, {0, 1, 2}) == (2, 0, 1)
    assert choose_shards(HITS[::-1], "routed", 3, {0, 1, 2}) == (2, 0, 1)


def test_routed_passes_over_shards_that_serve_nothing() -> None:
    assert choose_shards(HITS, "routed", 1, {0, 1}) == (0,)
    assert choose_shards(HITS, "routed", 2, {3}) == ()
    assert choose_shards([], "routed", 2, {0}) == ()


def test_mean_takes_all_live_shards() -> None:
    assert choose_shards([], "mean_prob", 1, {2, 0}) == (0, 2)
    assert choose_shards(HITS, "mean_prob", 1, set()) == ()


def test_negative_scores_route_too() -> None:
    assert choose_shards([Hit(1, -0.2, 1), Hit(2, -0.1, 0)], "routed", 1, {0, 1}) == (0,)
