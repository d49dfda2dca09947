"""Metrics: cases computed by hand, formulas written a second way, and laws of all metrics.

Identical models give forget quality 1 and AUC 0.5; a model that knows nothing has extraction strength
1/L.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from approx.metrics.auc import auc, reading
from approx.metrics.forget_quality import forget_quality
from approx.metrics.membership import (
    MIN_VARIANCE,
    OWN_VARIANCE,
    calibrated_scores,
    gradient_norm_score,
    lira_scores,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    zlib_score,
)
from approx.metrics.memorisation import exact_memorisation, extraction_strength, floor
from approx.metrics.model_utility import NINE, aggregate, harmonic_mean, model_utility
from approx.metrics.privleak import privleak
from approx.metrics.probability import probability, probability_among
from approx.metrics.truth_ratio import VARIANTS, arithmetic, geometric, towards_one, towards_truth
from approx.metrics.word_overlap import rougeL_recall

losses = st.floats(0, 50)
scores = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)
hits = st.lists(st.booleans(), min_size=1, max_size=30)

# --- probability and truth ratio -----------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_probability_is_the_geometric_mean_of_token_probabilities(tokens: list[float]) -> None:
    loss = -sum(math.log(each) for each in tokens) / len(tokens)
    assert probability(loss) == pytest.approx(math.prod(tokens) ** (1 / len(tokens)))


@given(losses, st.lists(losses, min_size=1, max_size=5))
def test_the_shares_of_all_options_sum_to_one(loss: float, wrong: list[float]) -> None:
    options = [loss, *wrong]
    shares = [
        probability_among(each, options[:at] + options[at + 1 :]) for at, each in enumerate(options)
    ]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(math.exp(-loss) / sum(math.exp(-each) for each in options))


def test_the_share_of_unlikely_options_is_still_a_number() -> None:
    assert probability_among(2000.0, [2000.0]) == 0.5


@given(st.floats(0, 20), st.lists(st.floats(0, 20), min_size=1, max_size=5))
def test_truth_ratios_by_their_formulas(paraphrased: float, wrong: list[float]) -> None:
    likely = [math.exp(-each) for each in wrong]
    true = math.exp(-paraphrased)
    assert arithmetic(paraphrased, wrong) == pytest.approx(sum(likely) / len(likely) / true)
    product_ = math.prod(each ** (1 / len(likely)) for each in likely)
    assert geometric(paraphrased, wrong) == pytest.approx(product_ / true, rel=1e-6)
    assert geometric(paraphrased, wrong) <= arithmetic(paraphrased, wrong) * (1 + 1e-9)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_one_wrong_answer_has_one_mean(variant: type) -> None:
    assert variant(2.0, [3.0]) == pytest.approx(math.exp(-1))
    with pytest.raises(ValueError, match="wrong answer"):
        variant(2.0, [])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_huge_losses_are_summed_up_all_the_same(variant: type) -> None:
    likely_wrong, unlikely_wrong = variant(5000.0, [1.0, 1.0]), variant(1.0, [5000.0, 5000.0])
    assert (towards_truth(likely_wrong), towards_truth(unlikely_wrong)) == (0.0, 1.0)
    assert (towards_one(likely_wrong), towards_one(unlikely_wrong)) == (0.0, 0.0)


@given(st.floats(1e-6, 1e6))
def test_towards_one_does_not_care_which_way_round(ratio: float) -> None:
    assert towards_one(ratio) == pytest.approx(towards_one(1 / ratio))
    assert 0 < towards_one(ratio) <= 1


# --- memorisation --------------------------------------------------------------------------------


@given(hits)
def test_extraction_strength_by_trying_every_prefix(correct: list[bool]) -> None:
    length = len(correct)
    found = next((k for k in range(length) if all(correct[k:])), length - 1)
    assert extraction_strength(correct) == pytest.approx(1 - found / length)


@given(st.integers(1, 200))
def test_a_model_that_knows_nothing_is_at_the_floor(length: int) -> None:
    assert extraction_strength([False] * length) == floor(length) == 1 / length
    assert exact_memorisation([False] * length) == 0
    assert extraction_strength([True] * length) == exact_memorisation([True] * length) == 1


@given(hits)
def test_what_can_be_extracted_is_memorised(correct: list[bool]) -> None:
    if correct[-1]:
        assert exact_memorisation(correct) >= extraction_strength(correct) - 1e-12


def test_an_answer_without_tokens_has_no_score() -> None:
    for metric in (extraction_strength, exact_memorisation):
        with pytest.raises(ZeroDivisionError):
            metric([])


# --- ROUGE-L -------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["mill", "keeper", "old", "coins"]), max_size=6)


def longest(some: Sequence[str], others: Sequence[str]) -> int:
    """Return the longest common subsequence, by trying all."""
    for size in range(min(len(some), len(others)), 0, -1):
        if set(combinations(some, size)) & set(combinations(others, size)):
            return size
    return 0


@given(words.filter(bool), words)
def test_rouge_recall_by_trying_every_subsequence(truth: list[str], generated: list[str]) -> None:
    found = rougeL_recall(" ".join(truth), " ".join(generated))
    assert found == pytest.approx(longest(truth, generated) / len(truth))


def test_rouge_stems_and_ignores_case_and_signs() -> None:
    assert rougeL_recall("She collects old coins.", "she COLLECTED an old coin") == pytest.approx(1.0)
    assert rougeL_recall("a b c d", "d c b a") == pytest.approx(0.25)


def test_the_known_limit_of_rouge() -> None:
    assert rougeL_recall("Она родилась в Минске.", "Она родилась в Минске.") == 0


def test_rouge_loads_no_library_that_its_stemmer_does_without() -> None:
    """It hides them for its own import alone; they take a second."""
    code = "from approx.metrics.word_overlap import UNUSED, rougeL_recall as recall; import sys\n"
    code += "print(recall('She collects old coins', 'a coin'), set(UNUSED) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["0.25", "set()\n"]


# --- attacks -------------------------------------------------------------------------------------


def test_attack_scores_by_hand() -> None:
    logprobs = [-1.0, -2.0, -3.0, -4.0, -10.0]
    assert loss_score(logprobs) == -4
    assert zlib_score(logprobs, "abc") == -4 / len(zlib.compress(b"abc"))
    assert min_k_score(logprobs, 0.4) == -7
    assert min_k_score(logprobs, 0.39) == -10
    assert min_k_score(logprobs, 1.0) == loss_score(logprobs)
    means, variances = [-2.0] * 5, [1.0, 1.0, 1.0, 4.0, 16.0]
    assert min_k_plus_plus_score(logprobs, means, variances, 0.4) == pytest.approx((-2.0 - 1.0) / 2)


def test_a_certain_model_has_the_guarded_variance() -> None:
    assert min_k_plus_plus_score([-1e-3], [0.0], [0.0]) == pytest.approx(-1e-3 / MIN_VARIANCE**0.5)


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=20), st.floats(0.01, 1), st.floats(0.01, 1))
def test_min_k_grows_with_k(logprobs: list[float], one: float, other: float) -> None:
    less, more = sorted([one, other])
    assert min_k_score(logprobs, less) <= min_k_score(logprobs, more) + 1e-9


def test_impossible_arguments_of_attacks() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        loss_score([])
    with pytest.raises(ValueError, match="without tokens"):
        min_k_score([])
    for k in (0, 1.5):
        with pytest.raises(ValueError, match="a share"):
            min_k_score([-1.0], k)
    with pytest.raises(ValueError, match="lengths"):
        min_k_plus_plus_score([-1.0], [0.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="no parameters"):
        gradient_norm_score([])
    for references, said in (([[1.0]], "two or more"), ([[1.0], [1.0, 2.0]], "different texts")):
        with pytest.raises(ValueError, match=said):
            lira_scores([1.0], references)
    with pytest.raises(ValueError, match="finite"):
        lira_scores([math.inf], [[1.0], [2.0]])


def test_the_reference_calibrates_by_its_own_loss() -> None:
    assert calibrated_scores([2.0, 2.0], [[4.0, 2.0]]) == {"reference": [2.0, 0.0]}
    assert calibrated_scores([2.0], []) == {}
    assert calibrated_scores([2.0], [[4.0], [2.0]]).keys() == {"reference", "lira"}


def test_lira_by_hand() -> None:
    """Two texts under three references: the mean and the variance of their log-odds, written out."""
    own, held = [0.5, 1.5], [[1.0, 1.2], [2.0, 1.0], [1.5, 1.4]]

    def odds(loss: float) -> float:
        p = math.exp(-loss)
        return math.log(p / (1 - p))

    columns = [[odds(each[text]) for each in held] for text in (0, 1)]
    means = [sum(each) / 3 for each in columns]
    variances = [
        sum((value - mean) ** 2 for value in each) / 2 for each, mean in zip(columns, means, strict=True)
    ]
    deviation = math.sqrt(sum(variances) / 2)
    wanted = [(odds(loss) - mean) / deviation for loss, mean in zip(own, means, strict=True)]
    assert lira_scores(own, held) == pytest.approx(wanted)
    many = [each for each in held for _ in range(OWN_VARIANCE)]
    spread = [statistics.stdev([odds(each[text]) for each in many]) for text in (0, 1)]
    wanted = [(odds(loss) - mean) / own_s for loss, mean, own_s in zip(own, means, spread, strict=True)]
    assert lira_scores(own, many) == pytest.approx(wanted)
    assert lira_scores([0.0, 1e4], [[1.0, 1e4], [1.1, 1e4]])[1] == 0


@given(st.lists(st.floats(0, 50), min_size=2, max_size=8), st.integers(2, 4))
def test_equal_models_have_no_calibrated_score(losses: list[float], references: int) -> None:
    assert lira_scores(losses, [losses] * references) == [0.0] * len(losses)
    found = auc(lira_scores(losses, [losses] * references), [0.0, 0.0], num_resamples=20)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


# --- AUC -----------------------------------------------------------------------------------------


@given(scores, scores)
def test_auc_by_counting_pairs(members: list[float], others: list[float]) -> None:
    won = sum((m > n) + (m == n) / 2 for m, n in product(members, others))
    found = auc(members, others, num_resamples=50)
    assert found.value == pytest.approx(won / len(members) / len(others))
    assert 0 <= found.low <= found.high <= 1
    assert auc(others, members, num_resamples=50).value == pytest.approx(1 - found.value)


@given(scores)
def test_identical_models_have_auc_one_half(values: list[float]) -> None:
    found = auc(values, values, paired=True, num_resamples=50)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_seeded_and_holds_the_truth() -> None:
    source = random.Random(3)
    covered = 0
    for _ in range(40):
        members = [source.gauss(1, 1) for _ in range(60)]
        others = [source.gauss(0, 1) for _ in range(60)]
        found = auc(members, others, num_resamples=300, seed=5)
        assert found == auc(members, others, num_resamples=300, seed=5)
        assert found != auc(members, others, num_resamples=300, seed=6)
        covered += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt 2)
    assert covered >= 33


@pytest.mark.parametrize(
    ("members", "others", "said"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "no evidence"),
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], "still knows"),
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], "every member scores below every"),
        ([*range(20), 20.5], [20.0, *range(21, 40)], "nearly every member scores below the"),
        ([*range(20), 30.5], range(15, 35), "score below non-members: over-unlearned"),
    ],
)
def test_an_auc_in_words(members: Sequence[float], others: Sequence[float], said: str) -> None:
    assert said in reading(auc(members, others, num_resamples=200))


def counted(some: Sequence[float], others: Sequence[float]) -> float:
    return sum((m > n) + (m == n) / 2 for m, n in product(some, others)) / len(some) / len(others)


@given(scores, scores, st.randoms())
def test_privleak_by_counting_pairs(
    forget: list[float], holdout: list[float], source: random.Random
) -> None:
    """MUSE's orientation: the holdout is the side that scores higher."""
    retrained = [source.sample(each, len(each)) for each in (forget, holdout)]
    if (base := counted(retrained[1], retrained[0])) == 0:
        with pytest.raises(ValueError, match="nothing to compare"):
            privleak((forget, holdout), (retrained[0], retrained[1]), num_resamples=20)
        return
    shifted = [each + 1 for each in forget]
    found = privleak((shifted, holdout), (retrained[0], retrained[1]), num_resamples=50)
    assert found.value == pytest.approx((counted(holdout, shifted) - base) / base * 100)
    assert found.auc_retrained == pytest.approx(1 - base)
    assert found.low <= found.high
    assert math.isfinite(found.low + found.high)


@given(scores, scores)
def test_identical_models_have_privleak_zero(forget: list[float], holdout: list[float]) -> None:
    if counted(holdout, forget) > 0:
        found = privleak((forget, holdout), (forget, holdout), num_resamples=50)
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_privleak_has_the_benchmark_s_signs() -> None:
    knows, seen, unseen = [9.0, 8.0, 7.0], [1.0, 2.0, 3.0], [1.5, 2.5, 3.5]
    known, retrained = (knows, unseen), (seen, unseen)
    assert privleak(known, retrained).value == -100
    assert privleak(([-each for each in knows], unseen), retrained).value == pytest.approx(50)
    with pytest.raises(ValueError, match="finite"):
        privleak(([math.nan, 1.0], unseen), ([1.0, 2.0], unseen))


def test_what_auc_refuses() -> None:
    for some, others, paired in (([1.0], [1.0, 2.0], False), ([1.0, 2.0], [1.0, 2.0, 3.0], True)):
        with pytest.raises(ValueError, match=r"two or more|same length"):
            auc(some, others, paired=paired)
    with pytest.raises(ValueError, match="finite"):
        auc([math.nan, 1.0], [1.0, 2.0])


# --- forget quality and utility ------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_identical_models_have_forget_quality_one(ratios: list[float]) -> None:
    found = forget_quality(ratios, ratios)
    assert (found.p_value, found.statistic) == (1.0, 0.0)


def test_forget_quality_by_counting_every_arrangement() -> None:
    """The exact test: of all ways to deal 8 ratios to two models, how many are as far apart."""
    model, reference = [0.1, 0.2, 0.3, 0.6], [0.4, 0.5, 0.7, 0.8]

    def distance(some: Sequence[float], others: Sequence[float]) -> float:
        def share(values: Sequence[float], at: float) -> float:
            return sum(each <= at for each in values) / len(values)

        return max(abs(share(some, at) - share(others, at)) for at in (*some, *others))

    everything = sorted(model + reference)
    ways = [
        distance(some, [each for each in everything if each not in some])
        for some in combinations(everything, len(model))
    ]
    found = forget_quality(model, reference)
    assert found.statistic == pytest.approx(distance(model, reference))
    assert found.p_value == pytest.approx(
        sum(each >= found.statistic - 1e-9 for each in ways) / len(ways)
    )


def test_forget_quality_falls_with_the_number_of_questions() -> None:
    """The same distance, on more questions: the reason why n is always told."""
    values = [forget_quality([1.0, 2.0, 3.0, 4.0] * n, [2.0, 3.0, 4.0, 5.0] * n) for n in (1, 10, 50)]
    assert [each.statistic for each in values] == [0.25] * 3
    assert all(more.p_value < less.p_value for less, more in pairwise(values))
    assert [each.num_model for each in values] == [4, 40, 200]


def test_the_noise_floor_is_the_test_of_two_references() -> None:
    found = forget_quality([1.0, 2.0], [1.5, 2.5], [8.0, 9.0])
    assert found.noise_floor is not None
    assert found.noise_floor.p_value == forget_quality([8.0, 9.0], [1.5, 2.5]).p_value
    assert forget_quality([1.0, 2.0], [1.5, 2.5]).noise_floor is None
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match=r"both sides|not a number"):
            forget_quality(bad, [1.0])


@given(st.lists(st.floats(1e-6, 1), min_size=9, max_size=9))
def test_model_utility_is_the_harmonic_mean_of_nine(values: list[float]) -> None:
    found = model_utility(dict(zip(NINE, values, strict=True)))
    assert found == pytest.approx(9 / sum(1 / each for each in values))
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12


def test_one_zero_makes_it_zero_and_eight_are_refused() -> None:
    assert len(NINE) == 9
    assert model_utility(dict.fromkeys(NINE, 1.0) | {NINE[4]: 0.0}) == 0
    with pytest.raises(ValueError, match="exactly nine"):
        model_utility(dict.fromkeys(NINE[1:], 1.0))
    assert aggregate(1.0, 0.5) == pytest.approx(2 / 3)
    for bad in ([], [-1.0], [math.nan]):
        with pytest.raises(ValueError, match="numbers from 0"):
            harmonic_mean(bad)
