"""From the results of cells to the table: a row for each method, with mean and spread over its seeds.

Rules: pure; numbers alone. A spread is half of the range over seeds, 0 for one seed; a value that was
not measured is None and is shown as a dash. Methods stand in the order of their mean aggregate, then of
utility. Forget quality is a p-value and is never shown without D, n and the noise floor.

Not covered: a significance of the order: two seeds are too few for one.

>>> Value.of([0.25, 0.75]), Value.of([None, 0.5]).text()
(Value(mean=0.5, spread=0.25), '-')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from approx.leaderboard_plan import Cell, Design, Result

Results = Sequence[tuple[Cell, Result]]
COLUMNS = {
    "p_value": "forget quality p",
    "statistic": "D",
    "model_utility": "utility",
    "aggregate": "aggregate",
    "probability": "forget probability",
    "rouge": "forget ROUGE-L",
    "extraction_strength": "extraction",
    "attack_loss": "AUC loss",
    "attack_min_k_plus_plus": "AUC Min-K%++",
    "seconds": "seconds",
    "flops": "operations",
    "share": "share of full",
}


@dataclass(frozen=True)
class Value:
    """Mean over seeds and half of their range; None where a seed has no value."""

    mean: float | None
    spread: float | None

    @staticmethod
    def of(values: Sequence[float | None]) -> Value:
        known = [each for each in values if each is not None]
        if not known or len(known) < len(values):
            return Value(None, None)
        return Value(sum(known) / len(known), (max(known) - min(known)) / 2)

    def text(self) -> str:
        """As it stands in a cell of the table."""
        if self.mean is None:
            return "-"
        return _short(self.mean) + (f" ± {_short(self.spread)}" if self.spread else "")


@dataclass(frozen=True)
class Row:
    """One model or method: what it is called, its setting, and its measures by the names in COLUMNS.

    `steps` and `endings` are of each seed; a run that diverged is measured at its last good weights.
    """

    name: str
    learning_rate: float
    alpha: float | None
    steps: tuple[int, ...]
    endings: tuple[str, ...]
    num_seeds: int
    values: Mapping[str, Value]


def measures(result: Result) -> dict[str, float | None]:
    """The measures of one result, by the names in COLUMNS."""
    quality, forget = result["forget_quality"] or {}, result["forget"]
    attacks, compute = result["attacks_against_reference"], result["compute"]
    return {
        "p_value": quality.get("p_value"),
        "statistic": quality.get("statistic"),
        "model_utility": result["model_utility"],
        "aggregate": result["aggregate"],
        "probability": forget["probability"],
        "rouge": forget["rouge"],
        "extraction_strength": forget["extraction_strength"],
        "attack_loss": attacks.get("loss"),
        "attack_min_k_plus_plus": attacks.get("min_k_plus_plus"),
        "seconds": compute["seconds"],
        "flops": float(compute["flops_estimated"]),
        "share": compute["share_of_full_finetuning"],
    }


def row_of(name: str, found: Results) -> Row:
    """A row of equal settings under several seeds. Raises ValueError for none."""
    if not found:
        raise ValueError("a row needs a result")
    each = [measures(result) for _, result in found]
    cell = found[0][0]
    return Row(
        name,
        cell.learning_rate,
        cell.alpha,
        tuple(result["steps"] for _, result in found),
        tuple(result["ending"] for _, result in found),
        len(found),
        {column: Value.of([values[column] for values in each]) for column in COLUMNS},
    )


def references(results: Results) -> list[Row]:
    """The model before, and the retained references."""
    kinds = {"full": "fine-tuned on all", "retained": "retained reference"}
    found = {kind: [each for each in results if each[0].kind == kind] for kind in kinds}
    rows = [row_of(kinds[kind], some) for kind, some in found.items() if some]
    if len(found["retained"]) < 2:
        return rows
    # The first can't be judged by itself: what only the second has is told of the second alone.
    second = row_of(kinds["retained"], found["retained"][1:]).values
    both = rows[-1].values
    values = {name: each if each.mean is not None else second[name] for name, each in both.items()}
    return [*rows[:-1], replace(rows[-1], values=values)]


def ranking(results: Results) -> list[Row]:
    """A row for each method, the best first."""
    names = dict.fromkeys(cell.method for cell, _ in results if cell.kind == "run")
    rows = [row_of(str(name), _of(results, "run", str(name))) for name in names]
    return sorted(rows, key=lambda row: (-_mean(row, "aggregate"), -_mean(row, "model_utility")))


def sizes(results: Results) -> list[tuple[int, Row]]:
    """Numbers of forgotten authors, each with the row of one method and one seed."""
    found = [each for each in results if each[0].kind == "size"]
    rows = []
    for name in dict.fromkeys(cell.method for cell, _ in found):
        same = [each for each in found if each[0].method == name]
        seed = same[0][0].seed
        same += [each for each in _of(results, "run", str(name)) if each[0].seed == seed]
        rows += [
            (cell.forgotten, row_of(str(name), [(cell, result)]))
            for cell, result in sorted(same, key=lambda each: each[0].forgotten)
        ]
    return rows


def noise_floor(results: Results) -> Mapping[str, Any] | None:
    """The test between the two retained references, where there are two."""
    for cell, result in results:
        if cell.kind == "full" and result["forget_quality"]:
            floor: Mapping[str, Any] | None = result["forget_quality"]["noise_floor"]
            return floor
    return None


def table(results: Results, design: Design) -> str:
    """The table as Markdown, with what it needs to be read."""
    head = ["method", "setting", "steps", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [_line(row) for row in (*references(results), *ranking(results))]
    floor = noise_floor(results)
    if floor is not None:
        lines += ["", f"Noise floor (two retained references): p {_short(floor['p_value'])}, "
                  f"D {_short(floor['statistic'])}, n {floor['num_model']}."]  # fmt: skip
    lines += ["", *_notes(design)]
    by_size = sizes(results)
    if by_size:
        columns = ("model_utility", "probability", "rouge", "extraction_strength", "share")
        head = ["method", "forgotten authors", "steps", *(COLUMNS[each] for each in columns)]
        lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for number, row in by_size:
            cells = [row.name, str(number), _steps(row), *(row.values[each].text() for each in columns)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(results: Results, design: Design, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All of it as JSON values: rows, sizes, and each cell's own numbers."""
    return {
        "approximate": True,
        "design": asdict(design),
        "inputs": dict(inputs),
        "columns": COLUMNS,
        "references": [asdict(row) for row in references(results)],
        "ranking": [asdict(row) for row in ranking(results)],
        "sizes": [{"forgotten": number, **asdict(row)} for number, row in sizes(results)],
        "noise_floor": noise_floor(results),
        "cells": [dict(result) for _, result in results],
    }


def _of(results: Results, kind: str, method: str) -> list[tuple[Cell, Result]]:
    return [each for each in results if each[0].kind == kind and each[0].method == method]


def _mean(row: Row, column: str) -> float:
    return row.values[column].mean or 0.0


def _line(row: Row) -> str:
    setting = f"{row.learning_rate:g}" + (f", alpha {row.alpha:g}" if row.alpha is not None else "")
    cells = [row.name, setting, _steps(row), *(row.values[each].text() for each in COLUMNS)]
    return "| " + " | ".join(cells) + " |"


def _steps(row: Row) -> str:
    taken = "-".join(str(each) for each in sorted(set(row.steps)))
    bad = sorted(set(row.endings) - {"finished"})
    return f"{taken} ({', '.join(bad)})" if bad else taken


def _notes(design: Design) -> list[str]:
    return [
        f"{design.authors} authors, {design.forgotten} of them forgotten. Asked: "
        f"{design.forget_questions} forget questions, {design.utility_questions} of the retain set, "
        f"{design.fact_questions} real authors, {design.fact_questions} world facts, "
        f"{design.wrong_answers} wrong answers each, {design.max_new_tokens} new tokens at most.",
        f"Each method: two settings tried under one seed, then {len(design.seeds)} seeds; operations of "
        f"{design.budget_share:.0%} of the fine-tuning, to the nearest step.",
        "Mean ± half of the range over seeds. AUC: attack scores of the forget questions against those "
        "under the retained reference; 0.5 tells nothing.",
    ]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.2g}"
