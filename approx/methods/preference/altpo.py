"""AltPO: prefer answers that the base writes itself to the one to forget.

    F = mean over pairs of -(2 / beta) * log sigmoid(beta * (s(alternate) - s(forget)))
    L = forget_weight * F + retain_weight * R(retain),   R = NLL or KL(reference || current)
    s = log p(answer) - log p_reference(answer), the whole answer

Each forget example is in one pair with each of its alternates, so an epoch sees it `num_alternates`
times. The loss is that of `idk_dpo`; the positive answers make the difference: they stay in the form of
the forgotten ones, so the model need not refuse, or say nonsense. What an alternate says is made up.
`unlearning/written/alternates.py` says how the base writes it.

`reference_free` leaves the reference out of s, and `length_normalised` divides s by the answer's
length, as in SimPO and `simnpo`; both together need no reference. They are variants of this project,
not of the paper; a suitable beta is then larger (`simnpo`: 4.5).

Source: Mekala et al. 2025, "Alternate preference optimization for unlearning factual knowledge in large
language models". Defaults are those of open-unlearning (`src/trainer/unlearn/dpo.py`; beta 0.1, both
weights 1, NLL on the retain set; `community/methods/AltPO`: 5 alternates, drawn at temperature 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from approx.methods.method import Alternative, Role
from approx.methods.preference.preference import Preference
from approx.unlearning.value_checks import booleans, whole_numbers
from approx.unlearning.written.alternates import write_alternates
from approx.unlearning.written.preferred import Prepared, Writing
from sisa.core.errors import Problem

MAX_ALTERNATES = 100


@dataclass(frozen=True)
class AltPo(Preference):
    """AltPO with `num_alternates` for each forget example."""

    reference_free: bool = False
    length_normalised: bool = False
    num_alternates: int = 5
    name: ClassVar[str] = "altpo"
    paper: ClassVar[str] = "Mekala et al. 2025, Alternate preference optimization"
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget", "preferred"})
    prefers: ClassVar[Alternative] = "alternates"

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the loss is not defined."""
        yield from super().problems()
        yield from booleans(reference_free=self.reference_free, length_normalised=self.length_normalised)
        yield from whole_numbers(1, MAX_ALTERNATES, num_alternates=self.num_alternates)

    def write_preferred(self, writing: Writing) -> Prepared:
        """Return the sets with each forget example once beside every alternate."""
        model, tokenizer, records, sets, pace, sequence_len, _ = writing
        num = self.num_alternates
        written = write_alternates(model, tokenizer, records, num, pace.seed, sequence_len)
        repeated = [each for each in sets.forget for _ in range(num)]
        others = [other for found in written.alternates for other in found]
        return Prepared(replace(sets, forget=repeated, preferred=others), written.cost)
