"""The combination of constituent models' answers, against numbers computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytestmark = pytest.mark.torch

ONE, OTHER, THIRD = [0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.5, 0.45]


def spoken(method: str, rows: Sequence[Sequence[float]], weights: Sequence[float]) -> Any:
    import torch

    from sisa.lm.answer.answerer import combine

    logits = torch.tensor(rows).log()[:, None] + 3.0  # logits are logs up to a constant
    return combine(logits, torch.tensor(weights), method)[0].exp()


def test_mean_of_probabilities() -> None:
    assert spoken("mean_prob", [ONE, OTHER], [0.25, 0.75]) == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)
    assert spoken("routed", [ONE, OTHER], [0.25, 0.75]) == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)


def test_mean_of_logits_is_the_geometric_mean() -> None:
    roots = [(a * b) ** 0.5 for a, b in zip(ONE, OTHER, strict=True)]
    wanted = [each / sum(roots) for each in roots]
    assert spoken("mean_logit", [ONE, OTHER], [0.5, 0.5]) == pytest.approx(wanted, abs=1e-6)


def test_vote_counts_heads_and_probabilities_break_ties() -> None:
    third = 1 / 3
    found = spoken("vote", [ONE, OTHER, THIRD], [third] * 3)
    mean = [sum(each) / 3 for each in zip(ONE, OTHER, THIRD, strict=True)]
    wanted = [0.999 * votes + 0.001 * p for votes, p in zip([third, 2 * third, 0], mean, strict=True)]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert int(spoken("vote", [ONE, OTHER], [0.5, 0.5]).argmax()) == 0
    assert int(spoken("vote", [THIRD, [0.4, 0.3, 0.3]], [0.5, 0.5]).argmax()) == 1


@pytest.mark.parametrize("method", ["mean_prob", "mean_logit", "vote", "routed", "merged"])
def test_one_model_speaks_for_itself(method: str) -> None:
    assert spoken(method, [ONE], [1.0]) == pytest.approx(ONE, abs=1e-6)


@pytest.mark.parametrize("method", ["mean_prob", "mean_logit", "vote"])
def test_it_is_a_distribution(method: str) -> None:
    assert float(spoken(method, [ONE, OTHER, THIRD], [0.2, 0.5, 0.3]).sum()) == pytest.approx(1)
