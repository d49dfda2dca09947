"""The report of a run of approximate unlearning: how it ended, measures, cost and known limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from approx.patches.patch_measures import MEASURE_LIMITS
from approx.patches.patch_settings import PatchSettings
from approx.patches.selection import Selected
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
    deletion. `before` and `after` are measures by name, and `sets` what was trained on and measured.
    What a run that was suspended has not measured is left out.
    """

    settings: PatchSettings
    selected: Selected
    end: End
    sets: Mapping[str, Any]
    num_beneath: int
    patch_made: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    known: Knowledge | None = None
    reference: Mapping[str, float] | None = None
    robustness: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; numbers that are not finite become null."""
        settings, end = self.settings, self.end
        made: dict[str, Any] = {
            "approximate": True,
            "method": settings.method.name,
            "hyperparameters": asdict(settings.method),
            "settings": asdict(settings.pace),
            "bounds": asdict(settings.bounds),
            "selection": {**asdict(settings.selection), **self.selected.to_json()},
            "target": "patch",
            "ending": end.ending.value,
            "why": end.why,
            "step": end.step,
            "num_steps": end.num_steps,
            "alpha": end.alpha,
            "learning_rate_kept": end.learning_rate,
            "utility_before": end.utility_before,
            "utility": end.utility,
            "compute": end.compute.to_json(),
            "sets": self.sets,
            "num_beneath": self.num_beneath,
            "patch_made": self.patch_made,
            "metrics_before": self.before,
            "metrics_after": self.after,
            "limits": [*REPORT_LIMITS, *MEASURE_LIMITS],
        }
        if self.known is not None:
            made |= {**outcome(end, self.known), "robustness": self.robustness}
        if self.reference is not None:
            made["metrics_reference"] = self.reference
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
