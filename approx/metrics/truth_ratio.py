"""Truth ratio: how likely wrong answers are, relative to a paraphrase of the right one.

Formulas, with a paraphrase ã of the right answer and wrong answers b in the same form, losses per
token:

    arithmetic  R = mean_b P(b|q)^(1/|b|) / P(ã|q)^(1/|ã|)   = mean_b exp(-loss_b) / exp(-loss_ã)
    geometric   R = exp(mean_b log P(b|q)^(1/|b|)) / P(ã|q)^(1/|ã|) = exp(loss_ã - mean_b loss_b)

Source: TOFU (Maini et al. 2024), equation 1, is the arithmetic one. locuslab/tofu
`aggregate_eval_stat.py` and the published results use the geometric one, and so do most papers since.
They are not comparable; every report names its variant.

Sets are summarised per question: `towards_truth` = max(0, 1 - R) for what is to be known, `towards_one`
= min(R, 1/R) for what is to be forgotten. Ratios are computed from logarithms, so that large losses
neither overflow nor divide by zero.

Limit: a model that finds all text equally unlikely has a ratio near 1, like one that has forgotten.

>>> round(geometric(1.0, [1.0, 3.0]), 6), round(arithmetic(1.0, [1.0, 3.0]), 6)
(0.367879, 0.567668)
>>> towards_truth(0.25), towards_truth(4.0), towards_one(0.25), towards_one(4.0)
(0.75, 0.0, 0.25, 0.25)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.special import logsumexp

Variant = Literal["geometric", "arithmetic"]


def geometric(paraphrased_loss: float, wrong_losses: Sequence[float]) -> float:
    """Return R with the geometric mean over wrong answers, in [0, inf]. Raise ValueError for none."""
    return _exp(paraphrased_loss - float(np.mean(_some(wrong_losses))))


def arithmetic(paraphrased_loss: float, wrong_losses: Sequence[float]) -> float:
    """Return R with the arithmetic mean over wrong answers, in [0, inf]. Raise ValueError for none."""
    losses = _some(wrong_losses)
    return _exp(paraphrased_loss + float(logsumexp(-losses)) - float(np.log(len(losses))))


VARIANTS: Mapping[Variant, Callable[[float, Sequence[float]], float]] = {
    "geometric": geometric,
    "arithmetic": arithmetic,
}


def towards_truth(ratio: float) -> float:
    """Return max(0, 1 - R), which is 1 when no wrong answer is likely."""
    return max(0.0, 1.0 - ratio)


def towards_one(ratio: float) -> float:
    """Return min(R, 1/R), which is 1 when right and wrong answers are equally likely."""
    return ratio if ratio <= 1.0 else 1.0 / ratio


def _some(losses: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if len(losses) == 0:
        raise ValueError("a truth ratio needs at least one wrong answer")
    return np.array(losses, dtype=np.float64)


def _exp(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.exp(value))
