"""SimNPO: NPO without a reference, on the mean log-probability of an answer's tokens.

    F = mean over examples of -(2 / beta) * log sigmoid(-beta * mean_logprob(forget) - gamma)
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

F is bounded below by 0. Long and short answers have the same weight. The authors' code writes the
margin inside the bracket: its gamma (delta in open-unlearning) is this gamma / beta. Both are 0 by
default.

Source: Fan et al. 2024, "Simplicity prevails: rethinking negative preference optimization for LLM
unlearning". Defaults are the command of their code for TOFU forget10: beta 4.5, weight 0.125 on the
forget term, 1 on NLL of the retain set, gamma 0. For forget05: beta 2.5, weight 0.1375.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from approx.evaluation.answers import mean_logprobs_B
from approx.methods.method import Method, RetainLoss, Role, Rows


@dataclass(frozen=True)
class SimNpo(Method):
    """SimNPO with the inverse temperature `beta` and the margin `gamma`."""

    beta: float = 4.5
    gamma: float = 0.0
    forget_weight: float = 0.125
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "simnpo"
    not_negative: ClassVar[tuple[str, ...]] = ("gamma", "retain_weight")

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        forget = rows["forget"]
        means_B = mean_logprobs_B(forget.current_BTV, forget.batch)
        return -2 / self.beta * logsigmoid(-self.beta * means_B - self.gamma).mean()
