"""KL minimisation: ascend on the forget set and stay close to the original model on the retain set.

    L = -NLL(forget) + beta * KL(reference || current)(retain)

The KL is a mean over answer tokens of the retain rows, over the whole vocabulary, and exactly 0 at the
start. Its direction weighs words by the reference: what the model used to say must stay likely.

Source: TOFU (Maini et al. 2024, section 3, "KL minimization"), beta 1; for the difference to its code
see `methods/method.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from approx.methods.ascent.gradient_ascent import GradientAscent
from approx.methods.method import RetainLoss


@dataclass(frozen=True)
class KlMinimisation(GradientAscent):
    """KL minimisation with the weight `beta` of the closeness to the reference."""

    beta: float = 1.0
    name: ClassVar[str] = "kl_minimisation"
    paper: ClassVar[str] = "Maini et al. 2024, TOFU: a task of fictitious unlearning for LLMs"
    retain_field: ClassVar[str] = "beta"

    @property
    def retain_weight(self) -> float:
        return self.beta

    @property
    def retain_loss(self) -> RetainLoss:
        return "kl"
