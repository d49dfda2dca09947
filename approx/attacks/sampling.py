"""Sampling: the best of k sampled answers."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, fsum


def leak_at_k(scores: Sequence[float], k: int) -> float:
    """Return how much of an answer the best of k sampled ones gives away, in expectation.

    Formula: of n >= k samples with scores s_(1) <= ... <= s_(n), the expected best of k drawn without
    replacement, sum_i s_(i) C(i-1, k-1) / C(n, k), which is unbiased for the best of k new samples.

    Source: Reisizadeh et al. (2025, arXiv 2511.04934); the estimator as that of pass@k (Chen et al.
    2021).

    Limits: it depends on the temperature, and rises with k for any model that says anything, so it must
    be compared with a model that never saw the text.
    """
    ordered, ways = sorted(scores), comb(len(scores), k)
    return fsum(score * comb(at, k - 1) for at, score in enumerate(ordered)) / ways
