"""Cut a method's schedule to a budget in operations, counted from the batches that its run will see.

Operations are those of `unlearning/compute.py` for the whole model, as if no hidden state were
remembered and the backward pass went down to the first layer, with the forward passes of the reference
and the final evaluation of the loss. The plan and the final count agree.

    pace = within(budget, method, sets, uncut(rate, batch_size, seed), sizes)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from approx.methods.method import Method
from approx.unlearning.compute import Compute
from approx.unlearning.examples import Sets
from approx.unlearning.schedule import Pace, plan_steps
from approx.unlearning.stopping import Bounds
from sisa.lm.base.tokens import Tokens

AT_THE_END = Bounds(check_every=10**6)
MANY_EPOCHS = 200


def uncut(rate: float, batch_size: int, seed: int) -> Pace:
    """Return a pace that is longer than any budget."""
    return Pace(
        learning_rate=rate,
        num_epochs=MANY_EPOCHS,
        batch_size=batch_size,
        max_steps=None,
        num_rounds=1,
        retain_batch_size=None,
        seed=seed,
    )


def within(budget: float, method: Method, sets: Sets, pace: Pace, sizes: tuple[int, int]) -> Pace:
    """Return the pace with the number of steps nearest to the budget, in operations."""
    costs, last = step_costs(method, sets, pace, sizes)
    return replace(pace, max_steps=nearest_steps(costs, last, budget))


def nearest_steps(costs: Sequence[float], last: Sequence[float], budget: float) -> int:
    """Return the number of steps, at least one, whose cost comes nearest to a budget.

    `costs[n]` is the cost of step n + 1, and `last[n]` the cost of ending the run after it.

    >>> nearest_steps([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], 7.4)
    2
    """
    spent, best, gap = 0.0, 1, float("inf")
    for number, (cost, ending) in enumerate(zip(costs, last, strict=True), 1):
        spent += cost
        if abs(spent + ending - budget) < gap:
            best, gap = number, abs(spent + ending - budget)
    return best


def step_costs(
    method: Method, sets: Sets, pace: Pace, sizes: tuple[int, int]
) -> tuple[list[float], list[float]]:
    """Return the operations of each step, and of the final evaluation of the loss after it.

    `sizes` are the parameters of the model, and those that are trained.
    """
    roles = {"forget": sets.forget, "retain": sets.retain, "preferred": sets.preferred}
    each_time = method.compares - method.compares_answers
    once = sum(_reference_positions(roles[role], pace) for role in method.compares_answers)
    costs, last = [], []
    for step in plan_steps(len(sets.forget), len(sets.retain), pace):
        trained = compared = 0
        for micro in step:
            for role in method.reads:
                rows = micro.retain if role == "retain" else micro.forget
                count = _positions(roles[role], rows)
                trained += count
                compared += count * (role in each_time)
        costs.append(float(Compute(*sizes, trained, compared).flops))
        last.append(float(Compute(*sizes, 0, trained + compared + once).flops))
    return costs, last


def _reference_positions(examples: Sequence[Tokens], pace: Pace) -> int:
    """Return the positions that the reference computes once, in the order of the set."""
    size = pace.batch_size
    starts = range(0, len(examples), size)
    return sum(_positions(examples, range(at, min(at + size, len(examples)))) for at in starts)


def _positions(examples: Sequence[Tokens], rows: Sequence[int]) -> int:
    return len(rows) * max(len(examples[row].input_ids) for row in rows)
