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
Combine = Callable[[Any], Any]  # of an array of means, to a number


@dataclass(frozen=True)
class Estimate:
    """A value, its interval at 95%, and the number of questions."""

    value: float
    low: float
    high: float
    num: int


def estimate(groups: Groups, combine: Combine = np.mean) -> Estimate:
    """Return the combined mean of scores.

    Raise ValueError for a group without questions, scores of unequal number, and scores not finite.
    """
    return _estimate([groups], combine)


def change(groups: Groups, reference: Groups, combine: Combine = np.mean) -> Estimate:
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

    def combined(chosen: Sequence[Any]) -> float:
        """Return the first model's value over chosen questions of each group, less the second's."""
        means = (
            [group[:, at].mean(axis=1) for group, at in zip(of, chosen, strict=True)] for of in held
        )
        first, *others = (float(combine(np.concatenate(each))) for each in means)
        return first - sum(others)

    rng, sizes = np.random.default_rng(0), [group.shape[1] for group in held[0]]
    drawn = [combined([rng.integers(size, size=size) for size in sizes]) for _ in range(NUM_DRAWS)]
    low, high = (float(each) for each in np.percentile(drawn, INTERVAL))
    return Estimate(combined([slice(None)] * len(sizes)), low, high, sum(sizes))
