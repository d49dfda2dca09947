"""Measure what models, or logs of them, know of a forget set and a retain set: `sisa eval tofu`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH, command, command_group, log_format_option
from cluster.observe.reporting import watched
from cluster.render.render import Result

if TYPE_CHECKING:
    from approx.evaluation.tofu_aggregates import Aggregates
    from approx.evaluation.tofu_evaluation import Evaluated
    from approx.metrics.auc import Auc
    from approx.metrics.forget_quality import ForgetQuality

evaluation = command_group("eval", "Measure what models know.")


@command("tofu", "--model model --reference retained --data tofu", group=evaluation)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Directory, hub name or finished log. Repeatable.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="A model that never saw the forget set, or its log; a second one gives the noise floor.",
)
@click.option("--split", type=click.Choice(["forget01", "forget05", "forget10"]), default="forget10")
@click.option("--data", default="locuslab/TOFU", help="Directory or hub name.")
@click.option("--out", default="tofu-logs", type=PATH)
@click.option("--holdout", type=PATH, help="JSONL of questions that no model has seen.")
@click.option("--questions", "limit", type=click.IntRange(1), help="Ask this many of each set.")
@click.option(
    "--prompt",
    "kind",
    type=click.Choice(["completion", "chat"]),
    help="Form of prompts; by default what suits the model.",
)
@click.option("--template", default="{question}{answer}", help="Form of a prompt; \\n is a line break.")
@click.option("--max-new-tokens", default=200, type=click.IntRange(1))
@click.option(
    "--truth-ratio", "variant", type=click.Choice(["geometric", "arithmetic"]), default="geometric"
)
@click.option("--batch-size", default=8, type=click.IntRange(1))
@click.option("--device", default="cpu", help="A torch device, such as cuda.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--executor", type=click.Choice(["ray", "serial"]), default="ray")
@click.option("--address", help="HOST:PORT of a Ray cluster; by default a local Ray.")
@log_format_option
def tofu(models: tuple[str, ...], references: tuple[str, ...], variant: Any, **options: Any) -> Result:
    """Measure model utility and forget quality on TOFU."""
    if len(references) > 2:
        raise click.UsageError("give at most two references")
    from approx.evaluation.tofu_aggregates import aggregates
    from approx.evaluation.tofu_evaluation import check_same_settings

    found = _evaluated(list(dict.fromkeys([*models, *references])), options)
    judges = [found[each] for each in references]
    judged = []
    for model in (found[name] for name in dict.fromkeys(models)):
        for judge in judges:
            check_same_settings(model, judge)
        judged.append((model, aggregates(model.rows, [each.rows for each in judges], variant)))
    return measured(_split(found.values(), options["split"]), judged, judges)


def _split(found: Iterable[Evaluated], asked: str) -> str:
    """Return the forget set that the rows name, or `asked` if only published logs are given."""
    sets = {row.set for each in found for row in each.rows if row.set.startswith("forget")}
    named = sets - {"forget"}
    return named.pop() if len(named) == 1 else asked


def _evaluated(specs: list[str], options: dict[str, Any]) -> dict[str, Evaluated]:
    from approx.evaluation.tofu import evaluation_sets, read_holdout
    from approx.evaluation.tofu_evaluation import finished_log
    from cluster.ray.eval_tasks import EvaluationTask, run_evaluations

    files = [each for each in specs if each.endswith((".json", ".jsonl")) and Path(each).is_file()]
    logs = {spec: finished_log(Path(spec)) for spec in files}
    if len(logs) == len(specs):
        if options["holdout"] is not None:
            raise click.UsageError("--holdout needs a model to ask, and only logs are given")
        return logs
    questions = evaluation_sets(options["data"], options["split"], options["limit"])
    if options["holdout"] is not None:
        questions += read_holdout(options["holdout"])
    passed = ("split", "out", "kind", "max_new_tokens", "batch_size", "device", "dtype")
    template = options["template"].replace("\\n", "\n")
    settings = {"template": template, **{name: options[name] for name in passed}}
    asked = [spec for spec in specs if spec not in logs]
    tasks = [EvaluationTask(spec=spec, questions=questions, **settings) for spec in asked]
    with watched() as report:
        ray = options["executor"] == "ray"
        done = run_evaluations(tasks, ray=ray, address=options["address"], report=report)
    return logs | dict(zip(asked, done, strict=True))


def measured(
    split: str, found: Sequence[tuple[Evaluated, Aggregates]], references: Sequence[Evaluated]
) -> Result:
    body = {
        "split": split,
        "models": [_named(model) | asdict(aggregates) for model, aggregates in found],
        "references": [_named(each) for each in references],
    }
    return Result(body, [line for each in found for line in _words(split, *each)])


def _named(model: Evaluated) -> dict[str, Any]:
    settings = None if model.settings is None else dict(model.settings)
    return {"model": model.name, "digest": model.digest, "log": str(model.log), "settings": settings}


def _words(split: str, model: Evaluated, found: Aggregates) -> list[str]:
    forget = found.forget
    num = ", ".join(f"{name} {count}" for name, count in found.num_questions.items())
    lines = [
        f"{model.name} on TOFU {split} ({num} questions; truth ratio: {found.truth_ratio})",
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
    lines.append(f"  membership, forget against holdout: {_attacks(found.attacks, '--holdout')}")
    lines += _over_unlearned(found.attacks)
    against = _attacks(found.attacks_against_reference, "--reference with scores")
    lines.append(f"  the same questions against the reference: {against}")
    lines += _over_unlearned(found.attacks_against_reference)
    if (leak := found.privleak) is not None:
        lines.append(
            f"  PrivLeak {leak.value:+.1f}% [{leak.low:+.1f}, {leak.high:+.1f}]: 0 is the reference, "
            "below 0 still recognised, above 0 over-unlearned"
        )
    return [*lines, f"  log {model.log}"]


def _over_unlearned(found: Mapping[str, Auc] | None) -> list[str]:
    """Return what AUCs below 0.5 mean, each reading with its attacks."""
    from approx.metrics.auc import reading

    named: dict[str, list[str]] = {}
    for name, each in (found or {}).items():
        if each.high < 0.5:
            named.setdefault(reading(each), []).append(name)
    return [f"    {', '.join(names)}: {words}" for words, names in named.items()]


def _quality(found: ForgetQuality | None) -> str:
    if found is None:
        return "forget quality not measured: give --reference"
    numbers = f"n = {found.num_model} and {found.num_reference}, D = {found.statistic:.4f}"
    floor = "not measured: give a second --reference"
    if (noise := found.noise_floor) is not None:
        floor = f"p = {noise.p_value:.4g}, D = {noise.statistic:.4f}"
    return f"forget quality {found.p_value:.4g} ({numbers}; noise floor of two references {floor})"


def _attacks(found: Mapping[str, Auc] | None, needs: str) -> str:
    if found is None:
        return f"not measured: give {needs}"
    return ", ".join(
        f"{name} AUC {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for name, each in found.items()
    )
