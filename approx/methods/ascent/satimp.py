"""SatImp: ascend on each token by its saturation and its importance.

    F = mean over answer tokens of w * log p,   w = p^beta1 (1 - p)^beta2, without a gradient
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

The first factor (saturation) leaves alone what is forgotten already, as in `wga`, which is beta2 = 0.
The second (importance) leaves alone what is certain anyway, such as the rest of a begun word. With the
defaults the weight is largest at p = 5 / 6. A text that is known by heart has weights near 0
everywhere, so its first steps are small.

Source: Yang et al. 2025, "Exploring criteria of loss reweighting to enhance LLM unlearning". Defaults
are those of the paper and of open-unlearning's code (`src/trainer/unlearn/satimp.py`): beta1 5, beta2 1,
weight 1 on the forget term and 0.1 on NLL of the retain set. Its `configs/trainer/SatImp.yaml` has the
weights the other way round; with these a tiny model that knew three answers by heart (NLL 0.0305) still
knew them after 24 steps (0.0306).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from approx.methods.ascent.wga import WeightedAscent


@dataclass(frozen=True)
class SatImp(WeightedAscent):
    """SatImp with the powers `beta1` (saturation) and `beta2` (importance) of the weight."""

    retain_weight: float = 0.1
    beta1: float = 5.0
    beta2: float = 1.0
    name: ClassVar[str] = "satimp"
    paper: ClassVar[str] = "Yang et al. 2025, Exploring criteria of loss reweighting"

    def weights_N(self, logprobs_N: Tensor) -> Tensor:
        return (self.beta1 * logprobs_N).exp() * (-torch.expm1(logprobs_N)) ** self.beta2
