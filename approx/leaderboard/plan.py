"""What a leaderboard of unlearning methods computes: its cells, their order, what they depend on.

    retained x 2, full        the base fine-tuned on the authors that are kept, and on all of them
    run                       a method at one of its settings, under one seed
    size                      some methods at each setting, for fewer and for more forgotten authors

A cell is data, and its name is the digest of all that its result depends on: design, inputs (base and
questions) and cell. A held result is not computed again, so that a run that was cut short goes on. Every
setting of every method is run under every seed; none is chosen by its result. Every method gets the
operations of `budget_share` of a full fine-tuning (for a size, in proportion to its authors), and takes
as many steps as come nearest to that.

>>> [cell.learning_rate for cell in run_cells("npo", Design(seeds=(1,)))]
[0.002, 0.004]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput, Problem

Kind = Literal["retained", "full", "run", "size"]
Result = Mapping[str, Any]
VERSION = 1
MOST_AUTHORS, QUESTIONS_EACH = 20, 20


@dataclass(frozen=True)
class Setting:
    """What a method is run with; `alpha` is task arithmetic's scale."""

    learning_rate: float
    alpha: float | None = None


# Two settings each, around what a look under seed 0 showed: one that hardly forgets within the budget,
# one that forgets much.
PAIR = (Setting(2e-3), Setting(4e-3))
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "gradient_ascent": (Setting(5e-4), Setting(1e-3)),  # twice the steps, and nothing that holds it
    "graddiff": PAIR,
    "kl_minimisation": PAIR,
    "dpo": PAIR,
    "idk_dpo": PAIR,
    "npo": PAIR,
    "simnpo": (Setting(4e-3), Setting(8e-3)),  # its forget term weighs an eighth of the others'
    "task_arithmetic": (Setting(1e-3, 1.5), Setting(1e-3, 3.0)),
}


@dataclass(frozen=True)
class Design:
    """All numbers that shape a leaderboard. Questions are evenly spread over their set."""

    authors: int = 20
    forgotten: int = 2
    sizes: tuple[int, ...] = (1, 4)
    size_methods: tuple[str, ...] = ("gradient_ascent", "graddiff", "kl_minimisation")
    methods: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (1, 2)
    epochs: int = 3
    learning_rate: float = 1.5e-3
    batch_size: int = 2
    budget_share: float = 0.05
    upper_layers: int = 10
    lora_r: int = 8
    lora_alpha: int = 16
    forget_questions: int = 40
    utility_questions: int = 8
    fact_questions: int = 20
    wrong_answers: int = 2
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        """Raises InvalidInput with all that does not fit together."""
        problems = [
            Problem("authors", f"{self.authors}, expected 2 to {MOST_AUTHORS}")
            for _ in range(not 2 <= self.authors <= MOST_AUTHORS)
        ]
        for each in (self.forgotten, *self.sizes):
            if not 1 <= each < self.authors:
                problems.append(Problem("forgotten", f"{each}, expected 1 to {self.authors - 1}"))
        known = ", ".join(SETTINGS)
        for name in (*self.methods, *self.size_methods):
            if name not in SETTINGS:
                problems.append(Problem("methods", f"{name!r}, expected some of {known}"))
        if not 0 < self.budget_share < math.inf:
            problems.append(Problem("budget_share", f"{self.budget_share}, expected a number above 0"))
        if not self.seeds:
            problems.append(Problem("seeds", "none"))
        if problems:
            raise InvalidInput(
                "no leaderboard can be made with these numbers",
                next_step="mend them",
                problems=problems,
            )

    @property
    def most_forgotten(self) -> int:
        """Authors that some cell forgets: none of them is asked about for utility."""
        return max(self.forgotten, *self.sizes) if self.sizes else self.forgotten


@dataclass(frozen=True)
class Cell:
    """One model to make and to measure."""

    kind: Kind
    seed: int = 0
    forgotten: int = 0
    method: str | None = None
    learning_rate: float = 0.0
    alpha: float | None = None


def cell_name(cell: Cell, design: Design, inputs: Mapping[str, str]) -> str:
    """The digest that names a cell's result. Which methods and sizes stand beside it does not count."""
    held = asdict(design)
    beside = ("methods", "sizes", "size_methods", "seeds")
    shape = {name: value for name, value in held.items() if name not in beside}
    shape["most_forgotten"] = design.most_forgotten
    return digest_of({"version": VERSION, "design": shape, "inputs": dict(inputs), "cell": asdict(cell)})


def training_name(cell: Cell, design: Design, inputs: Mapping[str, str]) -> str:
    """The digest that names what a fine-tuning gives: other questions ask the same model."""
    wanted = ("authors", "epochs", "batch_size", "upper_layers", "lora_r", "lora_alpha")
    shape = {name: value for name, value in asdict(design).items() if name in wanted}
    return digest_of({"version": VERSION, "training": shape, "inputs": inputs, "cell": asdict(cell)})


def reference_cells(design: Design) -> tuple[Cell, Cell, Cell]:
    """The retained reference, the second one for the noise floor, and the model to unlearn from."""
    retained = Cell("retained", 0, design.forgotten, learning_rate=design.learning_rate)
    return retained, replace(retained, seed=1), replace(retained, kind="full", forgotten=0)


def run_cells(method: str, design: Design) -> list[Cell]:
    """Return each setting of a method under each seed."""
    return [
        Cell("run", seed, design.forgotten, method, each.learning_rate, each.alpha)
        for each in SETTINGS[method]
        for seed in design.seeds
    ]


def size_cells(method: str, design: Design) -> list[Cell]:
    """Return each setting of a method for other numbers of forgotten authors, under the first seed."""
    return [
        Cell("size", design.seeds[0], size, method, each.learning_rate, each.alpha)
        for size in sorted(set(design.sizes) - {design.forgotten})
        for each in SETTINGS[method]
    ]


def compete(design: Design, compute: Callable[[Cell], Result]) -> list[tuple[Cell, Result]]:
    """Every cell with its result, in the order of the table; `compute` knows what is held already."""
    cells = list(reference_cells(design))
    for method in design.methods:
        cells += run_cells(method, design)
    for method in design.size_methods:
        if method in design.methods:
            cells += size_cells(method, design)
    return [(cell, compute(cell)) for cell in cells]


def nearest_steps(costs: Sequence[float], last: Sequence[float], budget: float) -> int:
    """How many steps come nearest to a budget, at least one.

    `costs[n]` is that of step n + 1, `last[n]` what it costs to end after it.

    >>> nearest_steps([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], 7.4)
    2
    """
    spent, best, gap = 0.0, 1, float("inf")
    for number, (cost, ending) in enumerate(zip(costs, last, strict=True), 1):
        spent += cost
        if abs(spent + ending - budget) < gap:
            best, gap = number, abs(spent + ending - budget)
    return best


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` places among `count`, evenly; all of them where there are no more.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]
