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
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import torch

from approx.methods.method import at_least_zero, check_values, whole_numbers
from sisa.core.errors import InvalidInput, Problem


@dataclass(frozen=True)
class Compute:
    """Counts of a run; `tokens_forward` were only looked at (reference, probes), not trained on."""

    num_parameters: int
    num_trained: int
    tokens_trained: int
    tokens_forward: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations, estimated."""
        trained = self.tokens_trained * (4 * self.num_parameters + 2 * self.num_trained)
        return trained + self.tokens_forward * 2 * self.num_parameters

    def share_of_full_finetuning(self, full_tokens: int) -> float:
        """Ratio to a fine-tuning of all weights that computes `full_tokens` positions, all epochs."""
        return self.flops / (6 * self.num_parameters * full_tokens)

    def to_json(self, full_tokens: int | None) -> dict[str, Any]:
        """Counts with their units; the share is null when the full fine-tuning's tokens are unknown."""
        return {
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "tokens_trained": self.tokens_trained,
            "tokens_forward_only": self.tokens_forward,
            "flops_estimated": self.flops,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "share_of_full_finetuning": full_tokens and self.share_of_full_finetuning(full_tokens),
        }


def peak_memory_bytes() -> int:
    """The most memory that this process, or torch on its GPU, has held so far."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


@dataclass(frozen=True, kw_only=True)
class BoundSettings:
    """The bounds that are settings: the drop of utility, the target, and how often to measure."""

    max_utility_drop: float | None = None
    target_probability: float = 0.1
    check_every: int = 10

    def __post_init__(self) -> None:
        drop = {} if self.max_utility_drop is None else {"max_utility_drop": self.max_utility_drop}
        check_values(
            "the bounds",
            at_least_zero(target_probability=self.target_probability, **drop),
            whole_numbers(1, check_every=self.check_every),
            self._more_problems(),
        )

    def _more_problems(self) -> Iterator[Problem]:
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Bounds(BoundSettings):
    """The conditions that stop a run early, and how they are measured.

    `utility` gets the model in evaluation mode and returns a number that is better when larger. It may
    fall by `max_utility_drop`, in its own units, from its value before the run. With a measure of
    knowledge, a run ends as soon as nothing is known and answers have at most `target_probability`, and
    at the end of a round when nothing is known.
    """

    target_probability: float = 0.0
    max_seconds: float | None = None
    utility: Utility | None = None
    knowledge: Knows | None = None

    def _more_problems(self) -> Iterator[Problem]:
        if self.max_seconds is not None:
            yield from at_least_zero(max_seconds=self.max_seconds)
        if self.max_utility_drop is not None and self.utility is None:
            yield Problem("max_utility_drop", "given without a measure of utility")

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
