"""From the results of cells to a table: a row for each setting of each method, over its seeds.

A spread is half of the range over seeds, 0 for one seed; a value that was not measured is None and is
shown as a dash. Rows stand by method, from the weakest setting to the strongest: together they are the
method's curve of forgetting against utility. No order among methods is computed: `weaknesses` says what
the runs lack for one. Forget quality is a p-value and is never shown without D, n and the noise floor.

>>> Value.of([0.25, 0.75]), Value.of([None, 0.5]).text()
(Value(mean=0.5, spread=0.25), '-')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from approx.leaderboard.plan import QUESTIONS_EACH, Cell, Design, Result

Results = Sequence[tuple[Cell, Result]]
KNOWS, QUESTIONS, PASSES, SEEDS = 0.95, 200, 1.0, 3  # the least that an order of methods would rest on
FINE_TUNED = "fine-tuned on all"
COLUMNS = {
    "p_value": "forget quality p",
    "statistic": "D",
    "model_utility": "utility",
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
    kinds = {"full": FINE_TUNED, "retained": "retained reference"}
    found = {kind: [each for each in results if each[0].kind == kind] for kind in kinds}
    rows = [row_of(kinds[kind], some) for kind, some in found.items() if some]
    if len(found["retained"]) < 2:
        return rows
    # The first can't be judged by itself: what only the second has is told of the second alone.
    second = row_of(kinds["retained"], found["retained"][1:]).values
    both = rows[-1].values
    values = {name: each if each.mean is not None else second[name] for name, each in both.items()}
    return [*rows[:-1], replace(rows[-1], values=values)]


def curves(results: Results) -> list[Row]:
    """Return a row for each setting of each method, the weakest setting of a method first."""
    by_setting = _by_setting([each for each in results if each[0].kind == "run"])
    methods = list(dict.fromkeys(name for name, _, _ in by_setting))
    ordered = sorted(by_setting, key=lambda each: (methods.index(each[0]), each[1], each[2] or 0.0))
    return [row_of(each[0], by_setting[each]) for each in ordered]


def sizes(results: Results) -> list[tuple[int, Row]]:
    """Return numbers of forgotten authors, each with the row of one setting under one seed."""
    rows = []
    for setting, same in _by_setting([each for each in results if each[0].kind == "size"]).items():
        seed = same[0][0].seed
        runs = [each for each in results if each[0].kind == "run" and each[0].seed == seed]
        same = [*same, *_by_setting(runs).get(setting, [])]
        rows += [
            (cell.forgotten, row_of(setting[0], [(cell, result)]))
            for cell, result in sorted(same, key=lambda each: each[0].forgotten)
        ]
    return rows


def weaknesses(results: Results, design: Design) -> list[str]:
    """Return what keeps these results from telling which method is better; see the constants above."""
    found = []
    known = [result["forget"]["probability"] for cell, result in results if cell.kind == "full"]
    if known and known[0] < KNOWS:
        found.append(
            f"the fine-tuned model knows the forget answers at {known[0]:.2f} (wanted: {KNOWS})"
        )
    runs = [(cell, result) for cell, result in results if cell.kind == "run"]
    asked = min((run["num_questions"]["forget"] for _, run in runs), default=0)
    if asked < QUESTIONS:
        found.append(f"{asked} forget questions are asked (wanted: {QUESTIONS})")
    passes = min(
        (run["steps"] * design.batch_size / (cell.forgotten * QUESTIONS_EACH) for cell, run in runs),
        default=0.0,
    )
    if passes < PASSES:
        found.append(
            f"a run passes over the forget set {passes:.1f} times at least (wanted: {PASSES:g})"
        )
    seeds = min((len(each) for each in _by_setting(runs).values()), default=0)
    if seeds < SEEDS:
        found.append(f"the least tried setting has seeds: {seeds} (wanted: {SEEDS})")
    return found


def noise_floor(results: Results) -> Mapping[str, Any] | None:
    """The test between the two retained references, where there are two."""
    for cell, result in results:
        if cell.kind == "full" and result["forget_quality"]:
            floor: Mapping[str, Any] | None = result["forget_quality"]["noise_floor"]
            return floor
    return None


def table(results: Results, design: Design) -> str:
    """The table as Markdown, with what it needs to be read."""
    head = ["method", "setting", "seeds", "steps", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [_line(row) for row in (*references(results), *curves(results))]
    floor = noise_floor(results)
    if floor is not None:
        lines += ["", f"Noise floor (two retained references): p {_short(floor['p_value'])}, "
                  f"D {_short(floor['statistic'])}, n {floor['num_model']}."]  # fmt: skip
    lines += ["", *_notes(design)]
    if weak := weaknesses(results, design):
        lines.append(f"No order of methods follows from these runs: {'; '.join(weak)}.")
    by_size = sizes(results)
    if by_size:
        columns = ("model_utility", "probability", "rouge", "extraction_strength", "share")
        head = ["method", "setting", "forgotten authors", "steps", *(COLUMNS[each] for each in columns)]
        lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for number, row in by_size:
            shown = (row.values[each].text() for each in columns)
            cells = [row.name, _setting(row), str(number), _steps(row), *shown]
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
        "curves": [asdict(row) for row in curves(results)],
        "sizes": [{"forgotten": number, **asdict(row)} for number, row in sizes(results)],
        "noise_floor": noise_floor(results),
        "weaknesses": weaknesses(results, design),
        "cells": [dict(result) for _, result in results],
    }


def _by_setting(results: Results) -> dict[tuple[str, float, float | None], Results]:
    found: dict[tuple[str, float, float | None], list[tuple[Cell, Result]]] = {}
    for cell, result in results:
        key = (str(cell.method), cell.learning_rate, cell.alpha)
        found.setdefault(key, []).append((cell, result))
    return dict(found)


def _line(row: Row) -> str:
    measured = (row.values[each].text() for each in COLUMNS)
    return (
        "| " + " | ".join([row.name, _setting(row), str(row.num_seeds), _steps(row), *measured]) + " |"
    )


def _setting(row: Row) -> str:
    return f"{row.learning_rate:g}" + (f", alpha {row.alpha:g}" if row.alpha is not None else "")


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
        f"Each run: operations of {design.budget_share:.0%} of the fine-tuning, to the nearest step.",
        "Mean ± half of the range over seeds. AUC: attack scores of the forget questions against those "
        "under the retained reference; 0.5 tells nothing.",
    ]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.2g}"
