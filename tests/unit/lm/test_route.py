"""Routing is a function of the hits and of the shards that serve."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sisa.config.config import MINILM, Aggregation
from sisa.core.domain import Hit, Kind
from sisa.lm.routing.route import (
    MIN_SCORES,
    SHARE_WEIGHT,
    Route,
    choose_route,
    nearness,
    resolve_aggregation,
)

HITS = [Hit(1, 0.5, 1), Hit(2, 0.9, 2), Hit(3, 0.7, 1), Hit(4, 0.7, 0)]
ALL = ("mean_prob", "mean_logit", "vote", "merged")


def chosen(hits: list[Hit], live: set[int], **how: Any) -> tuple[int, ...]:
    return choose_route(hits, Aggregation(**how), live).shards


def test_routed_takes_the_strongest_shards_ties_by_number() -> None:
    assert chosen([Hit(3, 0.7, 1), Hit(4, 0.7, 0)], {0, 1}, top_k=2) == (0, 1)
    assert chosen(HITS, {0, 1, 2}) == (2,)
    assert chosen(HITS, {0, 1, 2}, top_k=3) == (2, 1, 0)
    assert chosen(HITS[::-1], {0, 1, 2}, top_k=3) == (2, 1, 0)


def test_routed_passes_over_shards_that_serve_nothing() -> None:
    assert chosen(HITS, {0, 1}) == (1,)
    assert chosen(HITS, {3}, top_k=2) == ()
    assert chosen([], {0}, top_k=2) == ()


@pytest.mark.parametrize("method", ALL)
def test_others_take_all_live_shards_alike(method: Any) -> None:
    assert choose_route([], Aggregation(method=method), {2, 0}) == Route((0, 2), (0.5, 0.5))
    assert choose_route(HITS, Aggregation(method=method), set()) == Route()


def test_negative_scores_route_too() -> None:
    assert chosen([Hit(1, -0.2, 1), Hit(2, -0.1, 0)], {0, 1}) == (0,)


def test_weights_are_the_shares_of_strengths() -> None:
    how = Aggregation(top_k=2, temperature=0.1)
    route = choose_route([*HITS, Hit(9, 0.8, 2)], how, {0, 2})
    assert route.shards == (2, 0)
    strengths = math.exp(9) + math.exp(8), math.exp(7)
    assert route.weights[0] / route.weights[1] == pytest.approx(strengths[0] / strengths[1])
    assert sum(route.weights) == pytest.approx(1)


def test_many_near_records_count_for_more_than_one() -> None:
    several = [Hit(1, 0.80, 0), *(Hit(n, 0.79, 1) for n in range(2, 6))]
    assert chosen(several, {0, 1}) == (1,)
    assert chosen(several, {0, 1}, temperature=0.001) == (0,)


@pytest.mark.parametrize(("below", "shards"), [("base", ()), ("mean_prob", (0, 1, 2))])
def test_below_the_least_score_nobody_near_answers(below: Any, shards: tuple[int, ...]) -> None:
    how = Aggregation(min_score=1.2, below=below)
    assert choose_route(HITS, how, {0, 1, 2}).shards == shards
    assert choose_route([], how, {0, 1, 2}).shards == shards
    near = nearness(HITS, 0.1, {0, 1, 2})
    share = math.exp(9) / (math.exp(9) + 2 * math.exp(7) + math.exp(5))
    assert near == pytest.approx(0.9 + 0.3 * (share - 1 / 3) / (1 - 1 / 3))
    assert chosen(HITS, {0, 1, 2}, temperature=0.1, min_score=near) == (2,)
    assert chosen(HITS, {0, 1, 2}, temperature=0.1, min_score=near + 1e-6) == ()


def test_the_score_that_counts_is_that_of_a_shard_that_serves() -> None:
    assert chosen(HITS, {0, 1}, min_score=1.0) == ()


def test_auto_is_what_was_measured_of_the_embedder_for_questions_and_answers() -> None:
    how = Aggregation(top_k=2)
    kinds: list[Kind] = ["completion", "chat", "text"]
    found = [resolve_aggregation(how, MINILM, kind).min_score for kind in kinds]
    assert found == [MIN_SCORES[MINILM], MIN_SCORES[MINILM], None]
    pinned = f"{MINILM}#sha256={'a' * 64}"
    assert [resolve_aggregation(how, pinned, kind).min_score for kind in kinds] == found
    assert resolve_aggregation(how, "hashing", "completion") == how.model_copy(
        update={"min_score": None}
    )
    assert resolve_aggregation(Aggregation(min_score=0.5), MINILM, "text").min_score == 0.5
    assert resolve_aggregation(Aggregation(min_score=None), MINILM, "chat").min_score is None


def test_no_record_fits_auto_for_what_is_held_word_for_word_always_passes() -> None:
    """However many others hold the same words: their shard's share is no more than chance then."""
    hits = [Hit(number, 0.9999, number) for number in range(8)]
    how = resolve_aggregation(Aggregation(), MINILM, "chat")
    assert choose_route(hits, how, set(range(8))).shards == (0,)
    assert choose_route([Hit(1, 0.68, 1)], how, {1, 2}).shards == ()


def test_what_one_shard_of_few_gets_by_chance_brings_nothing_nearer() -> None:
    even = [Hit(1, 0.5, 0), Hit(2, 0.5, 1)]
    assert nearness(even, 0.1, {0, 1}) == pytest.approx(0.5)
    assert nearness(even[:1], 0.1, {0}) == pytest.approx(0.5 + SHARE_WEIGHT)
