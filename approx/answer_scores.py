"""From logits to scores of answers: log-probabilities, hits of the likeliest token, moments.

Shapes: as `answer_tokens.py`; K answer tokens of one row.

Rules: answer positions are picked before anything is computed over the vocabulary, so that a long prompt
costs no memory; all in float32. A word of probability 0 adds nothing to a moment.

Not covered: metrics.

>>> from sisa.model.tokens import Tokens
>>> from approx.answer_tokens import collate
>>> batch = collate([Tokens([1, 2, 0], [-100, 2, 0])], pad_id=0)
>>> found, = answer_scores(torch.zeros(1, 3, 4), batch)
>>> found.num_tokens, round(found.loss, 4), [round(each, 4) for each in found.means]
(2, 1.3863, [-1.3863, -1.3863])
"""

from __future__ import annotations

import torch
from torch import Tensor

from approx.answer_tokens import AnswerBatch, logprobs_BTV
from approx.evaluated import AnswerScore


def answer_scores(logits_BTV: Tensor, batch: AnswerBatch) -> list[AnswerScore]:
    """A score for each row. The logits' last position may be there or cut off."""
    found = []
    for logits_TV, targets_T, mask_T in zip(logits_BTV, batch.targets_BT, batch.mask_BT, strict=True):
        logprobs_KV = logprobs_BTV(logits_TV[: len(mask_T)][mask_T])
        targets_K = targets_T[mask_T]
        probabilities_KV = logprobs_KV.exp()
        finite_KV = torch.where(probabilities_KV > 0, logprobs_KV, torch.zeros_like(logprobs_KV))
        means_K = (probabilities_KV * finite_KV).sum(-1)
        variances_K = (probabilities_KV * (finite_KV - means_K.unsqueeze(-1)).square()).sum(-1)
        found.append(
            AnswerScore(
                tuple(logprobs_KV.gather(-1, targets_K.unsqueeze(-1)).squeeze(-1).tolist()),
                tuple((logprobs_KV.argmax(-1) == targets_K).tolist()),
                tuple(means_K.tolist()),
                tuple(variances_K.tolist()),
            )
        )
    return found
