"""Apply a method of unlearning to a patch, and report on it.

The patch is changed in place and always ends with weights that were checked (see `descent.py`). Task
arithmetic fine-tunes with the same loop, in one round and without bounds since the tuned model is not
the result, and then subtracts. If the tuning does not finish, the first weights are restored. If a
continued run has nothing left to tune, the search for alpha has no time limit.

    end = unlearn(patched_model, Sets(forget, retain), make_method("npo"), ScheduleSettings(), Bounds())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from approx.methods.editing.editing import Edit
from approx.methods.method import Method
from approx.methods.task_arithmetic import TaskArithmetic, check_fresh_patch, negate_patch
from approx.unlearning.causal_tracing import choose_layer
from approx.unlearning.descent import Descent
from approx.unlearning.editing import Editing
from approx.unlearning.examples import Sets, check_sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge, StepLog
from approx.unlearning.target import Target


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
    """Apply a method to the LoRA patch of `model` that requires a gradient.

    The model as it is now is the reference. A saved run is continued, with the model that it was
    started with. Raise InvalidInput (sets, values, a model in which nothing can train), ConfigConflict
    (another run's saved state), IntegrityError (damage) or EnvironmentFault (the disk).
    """
    check_sets(sets, method)
    target = Target(model)
    method = choose_layer(method, target.model, sets)
    if isinstance(method, Edit):
        return Editing(target, sets, method, bounds, progress, clock).run()
    if isinstance(method, TaskArithmetic):
        once = replace(settings, num_rounds=1)  # the search for alpha replaces further rounds
        unbounded = replace(bounds, utility=None, max_utility_drop=None, knowledge=None)
        tuning = Descent(target, sets, method, once, unbounded, saved, progress, clock)
        return _tune_and_negate(tuning, method, bounds)
    return Descent(target, sets, method, settings, bounds, saved, progress, clock).run()


def _tune_and_negate(tuning: Descent, method: TaskArithmetic, bounds: Bounds) -> End:
    """Leave the patch with -alpha times what it was tuned to; alpha is 0 when no other was kept."""
    target, clock = tuning.target, tuning.clock
    started, fresh = clock(), target.snapshot()
    check_fresh_patch(fresh)
    before = bounds.utility_before(target.model)
    knew = bounds.knowledge_of(target.model, thorough=True)
    end = tuning.run()
    end = replace(end, utility_before=before, alpha=0.0, knowledge_before=knew, knowledge=knew)
    if end.ending != Ending.FINISHED:
        target.put(fresh)
        why = f"fine-tuning: {end.why}; the first weights were restored"
        return replace(end, why=why, step=0, utility=before)
    began, limit = clock(), None if tuning.num_taken == 0 else bounds.max_seconds
    tuned, bounds = target.snapshot(), bounds.with_targets_below(knew)

    def tried(alpha: float) -> _Scale:
        target.put(negate_patch(fresh, tuned, alpha))
        model = target.model
        return _Scale(alpha, bounds.utility_of(model), bounds.knowledge_of(model, thorough=False))

    best, ending, why = _search(
        method.alphas if method.alpha is None else (method.alpha,),
        _Scale(0.0, before, knew),
        tried,
        bounds,
        lambda: limit is not None and clock() - started >= limit,
    )
    target.put(negate_patch(fresh, tuned, best.alpha))
    return replace(
        end,
        ending=ending,
        why=why,
        utility=best.utility,
        knowledge=best.knowledge,
        compute=replace(end.compute, seconds=end.compute.seconds + clock() - began),
        alpha=best.alpha,
    )


class _Scale(NamedTuple):
    alpha: float
    utility: float | None
    knowledge: Knowledge | None


def _search(
    alphas: Iterable[float],
    before: _Scale,
    tried: Callable[[float], _Scale],
    bounds: Bounds,
    is_late: Callable[[], bool],
) -> tuple[_Scale, Ending, str]:
    """Return the best scale, from the smallest up to the first one that breaks the bound, and why."""
    best = before
    for alpha in sorted(alphas):
        if is_late():
            why = "the time limit was reached in the search"
            return best, Ending.OUT_OF_TIME, f"{why}; alpha {best.alpha:g} is the last within bounds"
        found = tried(alpha)
        if not bounds.allow(found.utility, before.utility):
            lost = f"utility was {found.utility}, from {before.utility}"
            why = f"alpha {best.alpha:g}: at {alpha:g} {lost}"
            if best.alpha == 0 or (best.knowledge is not None and best.knowledge.num_known > 0):
                return best, Ending.BELOW_UTILITY_BOUND, f"the bound on utility stopped it: {why}"
            return best, Ending.FINISHED, why
        if bounds.is_better(found.knowledge, best.knowledge):
            best = found
        if bounds.is_enough(best.knowledge, at_end=True):
            return best, Ending.FINISHED, f"nothing is known with alpha {best.alpha:g}"
    return best, Ending.FINISHED, f"alpha {best.alpha:g}, of those asked for"
