"""Means over questions and their change beside a reference, with bootstrap intervals.

Formula: with scores in groups of questions, a group's measures are means over its questions, and the
estimate is `combine` of all of these means (by default their mean). A change is the estimate of one
model minus that of another on the same questions. The interval has bootstrap percentiles: questions
are drawn with replacement, each group by itself, and the same ones for both models. Equal scores give
a change of exactly 0 with an interval of no width.

Source: Efron (1979).

Limits: percentile intervals are too narrow below about 30 questions. Questions about one subject are
not independent, so an interval over them is too narrow as well. One question has no width at all.

>>> estimate([[[1.0, 0.0, 1.0, 0.0]]])
Estimate(value=0.5, low=0.0, high=1.0, num=4)
>>> change([[[1.0, 0.25]]], [[[1.0, 0.25]]])
Estimate(value=0.0, low=0.0, high=0.0, num=2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_DRAWS = 1000
INTERVAL = (2.5, 97.5)  # per cent
Groups = Sequence[Sequence[Sequence[float]]]  # of each group of questions, its measures' scores
Combine = Callable[[Any], Any]


@dataclass(frozen=True)
class Estimate:
    """A value, its interval at 95%, and the number of questions."""

    value: float
    low: float
    high: float
    num: int


def mean_of_means(means: Any) -> Any:
    """Return the mean along the first axis."""
    return np.mean(means, axis=0)


def harmonic_mean_of_means(means: Any) -> Any:
    """Return the harmonic mean along the first axis, 0 where a mean is not above 0."""
    with np.errstate(divide="ignore"):
        return np.where((means > 0).all(axis=0), len(means) / (1 / means).sum(axis=0), 0.0)


def estimate(groups: Groups, combine: Combine = mean_of_means) -> Estimate:
    """Return the combined mean of scores.

    Raise ValueError for a group without questions, scores of unequal number, and scores not finite.
    """
    return _estimate([groups], combine)


def change(groups: Groups, reference: Groups, combine: Combine = mean_of_means) -> Estimate:
    """Return the combined mean of scores minus that of a reference's scores of the same questions.

    Raise as `estimate`, and ValueError for groups of another shape.
    """
    return _estimate([groups, reference], combine)


def _estimate(models: Sequence[Groups], combine: Combine) -> Estimate:
    held = [[np.array(group, dtype=np.float64) for group in groups] for groups in models]
    shapes = {tuple(each.shape for each in groups) for groups in held}
    if len(shapes) != 1 or any(len(shape) != 2 or 0 in shape for shape in next(iter(shapes))):
        raise ValueError("scores of different questions, or of none")
    if not all(np.isfinite(each).all() for groups in held for each in groups):
        raise ValueError("scores that are not finite")
    rng = np.random.default_rng(0)
    drawn = []
    for group in held[0]:
        num = group.shape[1]
        drawn.append(rng.multinomial(num, np.full(num, 1 / num), size=NUM_DRAWS).T / num)
    values = [combine(np.concatenate([group.mean(axis=1) for group in groups])) for groups in held]
    samples = [
        combine(np.concatenate([group @ shares for group, shares in zip(groups, drawn, strict=True)]))
        for groups in held
    ]
    value = float(values[0] - values[1] if len(held) == 2 else values[0])
    spread = samples[0] - samples[1] if len(held) == 2 else samples[0]
    low, high = (float(each) for each in np.percentile(spread, INTERVAL))
    return Estimate(value, low, high, sum(group.shape[1] for group in held[0]))
