"""GradDiff: ascend on the forget set while descending on the retain set.

    L = forget_weight * -NLL(forget) + retain_weight * R(retain)
    R = NLL(retain), or KL(reference || current) over its answer tokens

Rules: both terms are means over answer tokens. The forget term is unbounded, as in gradient ascent.

Not covered: a schedule of the weights.

Source: Liu, Liu and Stone 2022, "Continual learning and private unlearning"; "gradient difference" in
TOFU (Maini et al. 2024, section 3), which weighs both terms 1, as open-unlearning does; both use NLL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from approx.method import (
    RETAIN_LOSSES,
    Losses,
    RetainLoss,
    Role,
    Rows,
    above_zero,
    compares_retain,
    one_of,
    refuse_values,
    weighted,
)
from approx.token_losses import mean_nll


@dataclass(frozen=True)
class GradDiff:
    """Weights of the two terms, and what the retain term is."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "graddiff"

    def __post_init__(self) -> None:
        refuse_values(
            self.name,
            above_zero(forget_weight=self.forget_weight, retain_weight=self.retain_weight),
            one_of(RETAIN_LOSSES, retain_loss=self.retain_loss),
        )

    @property
    def reads(self) -> frozenset[Role]:
        return frozenset({"forget", "retain"})

    @property
    def compares(self) -> frozenset[Role]:
        return compares_retain(self.retain_weight, self.retain_loss)

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        forget = -mean_nll(rows["forget"].current_BTV, rows["forget"].batch)
        return weighted(forget, self.forget_weight, rows, self.retain_weight, self.retain_loss)
