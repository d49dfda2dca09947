"""PrivLeak: how far a membership attack on the forget set is from what it is on a retrained model.

Formula: PrivLeak = (A_model - A_retrained) / A_retrained * 100, where A = AUC(holdout above forget) of
Min-K% Prob with k = 0.4. The benchmark counts the holdout as the side that scores higher, so A is 1 -
the AUC of `auc.py`: with that AUC, (AUC_retrained - AUC_model) / (1 - AUC_retrained) * 100.

    0        an attack finds as much as on a model that never saw the forget set
    below 0  the forget set is still recognised: -100 means that every forget text is likelier than
             every unseen one
    above 0  the forget set is less likely than unseen text (over-unlearning), which gives it away, too

The interval has bootstrap percentiles over texts, the same texts for both models, so that equal models
give exactly 0 everywhere.

Source: MUSE (Shi et al. 2024, arXiv 2407.06460), section 3.1 and its code, `privleak_auc_key =
"forget_holdout_Min-40%"`; open-unlearning `privleak` turns the AUC likewise.

Limits: undefined where the retrained model's A is 0. Forget and holdout texts must come from one source,
or A_retrained is far from 0.5 and the quotient rewards or punishes style. It is not symmetric where
A_retrained is not 0.5: it is at least -100 and at most (1 / A_retrained - 1) * 100.

>>> knows, retrained = ([3.0, 4.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0])
>>> privleak(knows, retrained).value, privleak(retrained, retrained).value
(-100.0, 0.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from approx.metrics.auc import CONFIDENCE, NUM_RESAMPLES, area

MIN_K = 0.4
Sides = tuple[Sequence[float], Sequence[float]]  # scores of the forget texts and of the holdout texts


@dataclass(frozen=True)
class PrivLeak:
    """PrivLeak in per cent, its interval at `confidence`, and the AUCs of `auc.py` that it compares."""

    value: float
    low: float
    high: float
    confidence: float
    auc_model: float
    auc_retrained: float
    num_forget: int
    num_holdout: int


def privleak(
    model: Sides, retrained: Sides, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> PrivLeak:
    """Return PrivLeak from the Min-K% scores of the same texts under both models.

    Raise ValueError for scores of different texts, fewer than 2 texts on a side, scores that are not
    finite, and a retrained model that gives every forget text a higher score than every holdout text.
    """
    both = [np.array(each, dtype=np.float64) for each in zip(model, retrained, strict=True)]
    if not all(np.isfinite(each).all() for each in both):
        raise ValueError("scores that are not finite")
    areas = [float(area(both[0][at], both[1][at])) for at in (0, 1)]
    if areas[1] == 1:
        raise ValueError("the retrained model recognises every forget text: nothing to compare with")

    nums = [each.shape[1] for each in both]
    least = 0.5 / (nums[0] * nums[1])  # half a pair, for resamples whose A is 0

    def leak(*rows: Any, axis: int = -1) -> Any:
        sides = [side[:, drawn] for side, drawn in zip(both, rows, strict=True)]
        model_area, retrained_area = (area(sides[0][at], sides[1][at], axis) for at in (0, 1))
        return _leak(model_area, retrained_area, least)

    interval = bootstrap(
        [np.arange(each.shape[1]) for each in both],
        leak,
        n_resamples=num_resamples,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PrivLeak(
        value=float(_leak(*areas)),
        low=float(interval.low),
        high=float(interval.high),
        confidence=CONFIDENCE,
        auc_model=areas[0],
        auc_retrained=areas[1],
        num_forget=nums[0],
        num_holdout=nums[1],
    )


def privleak_or_none(model: Sides, retrained: Sides, *, seed: int = 0) -> PrivLeak | None:
    """Return PrivLeak, or None where it is undefined: fewer than 2 texts on a side, or A_retrained 0."""
    if min(map(len, (*model, *retrained))) < 2 or min(retrained[0]) > max(retrained[1]):
        return None
    return privleak(model, retrained, seed=seed)


def _leak(auc_model: Any, auc_retrained: Any, least: float = 0.0) -> Any:
    return (auc_retrained - auc_model) / np.maximum(1 - auc_retrained, least) * 100
