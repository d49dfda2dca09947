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

**Reference**, the loss calibrated by a model that never saw the text. Formula: score = mean
log-probability under the model - the same under the reference. Limits: the reference must know the
language and the subject equally well, and have the same tokenizer; a reference that was trained on the
text hides it. Source: Watson et al. (2022, arXiv 2111.08440); Carlini et al. (2021, arXiv 2012.07805),
section 5.2.

>>> calibrated_scores([2.0], [[3.0]])
{'reference': [1.0]}

**Gradient norm**, of the loss with respect to the trained parameters: small where training has
converged. Formula: score = -sqrt(sum over parameters of ||d loss / d theta||^2), loss the mean over the
text's tokens; `gradient_squares` in `approx/evaluation/answers.py` computes the terms. Limits: it needs
the weights and a backward pass for each text, and norms compare only over the same parameters.
open-unlearning and mimir take the mean of the tensors' norms instead. Source: Wang et al. (2024, arXiv
2402.17012).

>>> gradient_norm_score([9.0, 16.0])
-5.0

**LiRA**, offline: how unlikely a text's confidence is under models that never saw it. Formula: phi =
log(p / (1 - p)) with p = exp(-loss); over the references, phi ~ N(mu, sigma^2) for each text; score =
(phi - mu) / sigma, whose normal distribution function is the paper's Lambda, without its saturation at
1. sigma^2 is each text's unbiased variance from OWN_VARIANCE references on, else the mean of the
variances over all texts; sigma is at least MIN_DEVIATION. Limits: with a handful of references mu is
rough, and the score ranks almost as the reference attack does. Only the distribution without the text
is fitted, so the score is no likelihood ratio of both, as the online attack has. References must differ
in their training data or seed, not in kind. Source: Carlini et al. (2022, arXiv 2112.03570), section IV
and equation 4.

>>> [round(each, 3) for each in lira_scores([0.1], [[0.7], [0.9]])]
[9.498]
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


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


def text_scores(
    token_logprobs: Sequence[float], means: Sequence[float], variances: Sequence[float], text: str
) -> dict[str, float]:
    """Return all scores that need one forward of the model alone, by name."""
    return {
        "loss": loss_score(token_logprobs),
        "zlib": zlib_score(token_logprobs, text),
        "min_k": min_k_score(token_logprobs),
        "min_k_plus_plus": min_k_plus_plus_score(token_logprobs, means, variances),
    }


def gradient_norm_score(squares: Sequence[float]) -> float:
    """Return the negative norm from the squared norms of its tensors. Raise ValueError for none."""
    if len(squares) == 0:
        raise ValueError("a gradient of no parameters")
    return -math.sqrt(math.fsum(squares))


OWN_VARIANCE = 64  # references; with fewer, one variance is more stable (the paper's section VI)
MIN_DEVIATION = 1e-6
MIN_LOSS = 1e-12


def calibrated_scores(
    losses: Sequence[float], references: Sequence[Sequence[float]]
) -> dict[str, list[float]]:
    """Return what references' losses of the same texts add: `reference`, and from two on `lira`."""
    if not references:
        return {}
    found = {"reference": [there - here for here, there in zip(losses, references[0], strict=True)]}
    return found | ({"lira": lira_scores(losses, references)} if len(references) > 1 else {})


def lira_scores(losses: Sequence[float], references: Sequence[Sequence[float]]) -> list[float]:
    """Return the score of each text from its mean loss, and its losses under each reference.

    Raise ValueError for fewer than 2 references, and for losses that are not finite or not of the same
    texts.
    """
    if len(references) < 2:
        raise ValueError("LiRA needs two or more references")
    if {len(each) for each in references} != {len(losses)}:
        raise ValueError("losses of different texts")
    above_RN = _confidences(losses) - _confidences(references)  # exactly 0 for equal models
    variances_N = above_RN.var(axis=0, ddof=1)
    if len(references) < OWN_VARIANCE:
        variances_N = np.full_like(variances_N, variances_N.mean())
    found: list[float] = (
        above_RN.mean(axis=0) / np.maximum(np.sqrt(variances_N), MIN_DEVIATION)
    ).tolist()
    return found


def _confidences(losses: Sequence[float] | Sequence[Sequence[float]]) -> Array:
    """Return log(p / (1 - p)) of p = exp(-loss), without overflow for large losses."""
    kept = np.maximum(np.array(losses, dtype=np.float64), MIN_LOSS)
    if not np.isfinite(kept).all():
        raise ValueError("losses that are not finite")
    return -kept - np.log(-np.expm1(-kept))
