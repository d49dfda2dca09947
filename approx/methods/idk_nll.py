"""IdkNLL: learn to answer with refusals.

    L = forget_weight * NLL(preferred) + retain_weight * R(retain)
    R = NLL or KL(reference || current)

Both are means over answer tokens. The forget answers are not read: they become less likely only because
refusals take their place. This teaches a behaviour, and the knowledge stays beneath it.

Source: Dorna et al. 2025, "OpenUnlearning". Their code has no trainer for it: it is `GradDiff`
(`src/trainer/unlearn/grad_diff.py`) on refusals as the forget set, with a weight of -1, which makes its
ascent a descent. It is the NLL counterpart of TOFU's preference optimization (Maini et al. 2024).
Weights of 1 are the defaults of that trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.methods.method import Family, Method, RetainLoss, Role, mean_nll
from approx.unlearning.target import Rows


@dataclass(frozen=True)
class IdkNll(Method):
    """IdkNLL with the weights of its two terms and the kind of retain term."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "idk_nll"
    family: ClassVar[Family] = "behaviour"
    paper: ClassVar[str] = "Dorna et al. 2025, OpenUnlearning"
    always_reads: ClassVar[frozenset[Role]] = frozenset({"preferred"})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return mean_nll(rows["preferred"].current_BTV, rows["preferred"].batch)
