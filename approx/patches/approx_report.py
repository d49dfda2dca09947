"""The report of a run of approximate unlearning: how it ended, measures, cost and known limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from approx.methods.method import Method
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.stopping import End, Ending, Knowledge

REPORT_LIMITS = (
    "This is an estimate, not a proof: the model was trained away from the forget set, and is not the "
    "model that training without it would have given.",
    "What is no longer said can still be there: other wordings, a few steps of training, or lower "
    "precision may bring it back.",
    "Metrics describe only the examples that they were measured on.",
    "Operations are estimated from counts of parameters and tokens.",
)


@dataclass(frozen=True)
class ApproxReport:
    """The report of one run of approximate unlearning, without text or ids.

    `approximate` is always true. The class shares no base with anything that certifies an exact
    deletion. `before` and `after` are the caller's metrics by name.
    """

    method: Method
    settings: ScheduleSettings
    end: End
    before: Mapping[str, float]
    after: Mapping[str, float]
    more_limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; numbers that are not finite become null."""
        made = {
            "approximate": True,
            "method": self.method.name,
            "hyperparameters": asdict(self.method),
            "settings": asdict(self.settings),
            "target": "patch",
            "ending": self.end.ending.value,
            "why": self.end.why,
            "step": self.end.step,
            "num_steps": self.end.num_steps,
            "alpha": self.end.alpha,
            "learning_rate_kept": self.end.learning_rate,
            "utility_before": self.end.utility_before,
            "utility": self.end.utility,
            "compute": self.end.compute.to_json(),
            "metrics_before": dict(self.before),
            "metrics_after": dict(self.after),
            "limits": [*REPORT_LIMITS, *self.more_limits],
        }
        return {name: _finite(value) for name, value in made.items()}


def outcome(end: End, after: Knowledge) -> dict[str, Any]:
    """Return how many texts are still known, and why a run did not forget more.

    Texts of which nothing is known, but whose answers have more than half of the probability that they
    had, are only weakened.
    """
    before = end.knowledge_before
    known = {"before": before.num_known if before else None, "after": after.num_known}
    if after.num_known:
        word = "held back by the bound" if end.ending == Ending.BELOW_UTILITY_BOUND else "still known"
    elif before is None:
        word = "forgotten"
    elif not before.num_known:
        word = "was not known"
    else:
        word = "forgotten" if after.probability <= before.half else "weakened"
    return {"outcome": word, "still_known": {**known, "of": after.num_asked}}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
