"""The bounds of a run, what is measured for them, and its end.

A bound that is reached is an ending, not an exception: the weights are usable. Utility is better when
larger, knowledge of the forget set when smaller. The caller measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from approx.unlearning.compute import Compute
from approx.unlearning.value_checks import at_least_zero, check_values, given, whole_numbers
from sisa.core.errors import InvalidInput, Problem


class Knowledge(NamedTuple):
    """What a model still says of a forget set, by the probe's criterion.

    `probability` is the mean of the texts' answers.
    """

    num_known: int
    num_asked: int
    probability: float

    @property
    def half(self) -> float:
        """Return the probability that answers may have at most once they are forgotten."""
        return self.probability / 2


class Ending(StrEnum):
    """The ways in which a run ends."""

    FINISHED = "finished"
    OUT_OF_TIME = "out_of_time"
    BELOW_UTILITY_BOUND = "below_utility_bound"
    DIVERGED = "diverged"


@dataclass(frozen=True, kw_only=True)
class BoundSettings:
    """The bounds that are settings: the drop of utility, the target, how often to measure, and patience.

    A run ends after `patience` rounds in a row in which no better weights were found.
    """

    max_utility_drop: float | None = 0.1
    target_probability: float = 0.1
    check_every: int = 10
    patience: int = 3

    def __post_init__(self) -> None:
        check_values("the bounds", self.problems())

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value that is no bound."""
        yield from at_least_zero(
            target_probability=self.target_probability, **given(max_utility_drop=self.max_utility_drop)
        )
        yield from whole_numbers(1, check_every=self.check_every, patience=self.patience)


@dataclass(frozen=True, kw_only=True)
class Bounds(BoundSettings):
    """The conditions that stop a run early, and how they are measured, in evaluation mode.

    Utility may fall by `max_utility_drop`, in its own units, from its value before the run. With a
    measure of knowledge, a run ends as soon as nothing is known and answers have at most
    `target_probability`, and at the end of a round when nothing is known and they have at most
    `round_probability`. A measure that is not thorough generates nothing and counts texts that may be
    known.
    """

    max_utility_drop: float | None = None
    target_probability: float = 0.0
    round_probability: float = 1.0
    max_seconds: float | None = None
    utility: Callable[[Any], float] | None = None
    knowledge: Callable[[Any, bool], Knowledge] | None = None  # of a model, and whether to be thorough

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value that is no bound, or can't be measured."""
        yield from super().problems()
        yield from at_least_zero(**given(max_seconds=self.max_seconds))
        if self.max_utility_drop is not None and self.utility is None:
            yield Problem("max_utility_drop", "given without a measure of utility")

    def utility_of(self, model: Any) -> float | None:
        """Return the utility of a model, or None when it is not measured."""
        if self.utility is None:
            return None
        with torch.no_grad():
            found = float(self.utility(model.eval()))
        model.eval()
        return found

    def utility_before(self, model: Any) -> float | None:
        """Return the utility before any change. Raise InvalidInput if it is not finite."""
        found = self.utility_of(model)
        if found is not None and not math.isfinite(found):
            raise InvalidInput(
                "utility is not a finite number before any change",
                where="utility",
                got=str(found),
                next_step="correct the measure of utility, or the model",
            )
        return found

    def allow(self, utility: float | None, before: float | None) -> bool:
        """Return whether the bound allows this utility. A value that is not a number is never allowed.

        >>> bounds = Bounds(utility=len, max_utility_drop=0.25)
        >>> bounds.allow(0.5, before=0.75), bounds.allow(0.4, before=0.75), bounds.allow(math.nan, 0.75)
        (True, False, False)
        """
        if utility is None or before is None:
            return True
        drop = math.inf if self.max_utility_drop is None else self.max_utility_drop
        return utility >= before - drop

    def knowledge_of(self, model: Any, *, thorough: bool) -> Knowledge | None:
        """Return a model's knowledge of the forget set, or None when it is not measured."""
        return None if self.knowledge is None else self.knowledge(model.eval(), thorough)

    def is_better(self, one: Knowledge | None, other: Knowledge | None) -> bool:
        """Return whether one point knows less than an earlier one.

        Probabilities below the target count as equal.

        >>> bounds = Bounds(target_probability=0.1)
        >>> known, less, least = (Knowledge(n, 4, p) for n, p in ((1, 0.5), (0, 0.08), (0, 0.01)))
        >>> bounds.is_better(less, known), bounds.is_better(least, less), bounds.is_better(None, None)
        (True, False, True)
        """
        if one is None or other is None:
            return True
        ranks = [(e.num_known, max(e.probability, self.target_probability)) for e in (one, other)]
        return ranks[0] < ranks[1]

    def with_targets_below(self, before: Knowledge | None) -> Bounds:
        """Return the bounds with targets of at most half of the probability at the start of a run.

        An answer that is no longer the likeliest may have lost little of its probability: three steps of
        training then bring it back.

        >>> Bounds(target_probability=0.1).with_targets_below(Knowledge(4, 4, 0.9)).round_probability
        0.45
        """
        if before is None:
            return self
        target = min(self.target_probability, before.half)
        return replace(self, target_probability=target, round_probability=before.half)

    def is_enough(self, found: Knowledge | None, *, at_end: bool) -> bool:
        """Return whether a run may end with this knowledge, at the end of a round or within it."""
        if found is None or found.num_known:
            return False
        return found.probability <= (self.round_probability if at_end else self.target_probability)


@dataclass(frozen=True)
class StepLog:
    """The log entry of one step. Losses are those before its update."""

    step: int
    num_steps: int
    loss: float
    retain: float | None
    gradient_norm: float


@dataclass(frozen=True)
class End:
    """How a run ended. The model holds the weights after `step` steps."""

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
