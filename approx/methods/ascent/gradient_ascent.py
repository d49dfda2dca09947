"""Gradient ascent: make the forget answers less likely, and nothing else.

    L = -NLL(forget) = mean over answer tokens of log p(token)

This loss has no lower bound and no term for the rest of the model. It is the baseline for other methods
and needs a bound on utility or on steps; `graddiff` and `kl_minimisation` add a retain term, `wga` and
`satimp` weigh the tokens.

Source: Jang et al. 2023, "Knowledge unlearning for mitigating privacy risks in language models" (a sum
there; the mean over tokens is that of TOFU, Maini et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.methods.method import Family, Method, Role, mean_nll
from approx.unlearning.target import Rows


@dataclass(frozen=True)
class GradientAscent(Method):
    """Gradient ascent, which has no hyper-parameters."""

    name: ClassVar[str] = "gradient_ascent"
    family: ClassVar[Family] = "ascent"
    paper: ClassVar[str] = "Jang et al. 2023, Knowledge unlearning for mitigating privacy risks"

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return -mean_nll(rows["forget"].current_BTV, rows["forget"].batch)
