"""Forget quality: whether truth ratios are those of a model that never saw the forget set.

Formula: the exact p-value of the two-sample Kolmogorov-Smirnov test, D = sup |F_model - F_reference|,
between the truth ratios on the forget set of the model and of a retained reference.

Source: TOFU (Maini et al. 2024), section 2.2.2; locuslab/tofu `get_forget_quality`;
`scipy.stats.ks_2samp`.

A p-value is always reported with n, D and the *noise floor*: the same test between two retained
references that differ only in their seed. Forgetting cannot be expected to look better than that.

Limits: a p-value falls with n, so values for forget01 (40), forget05 (200) and forget10 (400; 300 in
the published logs) are not comparable. A large one is no proof of forgetting: the test may lack power,
or the model may be broken in a way that this ratio does not show. A reference of another base or
tokenizer than the model has different ratios for other reasons.

>>> forget_quality([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p_value
1.0
>>> found = forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
>>> round(found.p_value, 12), found.statistic, found.num_model
(0.1, 1.0, 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ks_2samp


@dataclass(frozen=True)
class KsTest:
    """The exact two-sample test: p-value, D, and the number of questions on each side."""

    p_value: float
    statistic: float
    num_model: int
    num_reference: int


@dataclass(frozen=True)
class ForgetQuality(KsTest):
    """The test of a model against a reference. `noise_floor` is None with one reference only."""

    noise_floor: KsTest | None


def forget_quality(
    model: Sequence[float], reference: Sequence[float], second_reference: Sequence[float] | None = None
) -> ForgetQuality:
    """Return the test on truth ratios, each in [0, inf]. Raise ValueError for no ratios and for NaN."""
    floor = None if second_reference is None else _test(second_reference, reference)
    return ForgetQuality(**vars(_test(model, reference)), noise_floor=floor)


def _test(some: Sequence[float], others: Sequence[float]) -> KsTest:
    if not len(some) or not len(others):
        raise ValueError("a test needs questions on both sides")
    if any(each != each for each in (*some, *others)):
        raise ValueError("a truth ratio is not a number")
    found = ks_2samp(some, others, method="exact")
    return KsTest(float(found.pvalue), float(found.statistic), len(some), len(others))
