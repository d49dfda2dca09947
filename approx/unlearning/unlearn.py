"""A run of a method of unlearning over a patch.

The patch is changed in place and always ends with weights that were checked.

    end = unlearn(patched_model, Sets(forget, retain), make_method("npo"), Pace(), Bounds())
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from approx.unlearning.causal_tracing import choose_layer
from approx.unlearning.examples import Sets, check_sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.schedule import Pace
from approx.unlearning.stopping import Bounds, End, StepLog
from approx.unlearning.target import Target

if TYPE_CHECKING:
    from approx.methods.method import Method


class Run(NamedTuple):
    """What a method is applied to, at which pace and within which bounds.

    A run that is `saved` continues from there; a method without steps of its own saves none.
    """

    target: Target
    sets: Sets
    pace: Pace
    bounds: Bounds
    saved: SavedRun | None = None
    progress: Callable[[StepLog], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic


def unlearn(
    model: Any,
    sets: Sets,
    method: Method,
    pace: Pace,
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
    return method.apply(Run(target, sets, pace, bounds, saved, progress, clock))
