"""Membership attacks: scores of a text under a model that are higher if the model was trained on it.

A score alone means nothing; `auc.py` compares the scores of members and non-members.

**Loss.** Formula: score = mean log-probability of the tokens (the negative of the loss). Limit: easy
text looks like a member, as nothing is calibrated by another model. Source: Yeom et al. (2018, arXiv
1709.01604); zjysteven/mink-plus-plus `run.py`, as for all attacks here.

>>> loss_score([-1.0, -3.0])
-2.0

**Zlib**, the loss relative to how well the text compresses. Formula: score = mean log-probability of the
tokens / bytes of the zlib-compressed UTF-8 text. Limit: zlib adds about ten bytes to any text, so it
hardly distinguishes short answers. Source: Carlini et al. (2021, arXiv 2012.07805), section 5.2.

>>> zlib_score([-1.0, -3.0], "aaaaaaaaaaaaaaaa") == -2.0 / 11
True

**Min-K%**, the mean log-probability of a text's least likely tokens. Formula: score = mean of the lowest
max(1, floor(k L)) of the L token log-probabilities, k = 0.2. Limits: for short texts it is the single
least likely token. A k chosen on the data that it judges makes the attack look stronger. Source: Shi et
al. (2024, arXiv 2310.16789); swj0419/detect-pretrain-code `src/run.py`, whose empty choice for short
texts is one token here, as in open-unlearning.

>>> min_k_score([-1.0, -5.0, -2.0, -4.0], k=0.5), min_k_score([-1.0, -5.0], k=0.2)
(-4.5, -5.0)

**Min-K%++**, Min-K% of log-probabilities standardised by the model's own distribution. Formula: z_t =
(log p(x_t) - mu_t) / sigma_t, with mu_t = E[log p(v)] and sigma_t^2 = E[log p(v)^2] - mu_t^2 over the
next token v ~ p( . | x_<t); score = mean of the lowest max(1, floor(k L)) of z, k = 0.2.
`approx/evaluation/answers.py` computes the moments. A variance below 1e-6 is raised to it, as in
open-unlearning, because a model that is certain has none. Limit: where a model is certain, z is large
because of that guard alone. Source: Zhang et al. (2025, arXiv 2404.02936), equation 3.

>>> min_k_plus_plus_score([-1.0, -6.0], [-2.0, -2.0], [4.0, 4.0], k=1.0)
-0.75
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def loss_score(token_logprobs: Sequence[float]) -> float:
    """Return the mean of log-probabilities, in nats. Raise ValueError for no tokens."""
    if len(token_logprobs) == 0:
        raise ValueError("a text without tokens")
    return float(np.mean(np.array(token_logprobs, dtype=np.float64)))


def zlib_score(token_logprobs: Sequence[float], text: str) -> float:
    """Return nats per token and compressed byte. Raise ValueError for no tokens."""
    return loss_score(token_logprobs) / len(zlib.compress(text.encode("utf-8")))


DEFAULT_K = 0.2


def min_k_score(values: Sequence[float], k: float = DEFAULT_K) -> float:
    """Return the mean of the lowest share `k`. Raise ValueError for no values or k not in (0, 1]."""
    if len(values) == 0:
        raise ValueError("a text without tokens")
    if not 0 < k <= 1:
        raise ValueError("k is a share in (0, 1]")
    chosen = max(1, int(len(values) * k))
    return float(np.mean(np.sort(np.array(values, dtype=np.float64))[:chosen]))


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
