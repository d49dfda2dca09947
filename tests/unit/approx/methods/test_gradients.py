"""The losses of approximate unlearning, computed by hand.

The vocabulary has 2 or 3 words, and their probabilities are plain fractions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from approx.evaluation.answers import collate
from approx.methods.distillation.whp import generic_label
from approx.methods.method import Role, Rows, mean_nll
from approx.methods.registry import make_method
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.unit.approx.methods.second_way import slope_BTV

pytestmark = pytest.mark.torch


def row(probabilities: list[list[float]], answer: list[int]) -> tuple[Tokens, torch.Tensor]:
    """Return a one-token prompt and an answer, with logits that give its tokens' probabilities."""
    tokens = Tokens([0, *answer], [NO_LOSS, *answer])
    last = [1 / len(probabilities[0])] * len(probabilities[0])  # predicts what follows the end
    return tokens, torch.tensor([[*probabilities, last]], dtype=torch.float64).log()


def rows(current: list[list[float]], reference: list[list[float]] | None, answer: list[int]) -> Rows:
    tokens, logits = row(current, answer)
    compared = None if reference is None else row(reference, answer)[1]
    return Rows(collate([tokens]), logits, compared)


def close(found: torch.Tensor, expected: float) -> None:
    assert math.isclose(float(found), expected, rel_tol=1e-6, abs_tol=1e-6), (float(found), expected)


HALF = [[0.5, 0.5]]
FORGET = rows(
    [[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [1, 0]
)  # 1/4, then 1/2; was 1/2, 1/2
RETAIN = rows([[0.75, 0.25]], HALF, [1])  # 1/4, was 1/2
PREFERRED = rows([[0.25, 0.75]], HALF, [1])  # 3/4, was 1/2
GIVEN: dict[Role, Rows] = {"forget": FORGET, "retain": RETAIN, "preferred": PREFERRED}
log, LOG2 = math.log, math.log(2)
KL = log(2 / math.sqrt(3))  # of (1/2, 1/2) from (3/4, 1/4), 0.1438; the other way round it is 0.1308
NO_RETAIN = {"retain_weight": 0.0}
SATIMP = (2 * (1 / 4) ** 5 * (3 / 4) + (1 / 2) ** 5 * (1 / 2)) / 2 * LOG2


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # log 1/4 and log 1/2, mean over two tokens: -1.5 log 2
        ("gradient_ascent", {}, -1.5 * LOG2),
        ("task_arithmetic", {}, 1.5 * LOG2),
        ("graddiff", {}, -1.5 * LOG2 + 2 * LOG2),
        (
            "graddiff",
            {"forget_weight": 2.0, "retain_weight": 3.0, "retain_loss": "kl"},
            -3 * LOG2 + 3 * KL,
        ),
        ("kl_minimisation", {"beta": 10.0}, -1.5 * LOG2 + 10 * KL),
        # ratios: forget (1/8)/(1/4) = 1/2, preferred (3/4)/(1/2) = 3/2; margin log 3
        ("dpo", {"beta": 1.0}, log(1 + 1 / 3)),
        ("dpo", {"beta": 2.0}, log(1 + 1 / 9)),
        ("idk_dpo", {"beta": 1.0, "forget_weight": 2.0}, 2 * 2 * log(1 + 1 / 3) + 2 * LOG2),
        ("idk_dpo", {"beta": 2.0}, log(1 + 1 / 9) + 2 * LOG2),
        # (2 / beta) log(1 + (1/2)^beta)
        ("npo", {"beta": 1.0, **NO_RETAIN}, 2 * log(1 + 1 / 2)),
        ("npo", {"beta": 2.0, **NO_RETAIN}, log(1 + 1 / 4)),
        ("npo", {"beta": 1.0}, 2 * log(1 + 1 / 2) + 2 * LOG2),
        # mean probability (1/8)^(1/2); the margin stands outside of beta
        ("simnpo", {"beta": 2.0, "forget_weight": 1.0, **NO_RETAIN}, log(1 + 1 / 8)),
        ("simnpo", {"beta": 2.0, "forget_weight": 1.0, "gamma": LOG2, **NO_RETAIN}, log(1 + 2 / 8)),
        # weights p, p^2 and p (1 - p)
        ("wga", NO_RETAIN, -(2 / 4 + 1 / 2) / 2 * LOG2),
        ("wga", {"beta": 2.0, **NO_RETAIN}, -(2 / 16 + 1 / 4) / 2 * LOG2),
        (
            "satimp",
            {"beta1": 1.0, "beta2": 1.0, "forget_weight": 1.0, **NO_RETAIN},
            -(2 * 3 / 16 + 1 / 4) / 2 * LOG2,
        ),
        ("satimp", {}, -SATIMP + 0.1 * 2 * LOG2),
        # without its answer token a vocabulary of two says the other word: 3/4, then 1/2
        ("ceu", {"skipped_tokens": 0}, (log(4 / 3) + LOG2) / 2),
        ("ceu", {}, LOG2),
        # the reference says 1/2 and 1/2; lowered by log 3 the answer's share is 1/4
        ("undial", {"beta": log(3)}, (-(0.75 * log(0.75) + 0.25 * log(0.25)) + LOG2) / 2),
        ("idk_nll", {"retain_weight": 3.0}, log(4 / 3) + 3 * 2 * LOG2),
        # log-probabilities 3/4 and 1/4 differ by log 3, the largest from the mean by half of it
        ("pdu", NO_RETAIN, log(3) ** 2 / 8),
        ("pdu", {"retain_weight": 2.0}, log(3) ** 2 / 8 + 2 * 2 * LOG2),
        # preferred 1/2 to 3/4, forget 1/4 to 1/8, in two tokens
        ("altpo", {"beta": 1.0, **NO_RETAIN}, 2 * log(1 + 1 / 3)),
        ("altpo", {"beta": 1.0, "reference_free": True, **NO_RETAIN}, 2 * log(1 + 1 / 6)),
        (
            "altpo",
            {"beta": 1.0, "length_normalised": True, **NO_RETAIN},
            2 * log(1 + 2 / 3 * math.sqrt(1 / 2)),
        ),
        (
            "altpo",
            {"beta": 1.0, "length_normalised": True, "reference_free": True, **NO_RETAIN},
            2 * log(1 + 4 / 3 * math.sqrt(1 / 8)),
        ),
    ],
)
def test_a_loss_needs_no_more_than_its_method_reads(
    name: str, values: dict[str, Any], expected: float
) -> None:
    method = make_method(name, values)
    close(method.loss({role: GIVEN[role] for role in method.reads}).total, expected)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("npo", {"forget_weight": 5.0, "retain_weight": 7.0}, 2 * LOG2),
        ("kl_minimisation", {"beta": 10.0}, KL),
        ("pdu", {"retain_weight": 2.0}, 2 * LOG2),
    ],
)
def test_the_retain_term_is_unweighted_and_carries_no_gradient(
    name: str, values: dict[str, Any], expected: float
) -> None:
    live = replace(RETAIN, current_BTV=RETAIN.current_BTV.clone().requires_grad_())
    losses = make_method(name, values).loss({**GIVEN, "retain": live})
    assert losses.retain is not None
    close(losses.retain, expected)
    assert losses.total.requires_grad
    assert not losses.retain.requires_grad


def test_rmu_by_hand() -> None:
    """One state (3, 4) of length 5 that was (0, 2): towards 2 u, or 2 * 2 u; u is (a, b) of length 1."""
    now, before = torch.tensor([[[3.0, 4.0]] * 2]), torch.tensor([[[0.0, 2.0]] * 2])
    given: dict[Role, Rows] = dict.fromkeys(("forget", "retain"), Rows(FORGET.batch, now, before))
    a, b = make_method("rmu").controls_ND(before[0])[0].tolist()  # type: ignore[attr-defined]
    assert math.isclose(math.hypot(a, b), 5.0 * 2.0, rel_tol=1e-6)
    assert min(a, b) > 0
    found = make_method("rmu", {"retain_weight": 3.0}).loss(given)
    assert found.retain is not None
    close(found.retain, (3**2 + 2**2) / 2)
    close(found.total, ((3 - a) ** 2 + (4 - b) ** 2) / 2 + 3 * 6.5)
    fixed = {"adaptive": False, "steering_coefficient": 2.0, "retain_weight": 0.0}
    close(make_method("rmu", fixed).loss(given).total, ((3 - a / 5) ** 2 + (4 - b / 5) ** 2) / 2)


def test_generic_labels_by_hand() -> None:
    """Reinforcement raises the first word by 1 and lowers the second: 3 - alpha against 2.5 and 2."""
    before, after = torch.tensor([3.0, 2.5, 2.0]), torch.tensor([4.0, 1.0, 2.0])
    found = [generic_label(before, after, alpha) for alpha in (0.4, 0.6, 50.0)]
    assert found == [0, 1, 1]
    assert generic_label(before, after, 0.6, {1}) == 0
    assert generic_label(before, after, 50.0, {1}) == 2
    assert before.tolist() == [3.0, 2.5, 2.0]


@pytest.mark.parametrize("name", ["npo", "idk_dpo"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 2.0])
def test_beta_does_not_change_the_slope_at_the_start(name: str, beta: float) -> None:
    """There the ratio is 1, and 2 / beta makes up for the beta within: ascent on the answer."""
    start = rows(HALF, HALF, [1])
    given: dict[Role, Rows] = dict.fromkeys(("preferred", "retain"), start)
    close(slope_BTV(make_method(name, {"beta": beta}), start, given)[0, 0, 1], 0.5)  # of log(1/2)


@pytest.mark.parametrize(("name", "weigh"), [("wga", lambda p: p), ("satimp", lambda p: p**5 * (1 - p))])
def test_the_weights_of_ascent_have_no_gradient(name: str, weigh: Any) -> None:
    """By an answer token's own logit: w (1 - p), and w's own change left out."""
    slope = slope_BTV(make_method(name, {"forget_weight": 1.0, **NO_RETAIN}), FORGET)
    for position, (word, p) in enumerate(((1, 0.25), (0, 0.5))):
        close(slope[0, position, word], weigh(p) * (1 - p) / 2)
        close(slope[0, position, 1 - word], -weigh(p) * (1 - p) / 2)


def test_the_gradient_of_ceu_is_that_of_the_paper() -> None:
    """By the answer token's logit p = 1/2, by the others -p q: q is 3/5 and 2/5 of the rest."""
    three = rows([[0.5, 0.3, 0.2]], None, [0])
    slope = slope_BTV(make_method("ceu", {"skipped_tokens": 0}), three)
    for found, expected in zip(slope[0, 0], (0.5, -0.5 * 0.6, -0.5 * 0.4), strict=True):
        close(found, expected)


def test_pdu_forgets_what_is_likeliest() -> None:
    known = rows([[0.1, 0.7, 0.2], [0.9, 0.05, 0.05]], None, [1, 0])
    after = known.current_BTV - 1e-3 * slope_BTV(make_method("pdu"), known, {"retain": RETAIN})
    assert mean_nll(after, known.batch) > mean_nll(known.current_BTV, known.batch)


def test_missing_reference_logits_are_not_guessed() -> None:
    alone = Rows(FORGET.batch, FORGET.current_BTV)
    with pytest.raises(ValueError, match="reference"):
        make_method("npo", {"retain_weight": 0.0}).loss({"forget": alone})
