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

from dataclasses import dataclass
from typing import ClassVar

from approx.methods.ascent.gradient_ascent import GradientAscent
from approx.methods.method import RetainLoss


@dataclass(frozen=True)
class GradDiff(GradientAscent):
    """GradDiff with the weights of its two terms and the kind of retain term."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    name: ClassVar[str] = "graddiff"
    paper: ClassVar[str] = "Liu, Liu and Stone 2022, Continual learning and private unlearning"
    positive: ClassVar[tuple[str, ...]] = ("forget_weight", "retain_weight")
    not_negative: ClassVar[tuple[str, ...]] = ()
