"""RMU, representation misdirection: send the hidden states of forget answers in a random direction.

    F = mean over answer tokens and units of (h - c)^2
    R = mean over answer tokens and units of (h - h_reference)^2
    c = steering_coefficient * u, or with `adaptive` steering_coefficient * |h_reference| * u
    L = forget_weight * F(forget) + retain_weight * R(retain)

h is what layer `layer` leaves at the position that predicts an answer token, and u a fixed unit vector
whose elements are uniform random numbers above 0, drawn from `control_seed`. The layers above are
neither trained nor run; operations are counted as if they were. Without a `layer` it is the one with
the largest effect in causal tracing (`unlearning/causal_tracing.py`).

The layers above read noise where they read the answer, so the model says something odd, and not
something else. The knowledge may still be in the weights above and below.

Source: Li et al. 2024, "The WMDP benchmark: measuring and reducing malicious use with unlearning" (arXiv
2403.03218), section 4; `adaptive`, with its coefficient of 5: Dang et al. 2024, "On effects of steering
latent representation for LLM unlearning" (arXiv 2408.06223). Without it a coefficient has to be found
for each base: 6.5 to 300 are in use. The authors' code (`rmu/unlearn.py`) counts all tokens and weighs R
by 1200; open-unlearning (`src/trainer/unlearn/rmu.py`) counts answer tokens, at their own positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from approx.methods.method import Family, Method, Role, answer_values_NV
from approx.unlearning.target import Rows
from approx.unlearning.value_checks import booleans, given, whole_numbers
from sisa.core.errors import Problem


@dataclass(frozen=True)
class Rmu(Method):
    """RMU at a layer, with the length of its control vector."""

    layer: int | None = None
    steering_coefficient: float = 5.0
    adaptive: bool = True
    control_seed: int = 0
    forget_weight: float = 1.0
    retain_weight: float = 100.0
    name: ClassVar[str] = "rmu"
    family: ClassVar[Family] = "representation"
    paper: ClassVar[str] = "Li et al. 2024, The WMDP benchmark"
    positive: ClassVar[tuple[str, ...]] = ("steering_coefficient", "forget_weight")
    compares_tokens: ClassVar[frozenset[Role]] = frozenset({"forget", "retain"})

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the loss is not defined."""
        yield from super().problems()
        yield from booleans(adaptive=self.adaptive)
        yield from whole_numbers(control_seed=self.control_seed)
        yield from whole_numbers(0, **given(layer=self.layer))

    def controls_ND(self, before_ND: Tensor) -> Tensor:
        """Return c for each answer token, given the reference's states."""
        generator = torch.Generator().manual_seed(self.control_seed)
        drawn_D = torch.rand(before_ND.shape[1], generator=generator, dtype=torch.float64)
        unit_D: Tensor = (drawn_D / drawn_D.norm()).to(before_ND)
        length_N1 = before_ND.norm(dim=1, keepdim=True) if self.adaptive else before_ND.new_ones(1, 1)
        return self.steering_coefficient * length_N1 * unit_D

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        forget = rows["forget"]
        controls_ND = self.controls_ND(answer_values_NV(forget.compared_BTV, forget.batch))
        return (answer_values_NV(forget.current_BTV, forget.batch) - controls_ND).square().mean()

    def retain_term(self, kept: Rows) -> Tensor:
        """Return R, a scalar."""
        now_ND = answer_values_NV(kept.current_BTV, kept.batch)
        return (now_ND - answer_values_NV(kept.compared_BTV, kept.batch)).square().mean()
