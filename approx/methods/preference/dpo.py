"""DPO and IdkDPO: prefer another answer to the one to forget.

    D = mean over examples of -log sigmoid(beta * (ratio(preferred) - ratio(forget)))
    ratio = log p(answer) - log p_reference(answer), the whole answer
    DPO:     L = forget_weight * D + retain_weight * R(retain)
    IdkDPO:  L = forget_weight * (2 / beta) * D + retain_weight * R(retain)
    R = NLL or KL(reference || current)

D is log 2 at the start. The initial slope of (2 / beta) * D is that of the difference of the ratios,
whatever beta is. IdkDPO is the same loss with refusals as the preferred answers and a retain term by
default, without which a model learns to refuse everything.

Source: Rafailov et al. 2023, "Direct preference optimization", eq. 7; beta 0.1 there and in TOFU (Maini
et al. 2024). IdkDPO: TOFU's "preference optimization" with the retain term and the scale 2 / beta of
the code of NPO (Zhang et al. 2024) and of open-unlearning. In a patch beta is 0.05, found on RWKU's
people and confirmed on TOFU's authors (`tests/bench/patches/README.md`), and DPO has IdkDPO's scale and
retain term: its own scale of 1 left answers known on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from approx.methods.method import Role
from approx.methods.preference.preference import Preference


@dataclass(frozen=True)
class Dpo(Preference):
    """DPO with the temperature `beta` of the preference, and a retain term only if it has a weight."""

    retain_weight: float = 0.0
    name: ClassVar[str] = "dpo"
    paper: ClassVar[str] = "Rafailov et al. 2023, Direct preference optimization"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"beta": 0.05, "forget_weight": 40.0, "retain_weight": 1.0}
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget", "preferred"})

    @property
    def scale(self) -> float:
        return 1.0


@dataclass(frozen=True)
class IdkDpo(Preference):
    """DPO towards refusals, scaled by 2 / beta, with a retain term."""

    name: ClassVar[str] = "idk_dpo"
    paper: ClassVar[str] = "Maini et al. 2024, TOFU: a task of fictitious unlearning for LLMs"
    in_a_patch: ClassVar[Mapping[str, Any]] = {"beta": 0.05}
    always_reads: ClassVar[frozenset[Role]] = Dpo.always_reads
