"""Equal budgets: how many steps of a method come nearest to a number of operations.

Operations are those of `compute.py`, counted step by step from the batches that the run will see, with
the look at the loss that ends it and with what a reference is asked once: what is planned is what is
counted in the end. The schedule of the learning rate ends with the last step. Equal operations are not
equal seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from approx.leaderboard.plan import Cell, Design, nearest_steps
from approx.methods.method import Method
from approx.unlearning.compute import Compute
from approx.unlearning.schedule import ScheduleSettings, plan_steps
from approx.unlearning.sets import Sets
from sisa.lm.base.tokens import Tokens

MANY_EPOCHS = 200
WARMUP_STEPS = 10


def tuning(cell: Cell, design: Design) -> ScheduleSettings:
    """How the base is fine-tuned."""
    return replace(unlearning(cell, design), num_epochs=design.epochs, warmup_steps=WARMUP_STEPS)


def unlearning(cell: Cell, design: Design) -> ScheduleSettings:
    """How a method is run, before its steps are cut to the budget."""
    return ScheduleSettings(
        learning_rate=cell.learning_rate,
        num_epochs=MANY_EPOCHS,
        batch_size=design.batch_size,
        gradient_accumulation_steps=1,
        weight_decay=0.0,
        seed=cell.seed,
    )


def within(
    budget: float, method: Method, sets: Sets, settings: ScheduleSettings, sizes: tuple[int, int]
) -> ScheduleSettings:
    """The settings with as many steps as come nearest to the budget, in operations."""
    costs, last = step_costs(method, sets, settings, sizes)
    return replace(settings, max_steps=nearest_steps(costs, last, budget))


def step_costs(
    method: Method, sets: Sets, settings: ScheduleSettings, sizes: tuple[int, int]
) -> tuple[list[float], list[float]]:
    """Operations of each step, and of the look at the loss that ends a run after it.

    `sizes`: parameters of the model, and those that are trained.
    """
    roles = {"forget": sets.forget, "retain": sets.retain, "preferred": sets.preferred}
    each_time = method.compares - method.compares_answers
    once = sum(_reference_positions(roles[role], settings) for role in method.compares_answers)
    costs, last = [], []
    for step in plan_steps(len(sets.forget), len(sets.retain), settings):
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


def _reference_positions(examples: Sequence[Tokens], settings: ScheduleSettings) -> int:
    """Positions that the reference computes once, in the order of the set."""
    size = settings.batch_size
    starts = range(0, len(examples), size)
    return sum(_positions(examples, range(at, min(at + size, len(examples)))) for at in starts)


def positions_of(examples: Sequence[Tokens], settings: ScheduleSettings) -> int:
    """Positions that a fine-tuning computes, padding among them."""
    steps = plan_steps(len(examples), 0, settings)
    return sum(_positions(examples, micro.forget) for step in steps for micro in step)


def _positions(examples: Sequence[Tokens], rows: Sequence[int]) -> int:
    return len(rows) * max(len(examples[row].input_ids) for row in rows)
