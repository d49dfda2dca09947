"""What constituent models say together: one distribution out of theirs.

    mean_prob   sum_i w_i p_i                  (Bourtoule et al. 2021, section IV: the mean of vectors)
    mean_logit  softmax(sum_i w_i log p_i)     (their geometric mean)
    vote        sum_i w_i [argmax p_i]         (section IV: majority vote); a thousandth of mean_prob is
                                               mixed in: it breaks ties, and no probability is 0

Rules: pure; float32 in and out. `merged` is one adapter, and nothing is to be put together.

Not covered: which models are asked (`route.py`), asking them (`stacked.py`).

Shapes: P constituents, T positions, V words.

>>> logits = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]]]).log()
>>> combine(logits, torch.tensor([0.5, 0.5]), "mean_prob").exp()
tensor([[0.7500, 0.2500]])
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE_SHARE = 1e-3


def combine(logits_PTV: Tensor, weights_P: Tensor, method: str) -> Tensor:
    """Logarithms of the distribution that constituents give together, [T, V]; weights sum to 1."""
    logs_PTV = logits_PTV.float().log_softmax(-1)
    if len(logs_PTV) == 1:
        return logs_PTV[0]
    weights_P11 = weights_P.float()[:, None, None]
    if method == "mean_logit":
        return (weights_P11 * logs_PTV).sum(0).log_softmax(-1)
    mean_TV = (logs_PTV + weights_P11.log()).logsumexp(0)
    if method != "vote":
        return mean_TV
    votes_TV = torch.zeros_like(mean_TV)
    for weight, picked_T in zip(weights_P.float(), logs_PTV.argmax(-1), strict=True):
        votes_TV.scatter_add_(-1, picked_T[:, None], weight.expand(len(picked_T), 1))
    return ((1 - TIE_SHARE) * votes_TV + TIE_SHARE * mean_TV.exp()).log()
