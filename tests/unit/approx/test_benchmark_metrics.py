"""The metrics that benchmarks share, against other formulas: brute force, scipy and laws."""

from __future__ import annotations

from itertools import product
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, entropy, hmean

from approx.metrics.choice import chosen
from approx.metrics.depth import MIN_GAP, depth_score
from approx.metrics.estimate import change, estimate
from approx.metrics.fluency import ngram_entropy
from approx.metrics.model_utility import harmonic_mean
from approx.metrics.word_overlap import exact_match, word_f1

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20)
GAPS = st.lists(st.floats(-2, 5, width=32), min_size=3, max_size=3)


def test_an_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(3).beta(2, 3, size=60)
    found = estimate([[values.tolist()]])
    theirs = bootstrap(
        [values], np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@given(SCORES)
def test_equal_scores_change_by_nothing(scores: list[float]) -> None:
    found = change([[scores], [scores]], [[scores], [scores]])
    assert (found.value, found.low, found.high, found.num) == (0, 0, 0, 2 * len(scores))


@given(SCORES, st.floats(0.01, 0.5))
def test_a_shift_of_all_scores_is_the_change(scores: list[float], shift: float) -> None:
    found = change([[[each + shift for each in scores]]], [[scores]])
    assert (found.value, found.low, found.high) == pytest.approx((shift,) * 3)


def test_groups_are_combined_by_their_means_and_bad_scores_are_refused() -> None:
    groups = [[[0.5, 1.0], [0.25, 0.25]], [[1.0, 0.0, 1.0]]]
    assert estimate(groups).value == pytest.approx((0.75 + 0.25 + 2 / 3) / 3)
    found = estimate(groups, harmonic_mean)
    assert found.value == pytest.approx(float(hmean([0.75, 0.25, 2 / 3])))
    assert estimate([[[0.0]], [[1.0]]], harmonic_mean).value == 0
    empty: list[float] = []
    for bad in ([[empty]], [[[float("nan")]]], [[[1.0], [1.0, 2.0]]]):
        with pytest.raises(ValueError):
            estimate(bad)
    with pytest.raises(ValueError, match="different questions"):
        change([[[1.0]]], [[[1.0, 2.0]]])


@given(GAPS, GAPS)
def test_the_depth_score_is_a_weighted_mean_of_clipped_ratios(
    retained: list[float], unlearned: list[float]
) -> None:
    counted = [(one, other) for one, other in zip(retained, unlearned, strict=True) if one > MIN_GAP]
    found = depth_score(retained, unlearned)
    if not counted:
        assert found is None
        return
    ratios = [min(max(other / one, 0), 1) for one, other in counted]
    assert found == pytest.approx(np.average(ratios, weights=[one for one, _ in counted]))
    assert depth_score(retained, retained) == pytest.approx(1.0)
    assert depth_score(retained, [0.0] * 3) == 0


@given(st.lists(st.sampled_from([-3.0, -2.0, -1.0]), min_size=2, max_size=5))
def test_credits_of_all_answers_sum_to_one(logprobs: list[float]) -> None:
    credits = [chosen(each, logprobs[:at] + logprobs[at + 1 :]) for at, each in enumerate(logprobs)]
    assert sum(credits) == pytest.approx(1)


def test_a_choice_without_other_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="other answers"):
        chosen(-1.0, [])


def test_fluency_is_the_entropy_of_scipy() -> None:
    words = ["the", "cat", "saw", "the", "cat", "and", "the", "cat", "ran"]
    expected = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        counts = [grams.count(each) for each in sorted(set(grams))]
        expected += weight * float(entropy(counts, base=2)) / 2
    assert ngram_entropy(" ".join(words)) == pytest.approx(expected)
    distinct = " ".join("".join(each) for each in product("ab", repeat=4))
    assert ngram_entropy(distinct) == pytest.approx((2 / 3 * log2(15) + 4 / 3 * log2(14)) / 2)
    assert ngram_entropy("") == 0


@pytest.mark.parametrize(
    ("generated", "accepted", "exact", "f1"),
    [
        ("The Beatles", ["the beatles."], 1, 1),
        ("John and Paul", ["John", "Paul and John"], 0, 1),
        ("it was John", ["John"], 0, 0.5),
        ("", ["John"], 0, 0),
        ("a", ["the"], 1, 1),
    ],
)
def test_short_answers_by_hand(generated: str, accepted: list[str], exact: int, f1: float) -> None:
    assert exact_match(generated, accepted) == exact
    assert word_f1(generated, accepted) == pytest.approx(f1)
