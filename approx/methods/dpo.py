"""DPO and IdkDPO: prefer another answer to the one to forget.

    D = mean over examples of -log sigmoid(beta * (ratio(preferred) - ratio(forget)))
    ratio = log p(answer) - log p_reference(answer), the whole answer
    DPO:     L = forget_weight * D + retain_weight * R(retain)
    IdkDPO:  L = forget_weight * (2 / beta) * D + retain_weight * R(retain)
    R = NLL or KL(reference || current)

D is log 2 at the start. The initial slope of (2 / beta) * D is that of the difference of the ratios,
whatever beta is. Row i of the preferred answers belongs to row i of the forget answers. IdkDPO is the
same loss with refusals as the preferred answers and a retain term by default, without which a model
learns to refuse everything.

Source: Rafailov et al. 2023, "Direct preference optimization", eq. 7; beta 0.1 there and in TOFU (Maini
et al. 2024). IdkDPO: TOFU's "preference optimization" with the retain term and the scale 2 / beta of
the code of NPO (Zhang et al. 2024) and of open-unlearning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from approx.methods.method import Method, RetainLoss, Role, Rows


@dataclass(frozen=True)
class Dpo(Method):
    """DPO with the temperature `beta` of the preference, and a retain term only if it has a weight."""

    beta: float = 0.1
    forget_weight: float = 1.0
    retain_weight: float = 0.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "dpo"
    looks_at: ClassVar[frozenset[Role]] = frozenset({"forget", "preferred"})
    compares_answers: ClassVar[frozenset[Role]] = looks_at

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        margins_B = rows["preferred"].log_ratios_B - rows["forget"].log_ratios_B
        return -logsigmoid(self.beta * margins_B).mean()


@dataclass(frozen=True)
class IdkDpo(Dpo):
    """DPO towards refusals, scaled by 2 / beta, with a retain term."""

    retain_weight: float = 1.0
    name: ClassVar[str] = "idk_dpo"

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return 2 / self.beta * super().forget_term(rows)
