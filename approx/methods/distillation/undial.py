"""UNDIAL: learn what the model said before, with the forget tokens' logits lowered.

    F = mean over answer tokens of -sum_v q(v) log p(v)
    q = softmax(reference's logits - beta * [v is the answer token])
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

The answer token's probability falls from p to p / (p + (1 - p) e^beta), and other words keep their
proportions. The target is fixed, so F has its minimum, the mean entropy of q, where the model says q:
training longer does not forget more, a larger beta does. A token whose p is near 1 keeps a large share
(p 0.9999 and beta 10: 0.31).

Only answer tokens count. open-unlearning's code takes the mean over prompt and padding, too, where its
labels are no tokens and lower an unrelated word.

Source: Dong et al. 2025, "UNDIAL: self-distillation with adjusted logits for robust unlearning in large
language models". Defaults are those of open-unlearning (`src/trainer/utils.py`, `compute_undial_loss`;
`configs/trainer/UNDIAL.yaml`): beta 10, no retain term, because the target already holds what the model
said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from approx.methods.method import Family, Method, RetainLoss, Role, answer_logprobs_NV
from approx.unlearning.target import Rows


def soft_labels_NV(logprobs_NV: Tensor, targets_N: Tensor, beta: float) -> Tensor:
    """Return the distribution of some logits after those of the targets are lowered by `beta`.

    >>> soft_labels_NV(torch.zeros(1, 3), torch.tensor([0]), float("inf")).tolist()
    [[0.0, 0.5, 0.5]]
    """
    lowered_NV = logprobs_NV.detach().clone()
    lowered_NV[torch.arange(len(targets_N)), targets_N] -= beta
    return lowered_NV.softmax(dim=-1)


@dataclass(frozen=True)
class Undial(Method):
    """UNDIAL with the strength `beta` by which an answer token's logit is lowered."""

    beta: float = 10.0
    forget_weight: float = 1.0
    retain_weight: float = 0.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "undial"
    family: ClassVar[Family] = "distillation"
    paper: ClassVar[str] = "Dong et al. 2025, UNDIAL: self-distillation with adjusted logits"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"retain_weight": 1.0}
    compares_tokens: ClassVar[frozenset[Role]] = frozenset({"forget"})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        forget = rows["forget"]
        before_NV = answer_logprobs_NV(forget.compared_BTV, forget.batch)
        wanted_NV = soft_labels_NV(before_NV, forget.batch.answer_ids_N, self.beta)
        logprobs_NV = answer_logprobs_NV(forget.current_BTV, forget.batch)
        return -(wanted_NV * logprobs_NV).sum(dim=-1).mean()
