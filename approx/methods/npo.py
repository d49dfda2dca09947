"""NPO: DPO with the losing answer only, so that the gradient fades where an answer is already unlikely.

    F = mean over examples of -(2 / beta) * log sigmoid(-beta * ratio(forget))
    ratio = log p(answer) - log p_reference(answer), the whole answer
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

F is (2 / beta) * log 2 at the start and bounded below by 0. Its gradient is that of gradient ascent on
the whole answer times 2 p^beta / (p^beta + p_reference^beta), which is 1 at the start. `simnpo`
averages answers over their length.

Source: Zhang et al. 2024, "Negative preference optimization"; beta 0.1 and both weights 1 with NLL on
the retain set (their NPO+RT) are the configuration of their code and of open-unlearning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from approx.methods.method import Method, RetainLoss, Role, Rows


@dataclass(frozen=True)
class Npo(Method):
    """NPO with the inverse temperature `beta`: towards 0 the loss becomes gradient ascent."""

    beta: float = 0.1
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "npo"
    compares_answers: ClassVar[frozenset[Role]] = frozenset({"forget"})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * rows["forget"].log_ratios_B).mean()
