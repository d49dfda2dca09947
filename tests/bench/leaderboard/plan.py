"""The plan of a leaderboard: its design, its cells, and the results of cells kept on disk.

    retained x 2, full    the base fine-tuned on the authors that are kept, and on all authors
    private               the same on all authors by DP-SGD: what a guarantee costs in utility
    run                   one setting of a method under one seed
    size                  one setting of some methods, for other numbers of forgotten authors

A cell is one model to make and to measure. Its name is the digest of all that its result depends on:
the design, the inputs (base and questions) and the cell. `DIR/cells/NAME.json` holds the result as
numbers and is whole or absent, so a run that was interrupted continues with the cell at which it
stopped.

Every setting of every method runs under every seed; no setting is chosen by its result. Each method
gets `budget_share` of the operations of a full fine-tuning (in proportion to its authors for a size)
and takes the number of steps that comes nearest to it.

>>> [cell.learning_rate for cell in run_cells("npo", Design(seeds=(1,)))]
[0.002, 0.004]
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sisa.core.digest import canonical_json, digest_of
from sisa.core.errors import IntegrityError, InvalidInput, Problem
from sisa.store.blobs.files import held_names, read_whole, write_atomic

Kind = Literal["retained", "full", "private", "run", "size"]
Result = Mapping[str, Any]
VERSION = 2  # layers are numbered as in the whole model
MOST_AUTHORS, QUESTIONS_EACH = 20, 20
PRIVATE = {"noise_multiplier": 0.7, "max_grad_norm": 1.0, "batch_size": 16, "delta": 1e-5}
PRIVATE_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """One setting of a method. `alpha` is the scale of task arithmetic."""

    learning_rate: float
    alpha: float | None = None


# Two settings a method, placed by a trial under seed 0: one that hardly forgets within the budget, and
# one that forgets much.
PAIR = (Setting(2e-3), Setting(4e-3))
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "gradient_ascent": (Setting(5e-4), Setting(1e-3)),  # twice the steps, and no retain term
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
    """All numbers that shape a leaderboard. Questions are spread evenly over their set."""

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
        """Raise InvalidInput with every value that cannot be used."""
        if problems := list(self._problems()):
            raise InvalidInput(
                "no leaderboard can be made with these numbers",
                next_step="correct them",
                problems=problems,
            )

    def _problems(self) -> Iterator[Problem]:
        if not 2 <= self.authors <= MOST_AUTHORS:
            yield Problem("authors", f"{self.authors}, expected 2 to {MOST_AUTHORS}")
        for each in (self.forgotten, *self.sizes):
            if not 1 <= each < self.authors:
                yield Problem("forgotten", f"{each}, expected 1 to {self.authors - 1}")
        for name in (*self.methods, *self.size_methods):
            if name not in SETTINGS:
                yield Problem("methods", f"{name!r}, expected some of {', '.join(SETTINGS)}")
        for name, value in asdict(self).items():
            if name not in ("authors", "forgotten") and isinstance(value, int) and value < 1:
                yield Problem(name, f"{value}, expected a whole number of at least 1")
        for name in ("budget_share", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                yield Problem(name, f"{value}, expected a number above 0")
        if not self.seeds:
            yield Problem("seeds", "none")

    @property
    def most_forgotten(self) -> int:
        """Return the largest number of authors that a cell forgets.

        No question of utility is about them.
        """
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
    """Return the digest that names a cell's result. Other methods of the design do not change it."""
    held = asdict(design)
    beside = ("methods", "sizes", "size_methods", "seeds")
    shape = {name: value for name, value in held.items() if name not in beside}
    shape["most_forgotten"] = design.most_forgotten
    if cell.kind == "private":
        shape["privacy"] = PRIVATE
    return digest_of({"version": VERSION, "design": shape, "inputs": dict(inputs), "cell": asdict(cell)})


def training_name(cell: Cell, design: Design, inputs: Mapping[str, str]) -> str:
    """Return the digest that names a fine-tuned model, whichever questions it is asked."""
    wanted = ("authors", "epochs", "batch_size", "upper_layers", "lora_r", "lora_alpha")
    shape = {name: value for name, value in asdict(design).items() if name in wanted}
    return digest_of({"version": VERSION, "training": shape, "inputs": inputs, "cell": asdict(cell)})


def reference_cells(design: Design) -> tuple[Cell, Cell, Cell]:
    """Return the retained reference, a second one for the noise floor, and the model to unlearn from."""
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


def compete(
    design: Design, compute: Callable[[Cell], Result], *, private: bool = False
) -> list[tuple[Cell, Result]]:
    """Return every cell with its result, in the order of the table."""
    cells = list(reference_cells(design))
    if private:
        cells.append(Cell("private", learning_rate=PRIVATE_RATE))
    for method in design.methods:
        cells += run_cells(method, design)
    for method in design.size_methods:
        if method in design.methods:
            cells += size_cells(method, design)
    return [(cell, compute(cell)) for cell in cells]


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


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` positions spread evenly over `count`, or all of them where there are fewer.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


class HeldCells:
    """Results of cells by cell: read from the disk, or computed and then stored there.

    The caller keeps other writers out of the directory.
    """

    def __init__(
        self,
        directory: Path,
        design: Design,
        inputs: Mapping[str, str],
        make: Callable[[Cell, str], Result],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory, self._design, self._inputs = directory / "cells", design, inputs
        self._make, self._report = make, report

    def __call__(self, cell: Cell) -> Result:
        """Return a cell's result. Raise IntegrityError for a damaged file."""
        name = cell_name(cell, self._design, self._inputs)
        path = self._directory / f"{name}.json"
        if path.name in held_names(self._directory):
            return _read_result(path)
        started = time.monotonic()
        result = self._make(cell, name)
        write_atomic(path, canonical_json(result) + b"\n")
        parts = [cell.kind, cell.method, f"seed {cell.seed}", f"{cell.forgotten} forgotten"]
        called = ", ".join(each for each in parts if each)
        self._report(f"{called}: {time.monotonic() - started:.0f} s")
        return result


def _read_result(path: Path) -> Result:
    try:
        found = json.loads(read_whole(path, "result"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise IntegrityError(
            "a held result can't be read", where=str(path), next_step="remove it; it is made again"
        )
    return found
