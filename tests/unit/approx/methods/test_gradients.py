"""Gradients of the losses of approximate unlearning, and their retain terms, by hand.

The vocabulary has 2 or 3 words, and their probabilities are plain fractions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from approx.evaluation.answers import collate
from approx.methods.method import Role, mean_nll
from approx.methods.registry import make_method
from approx.unlearning.target import Rows
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
