"""Measure models on TOFU (`sisa eval tofu`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from cluster.cli.command import PATH, command
from cluster.cli.evaluation.findings import (
    about_model,
    auc_words,
    headline_words,
    over_unlearned_words,
    privleak_words,
)
from cluster.cli.evaluation.named_models import ask_models, weight_findings
from cluster.cli.evaluation.options import EvaluationOptions, evaluation, evaluation_options
from cluster.render.result import Result

if TYPE_CHECKING:
    from approx.benchmarks.headline import Headline
    from approx.benchmarks.tofu_measures import Aggregates
    from approx.evaluation.asking import FinishedLog
    from approx.evaluation.questions import Question
    from approx.metrics.forget_quality import ForgetQuality


@command("tofu", "--model model --reference retained --data tofu", group=evaluation)
@evaluation_options("locuslab/TOFU", max_new_tokens=200)
@click.option(
    "--split",
    type=click.Choice(["forget01", "forget05", "forget10"]),
    default="forget10",
    help="Forget set: this share of the authors, in percent.",
)
@click.option("--holdout", type=PATH, help="JSONL of questions that no model has seen.")
@click.option(
    "--truth-ratio",
    "variant",
    type=click.Choice(["geometric", "arithmetic"]),
    default="geometric",
    help="Mean of the wrong answers in the truth ratio.",
)
def tofu(variant: Any, split: Any, holdout: Path | None, **options: Unpack[EvaluationOptions]) -> Result:
    """Measure model utility and forget quality on TOFU."""
    if len(options["references"]) > 2:
        raise click.UsageError("give at most two references")
    from approx.benchmarks.tofu import evaluation_sets, reworded_questions
    from approx.benchmarks.tofu_measures import aggregates, tofu_headline
    from approx.evaluation.questions import HOLDOUT, check_apart, read_question_file

    def questions() -> list[Question]:
        found = evaluation_sets(options["data"], split, options["limit"])
        found += reworded_questions(options["data"], split, options["limit"])
        unseen = [] if holdout is None else read_question_file(holdout, HOLDOUT)
        check_apart(
            "TOFU", [each.question for each in found], holdout=[each.question for each in unseen]
        )
        return found + unseen

    found = ask_models("tofu", questions, options, split)
    if holdout is not None and not found.asked:
        raise click.UsageError("--holdout needs a model to ask, and only logs are given")
    judges = [each.rows for each in found.references]
    attacked = weight_findings(found, (split,), options)
    judged = []
    for model in found.models:
        measures = aggregates(model.rows, judges, variant)
        headline = tofu_headline(model.rows, judges, measures, attacked.get(model.name))
        judged.append((model, measures, headline))
    return measured_on_tofu(_split(found.all, split), judged, found.references)


def _split(found: Iterable[FinishedLog], asked: str) -> str:
    """Return the forget set that the rows name, or `asked` if only published logs are given."""
    sets = {row.set for each in found for row in each.rows if row.set.startswith("forget")}
    names = sets - {"forget"}
    return names.pop() if len(names) == 1 else asked


def measured_on_tofu(
    split: str,
    found: Sequence[tuple[FinishedLog, Aggregates, Headline]],
    references: Sequence[FinishedLog],
) -> Result:
    body = {
        "split": split,
        "models": [
            {**about_model(model), **asdict(measures), "headline": asdict(headline)}
            for model, measures, headline in found
        ],
        "references": [about_model(each) for each in references],
    }
    return Result(body, [line for each in found for line in _words(split, *each)])


def _words(split: str, model: FinishedLog, found: Aggregates, first: Headline) -> list[str]:
    forget = found.forget
    num = ", ".join(f"{name} {count}" for name, count in found.num_questions.items())
    lines = [
        f"{model.name} on TOFU {split} ({num} questions; truth ratio: {found.truth_ratio})",
        *headline_words(first),
        f"  model utility {found.model_utility:.4f}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in found.nine.items()),
        f"  forget set: probability {forget.probability:.4f}, ROUGE-L {forget.rouge:.4f}, "
        f"truth ratio {forget.truth_ratio:.4f}",
    ]
    if forget.extraction_strength is not None:
        lines.append(
            f"    extraction strength {forget.extraction_strength:.4f} (knowing nothing scores "
            f"{forget.extraction_floor:.4f}), exact memorisation {forget.exact_memorisation:.4f}"
        )
    lines.append(f"  {_quality(found.forget_quality)}")
    if found.aggregate is not None:
        lines.append(f"  forget quality and utility together {found.aggregate:.4g}")
    lines.append(f"  membership, forget against holdout: {auc_words(found.attacks, '--holdout')}")
    lines += over_unlearned_words(found.attacks)
    if found.privleak is not None:
        lines.append(privleak_words(found.privleak))
    against = auc_words(found.attacks_against_reference, "--reference with scores")
    lines.append(f"  the same questions against the reference: {against}")
    lines += over_unlearned_words(found.attacks_against_reference)
    return [*lines, f"  log {model.log}"]


def _quality(found: ForgetQuality | None) -> str:
    if found is None:
        return "forget quality not measured: give --reference"
    numbers = f"n = {found.num_model} and {found.num_reference}, D = {found.statistic:.4f}"
    floor = "not measured: give a second --reference"
    if (noise := found.noise_floor) is not None:
        floor = f"p = {noise.p_value:.4g}, D = {noise.statistic:.4f}"
    return f"forget quality {found.p_value:.4g} ({numbers}; noise floor of two references {floor})"
