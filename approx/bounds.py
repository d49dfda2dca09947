"""What stops a run early, and how a run ends.

Rules: a bound that was hit is an ending, not an exception: there are weights, and they are good. Utility
is better when larger; its bound is a drop in its own units from what it was before. `End.step` names the
weights that the model holds, not where the run broke off.

Not covered: what utility is: the caller measures it.

>>> Ending.DIVERGED == "diverged"
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from approx.compute import Compute
from approx.method import above_zero, at_least_zero, refuse_values
from sisa.errors import InvalidInput, Problem

Utility = Callable[[Any], float]


class Ending(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    OUT_OF_TIME = "out_of_time"
    BELOW_UTILITY_BOUND = "below_utility_bound"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Bounds:
    """What stops a run early. `utility` gets the model, in evaluation, and returns a number that is
    better when larger; it may fall by `max_utility_drop`, in its own units, from where it was before."""

    max_seconds: float | None = None
    utility: Utility | None = None
    max_utility_drop: float | None = None
    check_every: int = 10

    def __post_init__(self) -> None:
        given = {"max_seconds": self.max_seconds, "max_utility_drop": self.max_utility_drop}
        alone = self.max_utility_drop is not None and self.utility is None
        refuse_values(
            "bounds",
            at_least_zero(**{name: value for name, value in given.items() if value is not None}),
            above_zero(check_every=self.check_every),
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
