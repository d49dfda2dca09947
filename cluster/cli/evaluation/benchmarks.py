"""Measure models on the benchmarks whose measures are means of scores (`sisa eval rwku` and others)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import click

from cluster.cli.command import command
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
    from approx.benchmarks.measures import Benchmark, Measured
    from approx.evaluation.asking import FinishedLog
    from approx.metrics.estimate import Estimate

ANSWER_TEMPLATE = "{question}Answer: {answer}"


@command("rwku", "--model unlearned --reference retained --data rwku", group=evaluation)
@evaluation_options("jinzhuoran/RWKU", ANSWER_TEMPLATE)
@click.option("--subject", "subjects", multiple=True, help="A person to be forgotten. Repeatable.")
def rwku(subjects: tuple[str, ...], **options: Unpack[EvaluationOptions]) -> Result:
    """Measure on RWKU what is known of famous people."""
    from approx.benchmarks.rwku import RWKU, rwku_questions

    return measure_on(replace(RWKU, read=partial(rwku_questions, subjects=subjects)), options)


@command("muse", "--model unlearned --reference retained --data muse/news", group=evaluation)
@evaluation_options("muse-bench/MUSE-News")
@click.option(
    "--order",
    type=click.Choice(["scalability", "sustainability"]),
    help="The models, in order: of growing forget sets, or after one request, two, ...",
)
def muse(order: str | None, **options: Unpack[EvaluationOptions]) -> Result:
    """Measure on MUSE what is remembered of news or books."""
    from approx.benchmarks.muse import MUSE

    if order is not None and len(options["models"]) < 2:
        raise click.UsageError("--order needs two models or more")
    return measure_on(MUSE, options, order)


@command("whp", "--model unlearned --reference retained --data whp", group=evaluation)
@evaluation_options("")
def whp(**options: Unpack[EvaluationOptions]) -> Result:
    """Measure how familiar models are with a fiction."""
    from approx.benchmarks.whp import WHP

    return measure_on(WHP, options)


@command("wmdp", "--model unlearned --reference base --data wmdp", group=evaluation)
@evaluation_options("cais/wmdp", ANSWER_TEMPLATE)
def wmdp(**options: Unpack[EvaluationOptions]) -> Result:
    """Measure hazardous knowledge, by choices and by open answers."""
    from approx.benchmarks.wmdp import WMDP

    return measure_on(WMDP, options)


@command("stereotypes", "--model unlearned --reference base --data crows-pairs", group=evaluation)
@evaluation_options("nyu-mll/crows_pairs")
def stereotypes(**options: Unpack[EvaluationOptions]) -> Result:
    """Measure which of two sentences models find likelier: the stereotypical one, or the other."""
    from approx.benchmarks.stereotypes import STEREOTYPES

    return measure_on(STEREOTYPES, options)


def measure_on(benchmark: Benchmark, options: EvaluationOptions, order: str | None = None) -> Result:
    """Ask the models of a command, and return their measures beside the first reference's.

    With an `order`, the models are a series, and each measure's changes since the first are shown.
    Raise as `ask_models` and `weight_findings`.
    """
    from approx.benchmarks.measures import measured, since_first

    read = partial(benchmark.read, options["data"], options["limit"])
    found = ask_models(benchmark.name, read, options)
    judges = [each.rows for each in found.references]
    attacked = weight_findings(found, benchmark.extraction, options)
    results = [
        (each, measured(benchmark, each.rows, judges, attacked.get(each.name))) for each in found.models
    ]
    body: dict[str, Any] = {
        "benchmark": benchmark.name,
        "models": [about_model(model) | asdict(result) for model, result in results],
        "references": [about_model(each) for each in found.references],
        "weakness": benchmark.weakness,
    }
    if order is not None:
        body["order"] = order
        changes = since_first(benchmark, [each.rows for each in found.models])
        body["since_first"] = {
            name: [asdict(each) for each in series] for name, series in changes.items()
        }
    lines = [line for each in results for line in _words(benchmark, *each)]
    if order is not None:
        lines.append(f"{order}: change since the first model, in the given order")
        lines += [f"  {name:<32} {_in_order(each)}" for name, each in changes.items()]
    return Result(body, [*lines, *filter(None, [benchmark.weakness])])


def _in_order(series: Sequence[Estimate]) -> str:
    return ", ".join(f"{each.value:+.4f} [{each.low:+.4f}, {each.high:+.4f}]" for each in series)


def _words(benchmark: Benchmark, model: FinishedLog, found: Measured) -> Iterator[str]:
    num = sum(found.num_questions.values())
    yield f"{model.name} on {benchmark.name} ({num} questions)"
    yield from headline_words(found.headline)
    for name, each in found.measures.items():
        beside = ""
        if each.change is not None:
            away = each.change
            beside = f"; {away.value:+.4f} [{away.low:+.4f}, {away.high:+.4f}] beside the reference"
        yield f"    {name:<32} {each.value:.4f} [{each.low:.4f}, {each.high:.4f}] of {each.num}{beside}"
    if found.membership is not None:
        yield f"  membership: {auc_words(found.membership)}"
        yield from over_unlearned_words(found.membership)
    if found.privleak is not None:
        yield privleak_words(found.privleak)
    yield f"  log {model.log}"
