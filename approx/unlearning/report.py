"""The report of approximate unlearning: what was done, what it cost, what was measured, what it is not.

`approximate` is always true in it; it shares no base class with anything that certifies an exact
deletion, and no field could make it one. It holds numbers, names and hyper-parameters, never text or
ids. Numbers that are not finite become null. The limits stand in every report; the caller may add some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from approx.methods.method import Method, hyperparameters
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.stopping import End, Ending, Knowledge
from approx.unlearning.target import TargetKind

REPORT_LIMITS = (
    "This is an estimate, not a proof: the model was trained away from the forget set, and is not the "
    "model that training without it would have given.",
    "What is no longer said can still be there: other wordings, a few steps of training, or lower "
    "precision may bring it back.",
    "Metrics speak of the examples that they were measured on.",
    "Operations are estimated from counts of parameters and tokens.",
)


@dataclass(frozen=True)
class ApproxReport:
    """One run. `before` and `after` are the caller's metrics by name; `full_tokens` are the positions of
    the fine-tuning that the knowledge came from, where it is known, for the share of its cost."""

    method: Method
    settings: ScheduleSettings
    target: TargetKind
    end: End
    before: Mapping[str, float]
    after: Mapping[str, float]
    full_tokens: int | None = None
    more_limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, with no NaN and no infinity among them."""
        made = {
            "approximate": True,
            "method": self.method.name,
            "hyperparameters": hyperparameters(self.method),
            "settings": asdict(self.settings),
            "target": self.target,
            "ending": self.end.ending.value,
            "why": self.end.why,
            "step": self.end.step,
            "num_steps": self.end.num_steps,
            "alpha": self.end.alpha,
            "learning_rate_kept": self.end.learning_rate,
            "utility_before": self.end.utility_before,
            "utility": self.end.utility,
            "compute": self.end.compute.to_json(self.full_tokens),
            "metrics_before": dict(self.before),
            "metrics_after": dict(self.after),
            "limits": [*REPORT_LIMITS, *self.more_limits],
        }
        return {name: _finite(value) for name, value in made.items()}


def outcome(end: End, after: Knowledge) -> dict[str, Any]:
    """What became of knowledge: how many texts are still known, and what kept a run from more."""
    before = end.knowledge_before
    known = {"before": before.num_known if before else None, "after": after.num_known}
    said = "forgotten" if before is None or before.num_known else "was not known"
    if after.num_known:
        said = "held back by the bound" if end.ending == Ending.BELOW_UTILITY_BOUND else "still known"
    return {"outcome": said, "still_known": {**known, "of": after.num_asked}}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
