"""Task arithmetic: learn the forget set by heart, then go in the opposite direction.

    tuned = fine-tuning of a fresh patch on the forget set, L = NLL(forget)
    it changes the weights by s * B A, with B = 0 before; result: A, -alpha * B

Alpha 0 returns the fresh patch bit for bit. `alpha` is given, or searched among `alphas` from the
smallest up to the first that breaks the bound on utility or leaves nothing known. One scale serves all
layers. The patch must be fresh (every B is 0), because the negative of a difference of two products does
not fit into one patch of the same rank.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 3: one scale for all
weights, from 0.0, 0.05, ..., 1.0, chosen on held-out data as the one that forgets most while the
control task keeps 95 % of the pre-trained model's accuracy. A text that a base knows by heart leaves
little to learn, so this grid goes beyond 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from approx.methods.method import Family, Method, Role, Rows, mean_nll
from approx.methods.value_checks import above_zero, at_least_zero
from sisa.core.errors import InvalidInput, Problem

GRID = (
    *(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    *(12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
)
SECOND_FACTORS = ("lora_B.", "lora_embedding_B.")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """Task arithmetic with a given `alpha`, or None to search among `alphas`."""

    alpha: float | None = None
    alphas: tuple[float, ...] = GRID
    name: ClassVar[str] = "task_arithmetic"
    family: ClassVar[Family] = "task vectors"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic"

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each scale that is not a number above 0."""
        yield from at_least_zero(**({} if self.alpha is None else {"alpha": self.alpha}))
        if not self.alphas:
            yield Problem("alphas", "none given")
        yield from above_zero(**{f"alphas[{number}]": each for number, each in enumerate(self.alphas)})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return the loss of the fine-tuning, which falls as the forget set is learnt."""
        return mean_nll(rows["forget"].current_BTV, rows["forget"].batch)


def negate_patch(fresh: Tensors, tuned: Tensors, alpha: float) -> dict[str, Tensor]:
    """Return a LoRA patch whose change of the weights is -alpha times the tuned one's."""
    if alpha == 0:
        return {name: each.clone() for name, each in fresh.items()}
    return {
        name: each * -alpha if _is_second_factor(name) else each.clone() for name, each in tuned.items()
    }


def check_fresh_patch(patch: Tensors) -> None:
    """Raise InvalidInput for a patch that already changes the weights."""
    used = [name for name, each in patch.items() if _is_second_factor(name) and bool(each.any())]
    if used:
        raise InvalidInput(
            "the method needs a fresh patch, and this one already changes the model",
            where="patch",
            expected="second factors (lora_B) of 0",
            got=f"{len(used)} of them are not 0",
            next_step="start from a new patch",
        )


def _is_second_factor(name: str) -> bool:
    return any(part in name for part in SECOND_FACTORS)
