"""Min-K%: the mean log-probability of a text's least likely tokens.

Formula: score = mean of the lowest max(1, floor(k L)) of the L token log-probabilities, k = 0.2. A
higher score means member.

Source: Shi et al. (2024, arXiv 2310.16789); swj0419/detect-pretrain-code `src/run.py`, whose empty
choice for short texts is one token here, as in open-unlearning.

Limits: for short texts it is the single least likely token. A k chosen on the data that it judges makes
the attack look stronger.

>>> min_k_score([-1.0, -5.0, -2.0, -4.0], k=0.5), min_k_score([-1.0, -5.0], k=0.2)
(-4.5, -5.0)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEFAULT_K = 0.2


def min_k_score(values: Sequence[float], k: float = DEFAULT_K) -> float:
    """Return the mean of the lowest share `k`. Raise ValueError for no values or k not in (0, 1]."""
    if len(values) == 0:
        raise ValueError("a text without tokens")
    if not 0 < k <= 1:
        raise ValueError("k is a share in (0, 1]")
    chosen = max(1, int(len(values) * k))
    return float(np.mean(np.sort(np.array(values, dtype=np.float64))[:chosen]))
