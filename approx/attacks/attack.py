"""What attacks measure: the probability of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from approx.evaluation.answers import score_examples
from approx.metrics.probability import probability
from sisa.lm.base.tokens import Tokens


def probabilities(model: Any, examples: Sequence[Tokens]) -> list[float]:
    """Return the probability of each example's answer, per token."""
    return [probability(each.loss) for each in score_examples(model, examples)]
