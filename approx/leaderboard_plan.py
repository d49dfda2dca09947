"""What a leaderboard of unlearning methods computes: its cells, their order, what they depend on.

    retained x 2, full        the base fine-tuned on the authors that are kept, and on all of them
    trial                     a method at one of its two settings, under the tuning seed
    run                       the method at the better setting, under each of the other seeds
    size                      some methods at that setting, for fewer and for more forgotten authors

Rules: a cell is data, and its name is the digest of all that its result depends on: design, inputs (base
and questions) and cell. A result that is held is not computed again, so that a run that was cut short
goes on. Of two trials the one with the larger aggregate (harmonic mean of forget quality and model
utility) is chosen; on a tie the larger utility, then the first. Trials' seed is no run's seed. Every
method gets the operations of `budget_share` of a full fine-tuning (for a size, in proportion to its
authors), and takes as many steps as come nearest to that.

Not covered: computing a cell (`leaderboard_cells.py`).

>>> first = Cell("trial", method="npo", learning_rate=1e-3)
>>> better_trial([(first, Score(0.2, 0.5)), (replace(first, learning_rate=2e-3), Score(0.3, 0.4))])
Cell(kind='trial', seed=0, forgotten=0, method='npo', learning_rate=0.002, alpha=None)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sisa.digest import digest_of
from sisa.errors import InvalidInput, Problem

Kind = Literal["retained", "full", "trial", "run", "size"]
Result = Mapping[str, Any]
VERSION = 1
MOST_AUTHORS, QUESTIONS_EACH = 20, 20


@dataclass(frozen=True)
class Trial:
    """One setting of a method; `alpha` is task arithmetic's scale."""

    learning_rate: float
    alpha: float | None = None


# Two settings each, around what a look under the tuning seed showed: one that hardly forgets within the
# budget, one that forgets much.
PAIR = (Trial(2e-3), Trial(4e-3))
TRIALS: Mapping[str, tuple[Trial, Trial]] = {
    "gradient_ascent": (Trial(5e-4), Trial(1e-3)),  # twice the steps, and nothing that holds it
    "graddiff": PAIR,
    "kl_minimisation": PAIR,
    "dpo": PAIR,
    "idk_dpo": PAIR,
    "npo": PAIR,
    "simnpo": (Trial(4e-3), Trial(8e-3)),  # its forget term weighs an eighth of the others'
    "task_arithmetic": (Trial(1e-3, 1.5), Trial(1e-3, 3.0)),
}


@dataclass(frozen=True)
class Design:
    """All numbers that shape a leaderboard. Questions are evenly spread over their set."""

    authors: int = 20
    forgotten: int = 2
    sizes: tuple[int, ...] = (1, 4)
    size_methods: tuple[str, ...] = ("gradient_ascent", "graddiff", "kl_minimisation")
    methods: tuple[str, ...] = tuple(TRIALS)
    seeds: tuple[int, ...] = (1, 2)
    tuning_seed: int = 0
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
        known = ", ".join(TRIALS)
        for name in (*self.methods, *self.size_methods):
            if name not in TRIALS:
                problems.append(Problem("methods", f"{name!r}, expected some of {known}"))
        if not 0 < self.budget_share < math.inf:
            problems.append(Problem("budget_share", f"{self.budget_share}, expected a number above 0"))
        if not self.seeds or self.tuning_seed in self.seeds:
            problems.append(Problem("seeds", "none, or the tuning seed among them"))
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


@dataclass(frozen=True)
class Score:
    """What a trial is judged by."""

    aggregate: float
    utility: float


def cell_name(cell: Cell, design: Design, inputs: Mapping[str, str]) -> str:
    """The digest that names a cell's result. Which methods and sizes stand beside it does not count."""
    held = asdict(design)
    beside = ("methods", "sizes", "size_methods", "seeds", "tuning_seed")
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


def trial_cells(method: str, design: Design) -> tuple[Cell, ...]:
    """The settings of a method that are tried, all under the tuning seed."""
    return tuple(
        Cell("trial", design.tuning_seed, design.forgotten, method, each.learning_rate, each.alpha)
        for each in TRIALS[method]
    )


def better_trial(tried: Sequence[tuple[Cell, Score]]) -> Cell:
    """The trial that is chosen. Raises ValueError for none."""
    return max(tried, key=lambda each: (each[1].aggregate, each[1].utility))[0]


def later_cells(chosen: Cell, design: Design) -> Iterator[Cell]:
    """What is run at a method's chosen setting."""
    for seed in design.seeds:
        yield replace(chosen, kind="run", seed=seed)


def size_cells(chosen: Cell, design: Design) -> Iterator[Cell]:
    """The same setting, for other numbers of forgotten authors, under the first of the runs' seeds."""
    for size in sorted(set(design.sizes) - {design.forgotten}):
        yield replace(chosen, kind="size", seed=design.seeds[0], forgotten=size)


def compete(design: Design, compute: Callable[[Cell], Result]) -> list[tuple[Cell, Result]]:
    """Every cell with its result, in the order of the table; `compute` knows what is held already."""
    done = [(cell, compute(cell)) for cell in reference_cells(design)]
    best: dict[str, Cell] = {}
    for method in design.methods:
        tried = [(cell, compute(cell)) for cell in trial_cells(method, design)]
        best[method] = better_trial([(cell, score_of(result)) for cell, result in tried])
        done += tried
        done += [(cell, compute(cell)) for cell in later_cells(best[method], design)]
    for method in design.size_methods:
        if method in best:
            done += [(cell, compute(cell)) for cell in size_cells(best[method], design)]
    return done


def score_of(result: Result) -> Score:
    """What counts of a trial's result."""
    return Score(result["aggregate"] or 0.0, result["model_utility"])


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
