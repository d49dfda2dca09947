"""SimNPO: NPO without a reference, on the mean log-probability of an answer's tokens.

    F = mean over examples of -(2 / beta) * log sigmoid(-beta * mean_logprob(forget) - gamma)
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

F is bounded below by 0. Long and short answers have the same weight. The authors' code writes the
margin inside the bracket: its gamma (delta in open-unlearning) is this gamma / beta. Both are 0 by
default.

Source: Fan et al. 2024, "Simplicity prevails: rethinking negative preference optimization for LLM
unlearning". Defaults are the command of their code for TOFU forget10: beta 4.5, weight 0.125 on the
forget term, 1 on NLL of the retain set, gamma 0. For forget05: beta 2.5, weight 0.1375. These
values leave answers known after a patch. The values in a patch were found on RWKU's people and confirmed
on TOFU's authors (`tests/bench/patches/README.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from approx.methods.preference.preference import Preference


@dataclass(frozen=True)
class SimNpo(Preference):
    """SimNPO with the inverse temperature `beta` and the margin `gamma`."""

    beta: float = 4.5
    gamma: float = 0.0
    forget_weight: float = 0.125
    name: ClassVar[str] = "simnpo"
    paper: ClassVar[str] = "Fan et al. 2024, Simplicity prevails"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"beta": 0.2, "forget_weight": 1.0}
    not_negative: ClassVar[tuple[str, ...]] = ("gamma", "retain_weight")

    @property
    def reference_free(self) -> bool:
        return True

    @property
    def length_normalised(self) -> bool:
        return True
