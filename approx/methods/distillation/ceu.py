"""CE-U: learn what the model would say now if it could not say the forget token.

    F = mean over counted answer tokens of -sum_v q(v) log p(v)
    q = softmax of the model's own logits, that of the answer token at minus infinity, without a gradient
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

The gradient by the answer token's logit is its probability p, and by another word's logit -p q(v): it
fades where a token is forgotten, and other words keep their proportions. The first `skipped_tokens`
tokens of an answer do not count; an answer without any more is refused. There is no reference, and by
default no retain term: the target moves with the model, and nothing holds the rest of it.

Source: Yang 2025, "CE-U: cross entropy unlearning"; the skipped token is in the footnote on its
training settings. Defaults are those of open-unlearning (`src/trainer/unlearn/ceu.py`,
`configs/trainer/CEU.yaml`): 1 skipped token, no retain term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from approx.methods.distillation.undial import soft_labels_NV
from approx.methods.method import Family, Method, RetainLoss, Role, answer_logprobs_NV
from approx.unlearning.target import Rows
from approx.unlearning.value_checks import whole_numbers
from sisa.core.errors import Problem


@dataclass(frozen=True)
class Ceu(Method):
    """CE-U that leaves out the first `skipped_tokens` of each answer."""

    skipped_tokens: int = 1
    forget_weight: float = 1.0
    retain_weight: float = 0.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "ceu"
    family: ClassVar[Family] = "distillation"
    paper: ClassVar[str] = "Yang 2025, CE-U: cross entropy unlearning"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"retain_weight": 1.0}

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the loss is not defined."""
        yield from super().problems()
        yield from whole_numbers(0, skipped_tokens=self.skipped_tokens)

    @property
    def min_answer_tokens(self) -> int:
        return self.skipped_tokens + 1

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        forget = rows["forget"]
        mask_BT = forget.batch.mask_BT & (forget.batch.mask_BT.cumsum(dim=1) > self.skipped_tokens)
        counted = replace(forget.batch, mask_BT=mask_BT)
        logprobs_NV = answer_logprobs_NV(forget.current_BTV, counted)
        wanted_NV = soft_labels_NV(logprobs_NV, counted.answer_ids_N, math.inf)
        return -(wanted_NV * logprobs_NV).sum(dim=-1).mean()
