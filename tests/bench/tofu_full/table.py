"""The table and the plot of TOFU in full, from cells; what was not computed is absent.

A row is a contestant on one forget set. Means over questions have 95% bootstrap intervals; model utility
resamples the questions within each of its sets. Forget quality and membership are against the ordinary
LoRA trained without the forget set (first seed), and the noise floor is its second seed against it. A
row has a value only where the cell behind it was finished; `missing` lists the cells that were not. A
forget set's rows of another partition key than the first wait until its deletion was attacked, so that
no mean over keys stands beside a value of one key.

    found = assembled(cells)
    print("\\n".join(table(found)))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from approx.benchmarks.tofu import ForgetSplit
from approx.benchmarks.tofu_measures import aggregates, forget_rows, forget_scores, utility_scores
from approx.evaluation.question_log import LogRow, parse_row
from approx.methods.registry import METHODS
from approx.metrics.estimate import estimate
from approx.metrics.model_utility import NINE, UTILITY_SETS, harmonic_mean
from sisa.core.digest import canonical_json, digest_of
from tests.bench.command import low_to_high, markdown
from tests.bench.tofu_full.design import (
    SHARES,
    Contestant,
    cell_names,
    contestants,
    deleted_from,
    lora,
    shape,
    trained_of,
)

if TYPE_CHECKING:
    from tests.bench.tofu_full.cells import Cells

ATTACKS = {
    "as_it_is": "as it is",
    "leak_at_k": "best of k samples",
    "relearnt_in_domain": "relearnt, in domain",
    "relearnt_out_of_domain": "relearnt, out of domain",
    "rounded_to_8_bits": "8 bits",
    "rounded_to_4_bits": "4 bits",
}
WRITTEN = ("written_retain", "written_facts")  # of trials on all records
KINDS = {  # what a model of a kind is called, and its colour in the plot
    "base": ("base", "#999999"),
    "ours": ("ours", "#009e73"),
    "lora": ("ordinary LoRA", "#0072b2"),
    "private": ("ordinary LoRA by DP-SGD", "#cc79a7"),
    "method": ("ordinary LoRA", "#d55e00"),
}
STATES = {  # in the table, and in the plot
    "trained on all": ("before", "before"),
    "deleted": ("after an exact deletion", "after"),
    "trained without": ("trained without", "never trained on them"),
}
MARKERS = "^vDPhp<>d8H"  # of methods
MEMORISED = ("forget", "exact_memorisation", "value")
UTILITY = ("model_utility", "value")
SHARE = ("share_of_training",)
INTERVALS = {  # of means over questions
    "tokens of forgotten answers": MEMORISED[:-1],
    "their ends": ("forget", "extraction_strength"),
    "an attacked answer": ("attacked", "as_it_is"),
    "relearnt, in domain": ("attacked", "relearnt_in_domain"),
    "retained answers": ("nine", "probability retain"),
    "utility": UTILITY[:-1],
}
CROWDED = 12  # models in a plot: if there are more, the legend alone names methods
Json = dict[str, Any]


def assembled(cells: Cells) -> Json:
    """Return everything that finished cells give. It holds no text."""
    every = contestants(cells.design)
    tried = (*(each.name for each in cells.design.layouts), "lora")
    missing = [each for each in cell_names(cells.design) if cells.known(each) is None]
    splits = cells.design.splits
    references = {split: _references(cells, split) for split in splits}
    asked = [each for each in every if "asked" in each.steps]
    judged = [
        (each, split)
        for each in asked
        for split in ([each.without] if each.without else splits)
        if not each.key or cells.known(f"{deleted_from(trained_of(each), split).name}.attacked")
    ]
    return {
        "inputs": cells.inputs,
        "design": shape(cells.design),
        "tried": {name: made for name in tried if (made := cells.known(f"{name}.tried"))},
        "tried_in_full": _tried_in_full(cells),
        "rows": [row for each, split in judged if (row := _row(cells, each, split, references[split]))],
        "equal": [row for each in every if each.scratch and (row := _equality(cells, each))],
        "noise_floors": {split: _floor(both) for split, both in references.items() if len(both) == 2},
        "missing": missing,
    }


def _tried_in_full(cells: Cells) -> list[Json]:
    """Return what the ordinary LoRA's trials on all records gave, one a rate."""
    dropped = ("adapters", "share_of_training", "record_epochs", "resumed")
    trials = (cells.known("lora.made") or {"trials": []})["trials"]
    return [{name: each[name] for name in each if name not in dropped} for each in trials]


def _references(cells: Cells, split: ForgetSplit) -> list[list[LogRow]]:
    """Return the rows of the finished references, the first seed's first."""
    found = []
    for seed in cells.design.seeds:
        name = lora(seed, split).name
        if cells.known(f"{name}.asked") is None:
            break
        found.append(_log(cells, name, split))
    return found


def _log(cells: Cells, name: str, split: ForgetSplit) -> list[LogRow]:
    """Return a contestant's rows, without texts, with the questions of one forget set."""
    first = len(cells.data.forget) - cells.data.sizes[split]
    asked = cells.known(f"{name}.asked") or {"rows": []}
    rows = [parse_row(canonical_json(each)) for each in asked["rows"]]
    return [row for row in rows if row.set != "forget" or row.idx >= first]


def _row(
    cells: Cells, contestant: Contestant, split: ForgetSplit, references: Sequence[Sequence[LogRow]]
) -> Json | None:
    made, asked = (cells.known(f"{contestant.name}.{step}") for step in ("made", "asked"))
    if made is None:
        return None
    rows = None if asked is None else _log(cells, contestant.name, split)
    if contestant.kind == "lora" and contestant.without:  # the first reference has no judge
        references = references[:1] if contestant.seed != cells.design.seeds[0] else []
    attacked = cells.known(f"{contestant.name}.attacked")
    if attacked is not None and attacked["split"] != split:
        attacked = None
    return {
        "name": contestant.name,
        "kind": contestant.kind,
        "layout": contestant.layout.name if contestant.layout else None,
        "key": contestant.key if contestant.layout else None,
        "seed": contestant.seed or cells.design.seed,
        "state": contestant.state,
        "split": split,
        "method": contestant.method or None,
        "budget": contestant.budget or None,
        "epsilon": made.get("epsilon"),
        "rate": contestant.rate or made.get("learning_rate"),
        "batch": made.get("batch"),
        **_seconds(made),
        "share_of_training": made["share_of_training"],
        **_measured(rows, references),
        "attacked": attacked and {
            name: mean_of(values) for name, values in attacked["per_question"].items()
        },
    }  # fmt: skip


def _seconds(made: Json) -> Json:
    """Return what a model took, or None where it was cut short and resumed."""
    whole = not made.get("resumed")
    return {name: made.get(name) if whole else None for name in ("seconds", "core_seconds")}


def _measured(rows: Sequence[LogRow] | None, references: Sequence[Sequence[LogRow]]) -> Json:
    """Return the measures of a log, or None for each before the questions were asked."""
    if not rows:
        names = ("num_questions", "forget_quality", "model_utility", "nine", "forget", "membership")
        return dict.fromkeys(names)
    found = aggregates(rows, references)
    terms = {
        name: utility_scores(name, [row for row in rows if row.set == name], found.truth_ratio)
        for name in UTILITY_SETS
    }
    utility = estimate([list(each.values()) for each in terms.values()], harmonic_mean)
    auc = (found.attacks_against_reference or {}).get("loss")
    return {
        "num_questions": found.num_questions,
        "forget_quality": found.forget_quality and asdict(found.forget_quality),
        "model_utility": {"value": found.model_utility, "low": utility.low, "high": utility.high},
        "nine": {name: mean_of(values) for each in terms.values() for name, values in each.items()},
        "forget": {
            **{name: mean_of(values) for name, values in forget_scores(forget_rows(rows)).items()},
            "extraction_floor": found.forget.extraction_floor,
        },
        "membership": auc and asdict(auc),
    }


def mean_of(values: Sequence[float]) -> Json:
    """Return a mean with its bootstrap interval and the number of questions.

    >>> mean_of([0.5, 0.5])
    {'value': 0.5, 'low': 0.5, 'high': 0.5, 'num': 2}
    """
    return asdict(estimate([[values]]))


def _floor(references: Sequence[Sequence[LogRow]]) -> Json:
    """Return the test of the second reference against the first."""
    quality = aggregates(references[1], references[:1]).forget_quality
    assert quality is not None
    return {"p_value": quality.p_value, "statistic": quality.statistic, "num": quality.num_model}


def _equality(cells: Cells, contestant: Contestant) -> Json | None:
    """Return whether training from scratch gave the bytes of the deletion."""
    made = cells.known(f"{contestant.name}.made")
    if made is None:
        return None
    trained = cells.known(f"{trained_of(contestant).name}.made")
    assert trained is not None
    return {
        "name": contestant.name,
        "split": contestant.without,
        "adapters": len(made["adapters"]),
        "adapters_equal": made["adapters_equal"],
        "equal": made["equal"],
        "digest": digest_of(made["adapters"]),
        "layout": contestant.layout.name if contestant.layout else None,
        **_seconds(made),
        "share_of_training": made["record_epochs"] / trained["record_epochs"],
    }


def groups(found: Json, split: ForgetSplit) -> list[tuple[str, list[Json]]]:
    """Return the rows of one forget set by their title; rows of several keys or seeds are together."""
    by: dict[str, list[Json]] = {}
    for row in found["rows"]:
        if row["split"] == split:
            by.setdefault(names_of(row)[0], []).append(row)
    return list(by.items())


def names_of(row: Json) -> tuple[str, str]:
    """Return how a row is called in the table, and in the plot."""
    who, _ = KINDS[row["kind"]]
    if row["kind"] == "base":
        return who, who
    if row["kind"] == "private":
        return f"{who}, epsilon {row['epsilon']:.1f}", "DP-SGD"
    if row["kind"] == "method":
        name, budget, rate = row["method"], f"{row['budget']:.0%}", f"{row['rate']:g}"
        return f"{who}, {name.replace('_', ' ')}, {budget}, rate {rate}", f"{name} {budget}, {rate}"
    long, short = STATES[row["state"]]
    if row["layout"]:
        return f"{who}, {row['layout']}, {long}", f"{who} {row['layout']}, {short}"
    return f"{who}, {long}", f"{who}, {short}"


def table(found: Json, split: ForgetSplit = "forget10") -> Iterator[str]:
    """Yield the lines of a Markdown table of one forget set: means over keys and seeds.

    A dash stands for a cell that was not computed.
    """
    header = (
        "model", "runs", "forget quality p / D", "utility", "extraction", "memorised", "AUC",
        *ATTACKS.values(), "core-seconds", "of a training",
    )  # fmt: skip
    lines = [_cells(name, some) for name, some in groups(found, split)]
    lines += [_equal_cells(each, len(header)) for each in found["equal"] if each["split"] == split]
    yield from markdown(header, lines) if lines else ["No model is finished yet."]


def _equal_cells(row: Json, num: int) -> list[str]:
    """Return the row of a model trained from scratch: what is measured is the other's, where equal."""
    of = f"{row['adapters_equal']} of {row['adapters']} adapters equal those after the deletion"
    rest = ["-"] * (num - 4)
    name = f"ours, {row['layout']}, trained without ({of})"
    seconds = "-" if row["core_seconds"] is None else f"{row['core_seconds']:.0f}"
    return [name, "1", *rest, seconds, f"{row['share_of_training']:.1%}"]


def trials_table(found: Json) -> Iterator[str]:
    """Yield the trials of rates and batches; the best of each is in bold."""
    trials = [
        (f"ours, {name}" if name != "lora" else "ordinary LoRA, a tenth of the records", tried["trials"])
        for name, tried in found["tried"].items()
    ]
    trials.append(("ordinary LoRA, all records", found["tried_in_full"]))
    lines = []
    for name, some in trials:
        best = max(some, key=lambda each: each["score"], default=None)
        for each in some:
            score = f"{each['score']:.3f}"
            lines.append(
                (
                    name,
                    f"{each['learning_rate']:g}",
                    str(each["batch"]),
                    f"{each['retain']:.3f} ({each['num_retain']})",
                    f"{each['facts']:.3f} ({each['num_facts']})" if each["num_facts"] else "-",
                    *(f"{each[of]:.3f}" if of in each else "-" for of in WRITTEN),
                    f"**{score}**" if each is best else score,
                    f"{each['core_seconds']:.0f}",
                )
            )
    header = (
        *("model", "rate", "batch", "answers (n)", "facts (n)", "written answers", "written facts"),
        *("harmonic mean", "core-seconds"),
    )
    yield from markdown(header, lines)


def _runs(found: Json, split: ForgetSplit) -> dict[tuple[str, str], list[Json]]:
    """Return the rows of one forget set by layout or kind, and state."""
    runs: dict[tuple[str, str], list[Json]] = {}
    for row in found["rows"]:
        if row["split"] == split:
            runs.setdefault((row["layout"] or row["kind"], row["state"]), []).append(row)
    return runs


def deletions_table(found: Json) -> Iterator[str]:
    """Yield what the exact deletion of each forget set took, and what is left of the set."""
    lines = []
    for split in SHARES:
        runs = _runs(found, split)
        base = runs.get(("base", "base"), [])
        for (layout, state), after in runs.items():
            if state == "deleted":
                before = runs.get((layout, "trained on all"), [])
                cells = [
                    *(layout, split, str(len(after))),
                    _mean(after, "share_of_training", form=".1%"),
                    _mean(after, "core_seconds", form=".0f"),
                    " / ".join(_mean(some, *MEMORISED) for some in (before, after, base)),
                    _mean(after, "attacked", "relearnt_in_domain", "value"),
                    " / ".join(_mean(some, *UTILITY) for some in (before, after)),
                ]
                lines.append(cells)
    header = (
        *("layout", "deleted", "runs", "of a training", "core-seconds"),
        *("memorised before / after / by the base", "relearnt, in domain", "utility before / after"),
    )
    yield from markdown(header, lines)


def headlines(found: Json) -> Iterator[tuple[str, str]]:
    """Yield what the front page says, as means over keys and seeds: what was measured, the result.

    Raise KeyError or ValueError where a figure is missing.
    """
    by_split = {split: _runs(found, split) for split in SHARES}
    runs = by_split["forget10"]
    layouts = [name for name, state in runs if state == "deleted"]
    shares = [
        f"{layout}: "
        + ", ".join(f"{_known(each[layout, 'deleted'], SHARE):.2f}" for each in by_split.values())
        for layout in layouts
    ]
    shares += [
        f"{each['adapters_equal']} of {each['adapters']} adapters equal those trained from scratch"
        for each in found["equal"]
    ]
    yield f"TOFU's {', '.join(SHARES)}, each in one request: share of a training", "; ".join(shares)

    def left(name: str, state: str) -> str:
        some = runs[name, state]
        return f"{_known(some, MEMORISED):.0%} ({_known(some, UTILITY):.2f})"

    useful = [row for row in runs["method", "unlearned"] if round(_known([row], UTILITY), 2)]
    memorised, utility = ([_known([row], path) for row in useful] for path in (MEMORISED, UTILITY))
    patches = f"{low_to_high(memorised, '.0%')} ({low_to_high(utility, '.2f')})"
    names = dict.fromkeys(row["method"] for row in useful)
    first = layouts[0]
    results = (
        f"**{left(first, 'deleted')}** after the deletion, {left(first, 'trained on all')} before "
        f"({first})",
        f"the base {left('base', 'base')}",
        f"one LoRA {left('lora', 'trained on all')}, {left('lora', 'trained without')} trained without "
        f"them, {patches} after {', '.join(names)}, where they leave a model",
    )
    yield "tokens of forget10's answers that the model predicts (its utility)", "; ".join(results)


def nine_table(found: Json) -> Iterator[str]:
    """Yield the nine terms of model utility."""
    header = ("model", *(each.replace("_", " ") for each in NINE))
    lines = [
        (name, *(_mean(some, "nine", term, "value") for term in NINE))
        for name, some in groups(found, "forget10")
        if all(row["nine"] for row in some)
    ]
    yield from markdown(header, lines) if lines else ["No model has been asked yet."]


def intervals_table(found: Json, split: ForgetSplit = "forget10") -> Iterator[str]:
    """Yield what each model still knows and keeps, with 95% intervals over questions.

    Of several runs the interval is from the lowest to the highest.
    """
    lines = [
        (name, *(_with_interval(some, path) for path in INTERVALS.values()))
        for name, some in groups(found, split)
        if all(row["forget"] for row in some)
    ]
    yield from markdown(("model", *INTERVALS), lines) if lines else ["No model has been asked yet."]


def _with_interval(some: Sequence[Json], path: Sequence[str]) -> str:
    mean = _middle(some, (*path, "value"))
    if mean is None:
        return "-"
    bounds = [_at(row, (*path, end)) for row in some for end in ("low", "high")]
    known = [each for each in bounds if each is not None]
    return f"{mean:{_form(mean)}} ({low_to_high(known, _form(mean))})"


def _form(value: float) -> str:
    """Return the form in which a value is shown: a small one by its power of ten."""
    return ".2f" if value >= 0.005 or value == 0 else ".0e"


def _cells(name: str, some: Sequence[Json]) -> list[str]:
    p, d = (_mean(some, "forget_quality", each) for each in ("p_value", "statistic"))
    return [
        name,
        str(len(some)),
        f"{p} / {d}",
        _mean(some, *UTILITY),
        _mean(some, "forget", "extraction_strength", "value"),
        _mean(some, *MEMORISED),
        _mean(some, "membership", "value"),
        *(_mean(some, "attacked", each, "value") for each in ATTACKS),
        _mean(some, "core_seconds", form=".0f"),
        _mean(some, "share_of_training", form=".1%"),
    ]


def _mean(some: Sequence[Json], *path: str, form: str = "") -> str:
    """Return the mean of a value over rows, with half of their range; a dash where one lacks it.

    Of references only the second is judged, by the first.
    """
    values = [_at(row, path) for row in some]
    known = [each for each in values if each is not None]
    if not known or (len(known) < len(values) and some[0]["state"] != "trained without"):
        return "-"
    half, mean = (max(known) - min(known)) / 2, fmean(known)
    form = form or _form(mean)
    spread = f" ± {half:{form if half else form.replace('.0e', '.0f')}}"
    return f"{mean:{form}}" + (spread if len(known) > 1 else "")


def _at(row: Any, path: Sequence[str]) -> float | None:
    for name in path:
        row = row.get(name) if isinstance(row, Mapping) else None
    return None if row is None else float(row)


def draw(found: Json, to: Path) -> None:
    """Draw utility against what is left of the forgotten answers, and what attacks bring back.

    A dot is a model, or the mean over its keys or seeds; it is hollow before the records were forgotten,
    and an arrow leads from there to what became of it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    models = groups(found, "forget10")
    _draw_models(left, models)
    _draw_attacks(right, models)
    for axis in (left, right):
        axis.grid(visible=True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    if right.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle("TOFU, forget10: what a model is good for, and what it still knows")
    figure.savefig(to, dpi=110)


def _draw_models(axis: Any, models: Sequence[tuple[str, list[Json]]]) -> None:
    places: dict[str, tuple[float, float]] = {}
    for name, some in models:
        left, useful = (_middle(some, path) for path in (MEMORISED, UTILITY))
        if left is not None and useful is not None:
            places[name] = left, useful
    before = {
        (some[0]["kind"], some[0]["layout"]): name
        for name, some in models
        if some[0]["state"] == "trained on all"
    }
    for name, some in models:
        if name not in places:
            continue
        axis.scatter(*[[each] for each in places[name]], **_style(some[0]))
        # on the left of the others
        is_bound = some[0]["state"] in ("base", "trained without") or places[name][0] < 0.5
        label = "" if some[0]["method"] and len(models) > CROWDED else names_of(some[0])[1]
        x, y = places[name]
        is_covered = any(
            abs(x - right) < 0.1 and 0 < above - y < 0.02 for right, above in places.values()
        )
        axis.annotate(
            label, (x, y), (-8 if is_bound else 7, -12 if is_covered else 4), textcoords="offset points",
            ha="right" if is_bound else "left", fontsize=8, color=KINDS[some[0]["kind"]][1],
        )  # fmt: skip
        kind = "lora" if some[0]["kind"] == "method" else some[0]["kind"]
        source = before.get((kind, some[0]["layout"]))
        if some[0]["state"] in ("deleted", "unlearned") and source in places:
            arrow = {"arrowstyle": "->", "color": KINDS[some[0]["kind"]][1], "alpha": 0.5, "shrinkA": 6,
                     "shrinkB": 6}  # fmt: skip
            axis.annotate("", places[name], places[source], arrowprops=arrow)
    axis.set_xlabel("tokens of forgotten answers that the model predicts (exact memorisation)")
    axis.set_ylabel("model utility")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.15 * max((useful for _, useful in places.values()), default=0.0) or 1.0)


def _draw_attacks(axis: Any, models: Sequence[tuple[str, list[Json]]]) -> None:
    attacked = [(name, some) for name, some in models if any(row["attacked"] for row in some)]
    for number, (_, some) in enumerate(attacked):
        aside = 0.6 * number / max(1, len(attacked) - 1) - 0.3
        heights = [_middle(some, ("attacked", each, "value")) for each in ATTACKS]
        places = [place + aside for place in range(len(ATTACKS))]
        axis.scatter(places, heights, label=names_of(some[0])[1], **_style(some[0]))
    axis.set_xticks(
        range(len(ATTACKS)),
        [each.replace(", ", ",\n").replace(" of k", "\nof k") for each in ATTACKS.values()],
        fontsize=8,
    )
    axis.set_xlim(-0.5, len(ATTACKS) - 0.5)
    axis.set_visible(bool(attacked))
    axis.set_ylabel("probability of a forgotten answer\n(best of k samples: ROUGE-L recall)")
    axis.set_ylim(bottom=0)


def _known(some: Sequence[Json], path: Sequence[str]) -> float:
    """Return the mean of a value over rows. Raise ValueError where no row has it."""
    value = _middle(some, path)
    if value is None:
        raise ValueError(f"no {path[0]} of {some[0]['name']}")
    return value


def _middle(some: Sequence[Json], path: Sequence[str]) -> float | None:
    values = [each for each in (_at(row, path) for row in some) if each is not None]
    return fmean(values) if values else None


def _style(row: Json) -> Json:
    colour = KINDS[row["kind"]][1]
    plain = "s" if row["layout"] == "16x4" else "o"
    marker = {"trained without": "*", "base": "X"}.get(row["state"], plain)
    if row["method"]:
        marker = MARKERS[list(METHODS).index(row["method"]) % len(MARKERS)]
    return {
        "marker": marker,
        "edgecolors": colour,
        "facecolors": "none" if row["state"] == "trained on all" else colour,
        "s": 90 if row["budget"] == 0.2 or row["state"] == "trained without" else 50,
    }
