"""From logits to scores of answers: log-probabilities, hits of the likeliest token, moments.

Shapes: as `answer_tokens.py`; K answer tokens of one row.

Answer positions are picked before anything is computed over the vocabulary, so that a long prompt costs
no memory; all in float32. A word of probability 0 adds nothing to a moment.

>>> from sisa.lm.base.tokens import Tokens
>>> from approx.evaluation.answer_tokens import collate
>>> batch = collate([Tokens([1, 2, 0], [-100, 2, 0])], pad_id=0)
>>> found, = answer_scores(torch.zeros(1, 3, 4), batch)
>>> found.num_tokens, round(found.loss, 4), [round(each, 4) for each in found.means]
(2, 1.3863, [-1.3863, -1.3863])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answer_tokens import AnswerBatch, collate, logprobs_BTV
from approx.evaluation.evaluated import AnswerScore
from sisa.lm.base.tokens import Tokens

MAX_POSITIONS = 1024  # of one forward pass


def answer_scores(logits_BTV: Tensor, batch: AnswerBatch) -> list[AnswerScore]:
    """Return a score for each row. The logits' last position may be there or cut off."""
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


def scores(model: Any, examples: Sequence[Tokens]) -> list[AnswerScore]:
    """Score examples under a model, some rows at once; in order."""
    found: list[AnswerScore] = []
    for rows in _batches(examples):
        batch, columns_K = collate(rows, pad_id=0).to(model.device).at_answers()
        with torch.no_grad():  # inference mode would leave tensors behind that no gradient flows through
            logits_BKV = model(
                input_ids=batch.ids_BT1[:, :-1], logits_to_keep=columns_K, use_cache=False
            ).logits
            found += answer_scores(logits_BKV, batch)
    return found


def _batches(examples: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    rows: list[Tokens] = []
    for each in examples:
        longest = max(len(row.input_ids) for row in [*rows, each])
        if rows and longest * (len(rows) + 1) > MAX_POSITIONS:
            yield rows
            rows = []
        rows.append(each)
    if rows:
        yield rows
