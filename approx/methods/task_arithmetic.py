"""Task arithmetic: learn the forget set by heart, then go in the opposite direction.

    tuned = fine-tuning of a fresh patch on the forget set, L = NLL(forget)
    it changes the weights by s * B A, with B = 0 before; result: A, -alpha * B

Alpha 0 returns the fresh patch bit for bit. `alpha` is given, or searched among `alphas` from the
smallest up to the first that breaks the bound on utility or leaves nothing known. One scale serves all
layers. The patch must be fresh (every B is 0), because the negative of a difference of two products does
not fit into one patch of the same rank.

The fine-tuning has one round and no bounds, since the tuned model is not the result. If it does not
finish, the first weights are restored. If a continued run has nothing left to tune, the search has no
time limit.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 3: one scale for all
weights, from 0.0, 0.05, ..., 1.0, chosen on held-out data as the one that forgets most while the
control task keeps 95 % of the pre-trained model's accuracy. A text that a base knows by heart leaves
little to learn, so this grid goes beyond 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from approx.methods.method import Family, Method, Role, mean_nll
from approx.unlearning.descent import Descent
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge
from approx.unlearning.target import Rows, check_fresh_patch, is_second_factor
from approx.unlearning.unlearn import Run
from approx.unlearning.value_checks import above_zero, at_least_zero, given
from sisa.core.errors import Problem

GRID = (
    *(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    *(12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
)
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """Task arithmetic with a given `alpha`, or None to search among `alphas`."""

    alpha: float | None = None
    alphas: tuple[float, ...] = GRID
    name: ClassVar[str] = "task_arithmetic"
    family: ClassVar[Family] = "task vectors"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic"

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each scale that is not a number above 0."""
        yield from at_least_zero(**given(alpha=self.alpha))
        if not self.alphas:
            yield Problem("alphas", "none given")
        yield from above_zero(**{f"alphas[{number}]": each for number, each in enumerate(self.alphas)})

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return the loss of the fine-tuning, which falls as the forget set is learnt."""
        return mean_nll(rows["forget"].current_BTV, rows["forget"].batch)

    def patch_problems(self, *, bounded: bool, selected: bool) -> Iterator[Problem]:  # noqa: ARG002
        """Yield a problem if alpha is to be searched without a bound."""
        if self.alpha is None and not bounded:
            yield Problem("alpha", "can't be searched without a bound: give it, or max_utility_drop")

    def apply(self, run: Run) -> End:
        """Leave the patch with -alpha times what it was tuned to; alpha is 0 when no other was kept."""
        target, bounds, clock = run.target, run.bounds, run.clock
        unbounded = replace(bounds, utility=None, max_utility_drop=None, knowledge=None)
        once = replace(run.pace, num_rounds=1)  # the search for alpha replaces further rounds
        tuning = Descent(self, run._replace(pace=once, bounds=unbounded))
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
            self.alphas if self.alpha is None else (self.alpha,),
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


def negate_patch(fresh: Tensors, tuned: Tensors, alpha: float) -> dict[str, Tensor]:
    """Return a LoRA patch whose change of the weights is -alpha times the tuned one's."""
    if alpha == 0:
        return {name: each.clone() for name, each in fresh.items()}
    return {
        name: each * -alpha if is_second_factor(name) else each.clone() for name, each in tuned.items()
    }


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
