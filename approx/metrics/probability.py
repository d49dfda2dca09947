"""Probability of an answer per token, and its share among wrong answers.

Formula: P(a|q)^(1/|a|) = exp(-loss), where loss is the mean negative log-probability of the answer's
tokens including its end token, in nats. For a question with wrong options b: P(a)^(1/|a|) over the sum
of that and all P(b)^(1/|b|).

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2.1; locuslab/tofu
`aggregate_eval_stat.py`.

Limit: normalising by length favours long answers whose later tokens follow from the earlier ones.

>>> round(probability(0.6931471805599453), 12)
0.5
>>> probability_among(1.0, [1.0, 1.0, 1.0])
0.25
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax


def probability(loss: float) -> float:
    """Return exp(-loss), in [0, 1]; `loss` is a mean over tokens."""
    return float(np.exp(-loss))


def probability_among(loss: float, wrong_losses: Sequence[float]) -> float:
    """Return the answer's share among itself and the wrong ones, in [0, 1]; stable for large losses."""
    return float(softmax(-np.array([loss, *wrong_losses], dtype=np.float64))[0])
