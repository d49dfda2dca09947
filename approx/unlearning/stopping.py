"""What a run may do, when it has done enough, and how it ends.

A bound that was hit is an ending, not an exception: there are weights, and they are good. Utility is
better when larger; its bound is a drop in its own units from what it was before. Knowledge of the forget
set is better when less. Both are measured by the caller. `End.step` names the weights that the model
holds, not where the run broke off.

>>> Ending.DIVERGED == "diverged"
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import torch

from approx.methods.method import above_zero, at_least_zero, check_values
from approx.unlearning.compute import Compute
from sisa.core.errors import InvalidInput, Problem

Utility = Callable[[Any], float]


@dataclass(frozen=True)
class Knowledge:
    """What a model still says of a forget set: how many texts it knows, as the probe counts them, of how
    many that were asked; and the mean probability of their answers."""

    num_known: int
    num_asked: int
    probability: float


class Knows(Protocol):
    """Measures knowledge."""

    def __call__(self, model: Any, *, thorough: bool) -> Knowledge:
        """Without `thorough`, a text that may be known counts as known, and nothing is generated."""
        ...


class Ending(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    OUT_OF_TIME = "out_of_time"
    BELOW_UTILITY_BOUND = "below_utility_bound"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Bounds:
    """What stops a run early. `utility` gets the model, in evaluation, and returns a number that is
    better when larger; it may fall by `max_utility_drop`, in its own units, from where it was before.
    With a measure of knowledge a run ends as soon as nothing is known and answers have at most
    `target_probability`, and at the end of a round when nothing is known."""

    max_seconds: float | None = None
    utility: Utility | None = None
    max_utility_drop: float | None = None
    check_every: int = 10
    knowledge: Knows | None = None
    target_probability: float = 0.0

    def __post_init__(self) -> None:
        given = {"max_seconds": self.max_seconds, "max_utility_drop": self.max_utility_drop}
        alone = self.max_utility_drop is not None and self.utility is None
        check_values(
            "bounds",
            at_least_zero(**{name: value for name, value in given.items() if value is not None}),
            above_zero(check_every=self.check_every),
            at_least_zero(target_probability=self.target_probability),
            [Problem("max_utility_drop", "given without a measure of utility")] if alone else [],
        )

    def measured(self, model: Any) -> float | None:
        """Utility of a model as it is, in evaluation; None where it is not measured."""
        if self.utility is None:
            return None
        with torch.no_grad():
            found = float(self.utility(model.eval()))
        model.eval()
        return found

    def measured_before(self, model: Any) -> float | None:
        """Utility before anything was changed. Raises InvalidInput when it is no finite number."""
        found = self.measured(model)
        if found is not None and not math.isfinite(found):
            raise InvalidInput(
                "utility is no finite number before anything was changed",
                where="utility",
                got=str(found),
                next_step="mend the measure of utility, or the model",
            )
        return found

    def allow(self, utility: float | None, before: float | None) -> bool:
        """Whether utility may be so; what is no number never may.

        >>> bounds = Bounds(utility=len, max_utility_drop=0.25)
        >>> bounds.allow(0.5, before=0.75), bounds.allow(0.4, before=0.75), bounds.allow(math.nan, 0.75)
        (True, False, False)
        """
        if utility is None or before is None:
            return True
        drop = math.inf if self.max_utility_drop is None else self.max_utility_drop
        return utility >= before - drop

    def known(self, model: Any, *, thorough: bool) -> Knowledge | None:
        """What a model still says of the forget set; None where that is not measured."""
        return None if self.knowledge is None else self.knowledge(model.eval(), thorough=thorough)

    def is_better(self, one: Knowledge | None, other: Knowledge | None) -> bool:
        """Whether one point says less than another, earlier one; what is below the target is alike.

        >>> bounds = Bounds(target_probability=0.1)
        >>> known, less, least = (Knowledge(n, 4, p) for n, p in ((1, 0.5), (0, 0.08), (0, 0.01)))
        >>> bounds.is_better(less, known), bounds.is_better(least, less), bounds.is_better(None, None)
        (True, False, True)
        """
        if one is None or other is None:
            return True
        return self._rank(one) < self._rank(other)

    def _rank(self, found: Knowledge) -> tuple[int, float]:
        return found.num_known, max(found.probability, self.target_probability)

    def aiming_below(self, before: Knowledge | None) -> Bounds:
        """The same with a target that is below where a run begins."""
        if before is None:
            return self
        return replace(self, target_probability=min(self.target_probability, before.probability / 2))

    def is_enough(self, found: Knowledge | None, *, at_end: bool) -> bool:
        """Whether a run may end with this."""
        if found is None or found.num_known:
            return False
        return at_end or found.probability <= self.target_probability


@dataclass(frozen=True)
class StepLog:
    """One step, for the log. Losses are those before its update."""

    step: int
    num_steps: int
    loss: float
    forget: float
    retain: float | None
    gradient_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class End:
    """How a run ended, and which weights the model holds now: those after `step` steps."""

    ending: Ending
    why: str
    step: int
    num_steps: int
    utility_before: float | None
    utility: float | None
    compute: Compute
    alpha: float | None = None
    learning_rate: float | None = None  # of the round in which these weights were found
    knowledge_before: Knowledge | None = None
    knowledge: Knowledge | None = None
