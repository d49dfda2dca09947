"""Gradient ascent: make the forget answers less likely, and nothing else.

    L = -NLL(forget) = mean over answer tokens of log p(token)

Rules: nothing bounds this loss below and nothing holds the rest of the model: it is the baseline that
others are measured against, and needs a bound on utility or on steps.

Not covered: a retain term (`graddiff`, `kl_minimisation`).

Source: Jang et al. 2023, "Knowledge unlearning for mitigating privacy risks in language models" (a
sum there; the mean over tokens is that of TOFU, Maini et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from approx.methods.method import Losses, Role, Rows, mean_nll


@dataclass(frozen=True)
class GradientAscent:
    """No hyper-parameters of its own."""

    name: ClassVar[str] = "gradient_ascent"
    reads: ClassVar[frozenset[Role]] = frozenset({"forget"})
    compares: ClassVar[frozenset[Role]] = frozenset()
    compares_answers: ClassVar[frozenset[Role]] = frozenset()

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        forget = rows["forget"]
        total = -mean_nll(forget.current_BTV, forget.batch)
        return Losses(total, total.detach(), None)
