"""The terms that losses are made of, over answer tokens alone.

Shapes: B examples, T positions, V words, N answer tokens of the whole batch.

Rules: a mean over tokens runs over all answer tokens of the batch, a mean over examples over its rows;
prompt and padding never count (the KL cuts them out before it computes anything).
KL is KL(reference || current) = sum_v p_ref(v) (log p_ref(v) - log p(v)) for each answer token, and
exactly 0 for equal logits. Everything is computed in float32 at least, whatever the logits come in.

Not covered: words of probability exactly 0 (logits of minus infinity) at answer tokens.

Source of the difference in the KL: upstream code (TOFU, open-unlearning) averages it over all positions,
prompt and padding among them, which makes its weight depend on how batches happen to be padded.
"""

from __future__ import annotations

from torch import Tensor

from approx.evaluation.answer_tokens import AnswerBatch, answer_logprobs_BT, logprobs_BTV


def mean_nll(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Negative log-likelihood of the answers, mean over the batch's answer tokens (nats per token)."""
    return -answer_logprobs_BT(logits_BTV, batch).sum() / batch.mask_BT.sum()


def mean_kl(reference_BTV: Tensor, current_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """KL(reference || current), mean over the batch's answer tokens (nats per token)."""
    num_positions = batch.targets_BT.shape[1]
    reference_NV = logprobs_BTV(reference_BTV[:, :num_positions][batch.mask_BT])
    current_NV = logprobs_BTV(current_BTV[:, :num_positions][batch.mask_BT])
    return (reference_NV.exp() * (reference_NV - current_NV)).sum(dim=-1).mean()
