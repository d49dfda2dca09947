"""NPO: DPO with the losing answer only, so that the gradient fades where an answer is already unlikely.

    F = mean over examples of -(2 / beta) * log sigmoid(-beta * ratio(forget))
    ratio = log p(answer) - log p_reference(answer), the whole answer
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)

F is (2 / beta) * log 2 at the start and bounded below by 0. Its gradient is that of gradient ascent on
the whole answer times 2 p^beta / (p^beta + p_reference^beta), which is 1 at the start. Once the first
words of an answer are gone, the rest of it may stay known, and a smaller beta reaches it
(`tests/bench/patches/README.md`). `simnpo` averages answers over their length.

Source: Zhang et al. 2024, "Negative preference optimization"; beta 0.1 and both weights 1 with NLL on
the retain set (their NPO+RT) are the configuration of their code and of open-unlearning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from approx.methods.preference.preference import Preference


@dataclass(frozen=True)
class Npo(Preference):
    """NPO with the inverse temperature `beta`: towards 0 the loss becomes gradient ascent."""

    name: ClassVar[str] = "npo"
    paper: ClassVar[str] = "Zhang et al. 2024, Negative preference optimization"
