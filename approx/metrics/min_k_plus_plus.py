"""Min-K%++: Min-K% of token log-probabilities, standardised by the model's own distribution.

Formula: z_t = (log p(x_t) - mu_t) / sigma_t, with mu_t = E[log p(v)] and sigma_t^2 = E[log p(v)^2] -
mu_t^2 over the next token v ~ p( . | x_<t); score = mean of the lowest max(1, floor(k L)) of z, k =
0.2. A higher score means member. `approx/evaluation/answers.py` computes the moments.

Source: Zhang et al. (2025, arXiv 2404.02936), equation 3; zjysteven/mink-plus-plus `run.py`. A variance
below 1e-6 is raised to it, as in open-unlearning, because a model that is certain has none.

Limit: where a model is certain, z is large because of that guard alone.

>>> min_k_plus_plus_score([-1.0, -6.0], [-2.0, -2.0], [4.0, 4.0], k=1.0)
-0.75
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from approx.metrics.min_k import DEFAULT_K, min_k_score

MIN_VARIANCE = 1e-6


def min_k_plus_plus_score(
    token_logprobs: Sequence[float],
    means: Sequence[float],
    variances: Sequence[float],
    k: float = DEFAULT_K,
) -> float:
    """Return the score from token log-probabilities and the moments at their positions.

    All three have length L. Raise ValueError as `min_k_score` does, and for lengths that differ.
    """
    if not len(token_logprobs) == len(means) == len(variances):
        raise ValueError("log-probabilities and moments of different lengths")
    deviation = np.sqrt(np.maximum(np.array(variances, dtype=np.float64), MIN_VARIANCE))
    standardised = (np.array(token_logprobs, dtype=np.float64) - np.array(means)) / deviation
    return min_k_score(standardised.tolist(), k)
