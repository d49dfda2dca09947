"""The table and the picture of a leaderboard: one row per setting of a method, over its seeds.

A spread is half of the range over seeds, and 0 for one seed. A value that was not measured is None and
shown as a dash. The rows of a method, from its weakest setting to its strongest, are its curve of
forgetting against utility. Methods are not ranked: `weaknesses` lists what the runs lack for a ranking.
Forget quality is a p-value and is always shown with D, n and the noise floor.

>>> Value.of([0.25, 0.75]), Value.of([None, 0.5]).text()
(Value(mean=0.5, spread=0.25), '-')

Source of the picture's colours: Okabe and Ito 2008.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.bench.leaderboard.plan import QUESTIONS_EACH, Cell, Design, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Sequence[tuple[Cell, Result]]
KNOWS, QUESTIONS, PASSES, SEEDS = 0.95, 200, 1.0, 3  # minimum for a ranking of methods
FINE_TUNED = "fine-tuned on all"
REFERENCE_NAMES = {
    **{"full": FINE_TUNED, "retained": "retained reference"},
    "private": "DP-SGD on all, epsilon {epsilon:.1f} at delta {delta:g}",
}
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
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
REFERENCES = ("#000000", "#ffffff", "#999999")
SIZE_INCHES = (7.5, 5.0)


@dataclass(frozen=True)
class Value:
    """The mean over seeds and half of their range; None where a seed has no value."""

    mean: float | None
    spread: float | None

    @staticmethod
    def of(values: Sequence[float | None]) -> Value:
        known = [each for each in values if each is not None]
        if not known or len(known) < len(values):
            return Value(None, None)
        return Value(sum(known) / len(known), (max(known) - min(known)) / 2)

    def text(self) -> str:
        """Return the value as shown in the table."""
        if self.mean is None:
            return "-"
        return _short(self.mean) + (f" ± {_short(self.spread)}" if self.spread else "")


@dataclass(frozen=True)
class Row:
    """One setting of a method, or a reference, with its measures by the names in COLUMNS.

    `steps` and `endings` have one value per seed. A run that diverged is measured at its last good
    weights.
    """

    name: str
    learning_rate: float
    alpha: float | None
    steps: tuple[int, ...]
    endings: tuple[str, ...]
    num_seeds: int
    values: Mapping[str, Value]


def measures(result: Result) -> dict[str, float | None]:
    """Return the measures of one result, by the names in COLUMNS."""
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
    """Return the row of one setting under several seeds. Raise ValueError when there is no result."""
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
    """Return the rows of the fine-tuned model, of the retained references, and of DP-SGD."""
    found = {kind: [each for each in results if each[0].kind == kind] for kind in REFERENCE_NAMES}
    rows = {kind: row_of(REFERENCE_NAMES[kind], some) for kind, some in found.items() if some}
    if len(found["retained"]) > 1:
        # The first is its own reference, so measures against a reference are those of the second alone.
        second = row_of("", found["retained"][1:]).values
        both = rows["retained"].values
        values = {name: each if each.mean is not None else second[name] for name, each in both.items()}
        rows["retained"] = replace(rows["retained"], values=values)
    for _, result in found["private"]:
        shown = REFERENCE_NAMES["private"].format(**result["privacy"])
        rows["private"] = replace(rows["private"], name=shown)
    return list(rows.values())


def curves(results: Results) -> list[Row]:
    """Return a row for each setting of each method, the weakest setting of a method first."""
    by_setting = _by_setting([each for each in results if each[0].kind == "run"])
    methods = list(dict.fromkeys(name for name, _, _ in by_setting))
    ordered = sorted(by_setting, key=lambda each: (methods.index(each[0]), each[1], each[2] or 0.0))
    return [row_of(each[0], by_setting[each]) for each in ordered]


def sizes(results: Results) -> list[tuple[int, Row]]:
    """Return each number of forgotten authors with the row of one setting under one seed."""
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
    """Return the reasons why these results cannot rank the methods."""
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
    """Return the test between the two retained references, or None where there is one."""
    for cell, result in results:
        if cell.kind == "full" and result["forget_quality"]:
            floor: Mapping[str, Any] | None = result["forget_quality"]["noise_floor"]
            return floor
    return None


def table(results: Results, design: Design) -> str:
    """Return the table as Markdown, with notes on how to read it."""
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
    """Return the leaderboard as JSON values: rows, sizes, and the numbers of each cell."""
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
        "under the retained reference; 0.5 means no evidence.",
    ]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.2g}"


def draw_leaderboard(body: Mapping[str, Any]) -> Figure:
    """Draw forget probability against model utility, one line per method, from the leaderboard's JSON.

    A line runs from the fine-tuned model through a method's settings, the weakest first; each method
    has its own marker, so the picture also reads without colour. References are stars. Bars are half of
    the range over seeds. No figure is kept.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    before = [_point(row) for row in body["references"] if row["name"] == FINE_TUNED]
    for number, name in enumerate(dict.fromkeys(row["name"] for row in body["curves"])):
        rows = [row for row in body["curves"] if row["name"] == name]
        marker, colour = MARKERS[number % 8], COLOURS[number % 8]
        axes.plot(*zip(*before, *map(_point, rows), strict=True), color=colour, linewidth=1.2)
        for row in rows:
            _draw(axes, row, name if row is rows[0] else None, marker, colour, 8)
    for row, colour in zip(body["references"], REFERENCES, strict=False):
        _draw(axes, row, row["name"], "*", colour, 14)
    axes.set_xlabel("probability of the answers to forget")
    axes.set_ylabel("model utility")
    axes.set_title(f"Unlearning at {body['design']['budget_share']:.0%} of the fine-tuning's operations")
    axes.set_ylim(bottom=-0.02)
    axes.set_xlim(left=-0.02)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True, fontsize="small")
    return figure


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["values"]["probability"]["mean"], row["values"]["model_utility"]["mean"]


def _draw(
    axes: Any, row: Mapping[str, Any], label: str | None, marker: str, colour: str, size: int
) -> None:
    across, up = row["values"]["probability"], row["values"]["model_utility"]
    axes.errorbar(
        across["mean"],
        up["mean"],
        xerr=across["spread"],
        yerr=up["spread"],
        fmt=marker,
        color=colour,
        markeredgecolor="#333333",
        ecolor="#777777",
        markersize=size,
        capsize=2,
        label=label,
    )
