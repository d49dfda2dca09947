"""GradDiff: ascend on the forget set while descending on the retain set.

    L = forget_weight * -NLL(forget) + retain_weight * R(retain)
    R = NLL(retain), or KL(reference || current) over its answer tokens

Both terms are means over answer tokens. The forget term is unbounded, as in gradient ascent. The
weights are constant over a run.

Source: Liu, Liu and Stone 2022, "Continual learning and private unlearning"; "gradient difference" in
TOFU (Maini et al. 2024, section 3), which gives both terms weight 1, as open-unlearning does; both use
NLL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.methods.method import RetainLoss, Role, Rows, WithRetainTerm, mean_nll


@dataclass(frozen=True)
class GradDiff(WithRetainTerm):
    """GradDiff with the weights of its two terms and the kind of retain term."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "graddiff"
    positive: ClassVar[tuple[str, ...]] = ("forget_weight", "retain_weight")
    not_negative: ClassVar[tuple[str, ...]] = ()

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return -mean_nll(rows["forget"].current_BTV, rows["forget"].batch)
