"""Apply a method of unlearning to a model, on a patch or on full weights, and report on it.

Everything is checked before anything is computed. The model is changed in place and always ends with
weights that were checked (see `descent`). Task arithmetic fine-tunes with the same loop, in one round
and without a bound on utility because the tuned model is not the result, and subtracts. Its alpha is
searched under the bound, or given and checked against it. If a continued run has nothing left to tune,
the search has no time limit. A tuning that did not finish gives no task vector, and the first weights
are restored. A saved run is erased when the run is over, unless the caller erases it, and kept when it
is out of time.

    end = unlearn(patched_model, Sets(forget, retain), make_method("npo"), ScheduleSettings(), Bounds())
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from approx.methods.method import Method, hyperparameters
from approx.methods.task_arithmetic import (
    TaskArithmetic,
    check_fresh_patch,
    negate_patch,
    negate_weights,
)
from approx.unlearning.descent import Descent
from approx.unlearning.examples import Sets, check_sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge, StepLog
from approx.unlearning.target import Target, TargetKind
from sisa.core.errors import InvalidInput


def unlearn(
    model: Any,
    sets: Sets,
    method: Method,
    settings: ScheduleSettings,
    bounds: Bounds,
    *,
    saved: SavedRun | None = None,
    progress: Callable[[StepLog], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> End:
    """Apply a method to the parameters of `model` that require a gradient.

    The model as it is now is the reference. A saved run is continued, with the model that it was
    started with. Raise InvalidInput (sets, values, a model in which nothing can train), ConfigConflict
    (another run's saved state), IntegrityError (damage) or EnvironmentFault (the disk).
    """
    check_sets(sets, method)
    target = Target(model, with_reference=bool(method.compares))
    if isinstance(method, TaskArithmetic):
        settings = replace(settings, num_rounds=1)  # the search is over the scale instead

    def descent(bounds: Bounds) -> Descent:
        return Descent(
            target, sets, method, settings, bounds, saved=saved, progress=progress, clock=clock
        )

    if isinstance(method, TaskArithmetic):
        end = _tune_and_negate(target, method, bounds, descent, clock)
    else:
        end = descent(bounds).run()
    if saved is not None and not saved.kept and end.ending != Ending.OUT_OF_TIME:
        saved.erase()
    return end


def _tune_and_negate(
    target: Target,
    method: TaskArithmetic,
    bounds: Bounds,
    descent: Callable[[Bounds], Descent],
    clock: Callable[[], float],
) -> End:
    """Leave the model at base - alpha * (tuned - base), with alpha 0 when no other value was kept."""
    _check_search_is_bounded(method, bounds)
    started, base = clock(), target.snapshot()
    if target.kind == "patch":
        check_fresh_patch(base)
    before = bounds.measured_before(target.model)
    knew = bounds.known(target.model, thorough=True)
    tuning = replace(bounds, utility=None, max_utility_drop=None, knowledge=None)
    run = descent(tuning)
    end = replace(run.run(), utility_before=before, alpha=0.0, knowledge_before=knew, knowledge=knew)
    if end.ending != Ending.FINISHED:
        target.put(base)
        why = f"fine-tuning: {end.why}; the first weights were restored"
        return replace(end, why=why, step=0, utility=before)
    if run.num_taken == 0:
        bounds = replace(bounds, max_seconds=None)
    bounds = bounds.with_target_below(knew)
    search = _Search(target, base, target.snapshot(), bounds, _Scale(0.0, before, knew), started, clock)
    best = search.run(method.alphas if method.alpha is None else (method.alpha,))
    target.put(search.negated(best.alpha))
    return replace(
        end,
        ending=search.ending(),
        why=search.why(),
        utility=best.utility,
        knowledge=best.knowledge,
        compute=replace(end.compute, seconds=end.compute.seconds + search.seconds()),
        alpha=best.alpha,
    )


@dataclass(frozen=True)
class _Scale:
    alpha: float
    utility: float | None
    knowledge: Knowledge | None


@dataclass
class _Search:
    """The search for the scale of one task vector; each scale is tried on the model."""

    target: Target
    base: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    bounds: Bounds
    before: _Scale
    started: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.best = self.before
        self._began = self.clock()
        self._late = False
        self._broke: _Scale | None = None

    def negated(self, alpha: float) -> dict[str, Tensor]:
        negate = negate_patch if self.target.kind == "patch" else negate_weights
        return negate(self.base, self.tuned, alpha)

    def run(self, alphas: Iterable[float]) -> _Scale:
        """Return the best scale, from the smallest up to the first one that breaks the bound."""
        limit = self.bounds.max_seconds
        for alpha in sorted(alphas):
            self._late = limit is not None and self.clock() - self.started >= limit
            if self._late:
                break
            tried = self._tried(alpha)
            if not self.bounds.allow(tried.utility, self.before.utility):
                self._broke = tried
                break
            if self.bounds.is_better(tried.knowledge, self.best.knowledge):
                self.best = tried
            if self.bounds.is_enough(self.best.knowledge, at_end=True):
                break
        return self.best

    def _tried(self, alpha: float) -> _Scale:
        self.target.put(self.negated(alpha))
        model = self.target.model
        return _Scale(alpha, self.bounds.measured(model), self.bounds.known(model, thorough=False))

    def seconds(self) -> float:
        return self.clock() - self._began

    def ending(self) -> Ending:
        if self._late:
            return Ending.OUT_OF_TIME
        known = self.best.knowledge is not None and self.best.knowledge.num_known > 0
        held_back = self._broke and (self.best.alpha == 0 or known)
        return Ending.BELOW_UTILITY_BOUND if held_back else Ending.FINISHED

    def why(self) -> str:
        alpha = self.best.alpha
        if self._late:
            return f"the time limit was reached in the search; alpha {alpha:g} is the last within bounds"
        if self._broke is not None:
            held = "the bound on utility stopped it: " * (self.ending() != Ending.FINISHED)
            found = f"at {self._broke.alpha:g} utility was {self._broke.utility}"
            return f"{held}alpha {alpha:g}: {found}, from {self.before.utility}"
        if self.bounds.is_enough(self.best.knowledge, at_end=True):
            return f"nothing is known with alpha {alpha:g}"
        return f"alpha {alpha:g}, of those asked for"


def _check_search_is_bounded(method: TaskArithmetic, bounds: Bounds) -> None:
    if method.alpha is None and bounds.max_utility_drop is None:
        raise InvalidInput(
            "alpha can't be searched without a bound on utility",
            where=method.name,
            expected="alpha, or a measure of utility with max_utility_drop",
            next_step="give one of them",
        )


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
    deletion. `before` and `after` are the caller's metrics by name. `full_tokens` are the positions of
    the fine-tuning that taught the knowledge, if known, for the share of its cost.
    """

    method: Method
    settings: ScheduleSettings
    target: TargetKind
    end: End
    before: Mapping[str, float]
    after: Mapping[str, float]
    full_tokens: int | None = None
    more_limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; numbers that are not finite become null."""
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
    """Return how many texts are still known, and why a run did not forget more."""
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
