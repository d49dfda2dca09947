"""Gradient ascent: make the forget answers less likely, and nothing else.

    L = -NLL(forget) = mean over answer tokens of log p(token)

This loss has no lower bound and no term for the rest of the model. It is the baseline for other methods
and needs a bound on utility or on steps; `graddiff` and `kl_minimisation` add a retain term.

Source: Jang et al. 2023, "Knowledge unlearning for mitigating privacy risks in language models" (a sum
there; the mean over tokens is that of TOFU, Maini et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from approx.methods.method import Losses, Role, Rows, mean_nll


@dataclass(frozen=True)
class GradientAscent:
    """Gradient ascent, which has no hyper-parameters."""

    name: ClassVar[str] = "gradient_ascent"
    reads: ClassVar[frozenset[Role]] = frozenset({"forget"})
    compares: ClassVar[frozenset[Role]] = frozenset()
    compares_answers: ClassVar[frozenset[Role]] = frozenset()

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        forget = rows["forget"]
        total = -mean_nll(forget.current_BTV, forget.batch)
        return Losses(total, total.detach(), None)
