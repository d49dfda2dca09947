"""AUC of an attack with its bootstrap interval.

Formula: AUC = P(member's score > non-member's) + P(equal)/2, from mid-ranks (Mann-Whitney U / (m n)).
The interval has percentiles of the AUC over resamples with replacement, members and non-members
separately; `paired` draws the same rows of both, for two models' scores of the same texts. Equal scores
give exactly 0.5, and equal input gives equal intervals because the seed is an argument.

Source: Hanley and McNeil (1982); Efron (1979), by `scipy.stats.bootstrap`.

Limits: percentile intervals are too narrow below about 30 texts a side, and an AUC of exactly 0 or 1
has an interval of no width. Members and non-members from different sources are distinguished by their
style, whatever the model knows. True-positive rates at low false-positive rates say more about a worst
case.

>>> found = auc([3.0, 2.0], [1.0, 2.0])
>>> found.value, found.num_members, found.num_nonmembers
(0.875, 2, 2)
>>> reading(auc([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]))
'every member scores below every non-member: over-unlearned, and as recognisable as if remembered'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, rankdata

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Auc:
    """An AUC, its interval at `confidence`, and the number of texts on each side."""

    value: float
    low: float
    high: float
    confidence: float
    num_members: int
    num_nonmembers: int


def auc(
    members: Sequence[float],
    nonmembers: Sequence[float],
    *,
    paired: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Auc:
    """Return the AUC of higher scores for members.

    Raise ValueError for fewer than 2 texts on a side, pairs of unequal number, and scores not finite.
    """
    sides = [np.array(each, dtype=np.float64) for each in (members, nonmembers)]
    if not all(np.isfinite(each).all() for each in sides):
        raise ValueError("scores that are not finite")
    interval = bootstrap(
        sides,
        area,
        n_resamples=num_resamples,
        paired=paired,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    bounds = float(interval.low), float(interval.high)
    return Auc(float(area(sides[0], sides[1])), *bounds, CONFIDENCE, *map(len, sides))


def area(members: Any, nonmembers: Any, axis: int = -1) -> Any:
    """Return the AUC along an axis of both arrays of scores."""
    num, others = members.shape[axis], nonmembers.shape[axis]
    ranks = rankdata(np.concatenate([members, nonmembers], axis=axis), axis=axis)
    total = np.take(ranks, range(num), axis=axis).sum(axis=axis)
    return (total - num * (num + 1) / 2) / (num * others)


NEAR_ZERO = 0.05


def reading(found: Auc) -> str:
    """Return what an AUC means for members that a model should have forgotten.

    An AUC far below 0.5 is no success: whoever turns the attack around recognises the members.
    """
    if found.low <= 0.5 <= found.high:
        return "no evidence: members and non-members look alike to this attack"
    if found.low > 0.5:
        return "members are recognised: the model still knows them"
    if found.value == 0:
        below = "every member scores below every non-member"
    elif found.value < NEAR_ZERO:
        below = "nearly every member scores below the non-members"
    else:
        return "members score below non-members: over-unlearned, which gives them away, too"
    return f"{below}: over-unlearned, and as recognisable as if remembered"
