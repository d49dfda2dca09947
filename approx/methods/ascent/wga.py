"""WGA, weighted gradient ascent: ascend on each token by how likely it still is.

    F = mean over answer tokens of w * log p,   w = p^beta, without a gradient
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

The gradient of log p is 1 / p times that of p, so plain ascent pulls hardest at what is forgotten
already. The weight cancels this: with beta 1, F has the gradient of the mean probability. Beta towards
0 is `graddiff`. The gradient always makes a token less likely, but F itself is never below
-1 / (e beta) and rises again as p falls further: its value does not show progress.

Source: Wang et al. 2025, "Rethinking LLM unlearning objectives: a gradient perspective and go beyond".
Defaults (beta and both weights 1, NLL on the retain set) are those of open-unlearning
(`src/trainer/unlearn/wga.py`, `configs/trainer/WGA.yaml`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.evaluation.answers import answer_logprobs_BT
from approx.methods.ascent.graddiff import GradDiff
from approx.methods.method import Role
from approx.unlearning.target import Rows


@dataclass(frozen=True)
class WeightedAscent(GradDiff):
    """Ascent with a weight for each answer token, which depends on its probability."""

    positive: ClassVar[tuple[str, ...]] = ("beta", "forget_weight")
    not_negative: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "retain_weight")

    def weights_N(self, logprobs_N: Tensor) -> Tensor:
        """Return the weights of answer tokens, given their log-probabilities."""
        raise NotImplementedError

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        forget = rows["forget"]
        logprobs_N = answer_logprobs_BT(forget.current_BTV, forget.batch)[forget.batch.mask_BT]
        return (self.weights_N(logprobs_N.detach()) * logprobs_N).mean()


@dataclass(frozen=True)
class Wga(WeightedAscent):
    """Weighted gradient ascent with the power `beta` of a token's probability as its weight."""

    beta: float = 1.0
    name: ClassVar[str] = "wga"
    paper: ClassVar[str] = "Wang et al. 2025, Rethinking LLM unlearning objectives"

    def weights_N(self, logprobs_N: Tensor) -> Tensor:
        return (self.beta * logprobs_N).exp()
