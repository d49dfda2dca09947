"""KL minimisation: ascend on the forget set and stay close to the original model on the retain set.

    L = -NLL(forget) + beta * KL(reference || current)(retain)

The KL is a mean over answer tokens of the retain rows, over the whole vocabulary, and exactly 0 at the
start. Its direction weighs words by the reference: what the model used to say must stay likely.

Source: TOFU (Maini et al. 2024, section 3, "KL minimization"), beta 1. Its code and that of
open-unlearning average the KL over prompt and padding as well, so with their batches the same beta has
less effect than here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from approx.methods.method import Losses, Role, Rows, above_zero, add_retain_term, check_values, mean_nll


@dataclass(frozen=True)
class KlMinimisation:
    """KL minimisation with the weight `beta` of the closeness to the reference."""

    beta: float = 1.0
    name: ClassVar[str] = "kl_minimisation"
    reads: ClassVar[frozenset[Role]] = frozenset({"forget", "retain"})
    compares: ClassVar[frozenset[Role]] = frozenset({"retain"})
    compares_answers: ClassVar[frozenset[Role]] = frozenset()

    def __post_init__(self) -> None:
        check_values(self.name, above_zero(beta=self.beta))

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        forget = -mean_nll(rows["forget"].current_BTV, rows["forget"].batch)
        return add_retain_term(forget, 1.0, rows, self.beta, "kl")
