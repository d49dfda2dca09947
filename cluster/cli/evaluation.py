"""Measure what models know (`sisa eval tofu`), and what attacks find (`sisa eval attacks`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH, command, command_group, log_format_option
from cluster.observe.reporting import watched
from cluster.render.render import Result
from sisa.core.events import Notice

if TYPE_CHECKING:
    from approx.attacks.attack import Curve, SetName
    from approx.attacks.attack_log import AttackedModel
    from approx.benchmarks.tofu_aggregates import Aggregates
    from approx.evaluation.asking import Evaluated
    from approx.metrics.auc import Auc
    from approx.metrics.forget_quality import ForgetQuality
    from approx.metrics.privleak import PrivLeak

TAUGHT_SHARE = 4  # one of this many texts is taught, where no others are given for it

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
    from approx.benchmarks.tofu_aggregates import aggregates
    from approx.evaluation.asking import check_same_settings

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
    from approx.benchmarks.tofu import evaluation_sets
    from approx.evaluation.asking import finished_log
    from approx.evaluation.questions import read_holdout
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
    if found.privleak is not None:
        lines.append(_privleak(found.privleak))
    return [*lines, f"  log {model.log}"]


def _privleak(found: PrivLeak) -> str:
    return (
        f"  PrivLeak {found.value:+.1f}% [{found.low:+.1f}, {found.high:+.1f}]: 0 is the reference, "
        "below 0 still recognised, above 0 over-unlearned"
    )


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


@command("attacks", "--model unlearned --reference retained --data forgotten.jsonl", group=evaluation)
@click.option(
    "-m", "--model", "models", multiple=True, required=True, help="Directory or hub name. Repeatable."
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="A model that never saw the texts: calibrates membership. Two or more give LiRA.",
)
@click.option("--before", help="The model before unlearning: says when half of it is back.")
@click.option("--data", required=True, type=PATH, help="JSONL of question and answer.")
@click.option(
    "--taught", type=PATH, help="Like texts to relearn from; by default the data's first quarter."
)
@click.option("--others", type=PATH, help="Texts about anything else, to relearn from.")
@click.option("--holdout", type=PATH, help="Like texts that no model has seen, for membership.")
@click.option("--attack", "names", multiple=True, help="Make these attacks alone. Repeatable.")
@click.option("--out", default="attack-logs", type=PATH)
@click.option("--prompt", "kind", type=click.Choice(["completion", "chat"]))
@click.option("--template", default="{question}{answer}", help="Form of a prompt; \\n is a line break.")
@click.option("--max-new-tokens", default=64, type=click.IntRange(1))
@click.option("--samples", default=8, type=click.IntRange(1), help="Answers sampled to each question.")
@click.option("--seed", default=0)
@click.option("--device", default="cpu", help="A torch device, such as cuda.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@log_format_option
def attacks(models: tuple[str, ...], references: tuple[str, ...], **options: Any) -> Result:
    """Attack models: what comes back of texts that they should have forgotten."""
    from approx.attacks.attack import probabilities
    from approx.attacks.attack_log import OpenedModel, attack_opened
    from approx.attacks.sampling import LeakAtK
    from approx.evaluation.evaluated import PromptForm

    template = options["template"].replace("\\n", "\n")
    form = PromptForm(options["kind"], template) if options["kind"] else template
    texts = _texts(options)

    def opened(spec: str) -> OpenedModel:
        return OpenedModel(spec, form, options["device"], options["dtype"])

    known = None
    if options["before"] is not None:
        before = opened(options["before"])
        known = fmean(probabilities(before.model, before.sets(texts).examples("asked")))
    judges = [opened(each) for each in references]
    leak = LeakAtK(options["samples"], options["max_new_tokens"])
    with watched() as report:
        found = []
        for spec in dict.fromkeys(models):
            report(Notice(f"{spec}: attacking"))
            rest = (options["names"], leak, options["seed"], options["out"])
            found.append(attack_opened(opened(spec), judges, texts, *rest))
    return attacked(found, known)


def _texts(options: Mapping[str, Any]) -> dict[SetName, list[tuple[str, str]]]:
    """Return questions and answers by their role. Raise InvalidInput for files that can't be used."""
    from approx.evaluation.questions import read_holdout

    paths: dict[SetName, Path | None] = {
        "asked": options["data"],
        "taught": options["taught"],
        "others": options["others"],
        "holdout": options["holdout"],
    }
    found = {
        role: [(each.question, each.answer) for each in read_holdout(path)]
        for role, path in paths.items()
        if path is not None
    }
    if options["taught"] is None:
        num = len(found["asked"]) // TAUGHT_SHARE
        found["taught"], found["asked"] = found["asked"][:num], found["asked"][num:]
    return found


def attacked(found: Sequence[AttackedModel], known: float | None) -> Result:
    body = {"known_before": known, "models": [_attack_json(each, known) for each in found]}
    return Result(body, [line for each in found for line in _attack_words(each, known)])


def _attack_json(model: AttackedModel, known: float | None) -> dict[str, Any]:
    from approx.metrics.auc import reading

    curves = {name: curve for name, row in model.rows.items() if (curve := row.curve)}
    aucs = (model.rows["membership"].aucs or {}) if "membership" in model.rows else None
    leak = model.rows["privleak"].privleak if "privleak" in model.rows else None
    return {
        "model": model.name,
        "digest": model.digest,
        "log": str(model.log),
        "settings": dict(model.settings),
        "curves": {
            name: {
                "measure": each.measure,
                "num_texts": max(map(len, each.values.values()), default=0),
                "means": each.means,
                "steps_until_half": _half(name, each, known),
            }
            for name, each in curves.items()
        },
        "membership": aucs
        and {name: {**asdict(each), "reading": reading(each)} for name, each in aucs.items()},
        "privleak": leak and asdict(leak),
        "not_made": dict(model.not_made),
    }


def _half(name: str, curve: Curve, known: float | None) -> float | None:
    from approx.attacks.relearning import steps_until_half

    return (
        steps_until_half(curve, known) if known is not None and name.startswith("relearning") else None
    )


def _attack_words(model: AttackedModel, known: float | None) -> Iterator[str]:
    curves = {name: curve for name, row in model.rows.items() if (curve := row.curve)}
    plain = curves.pop("as_it_is")
    yield f"{model.name}: {len(plain.values['0'])} texts, probability as it is {plain.mean:.4f}"
    for name, each in curves.items():
        points = ", ".join(f"{strength} {mean:.4f}" for strength, mean in each.means.items())
        half = _half(name, each, known)
        back = "" if half is None else f"; half is back after {half:.1f} steps"
        yield f"  {name:<24} {each.measure}: {points or 'no text has a question'}{back}"
    aucs = model.rows["membership"].aucs if "membership" in model.rows else None
    if aucs:
        yield f"  {'membership':<24} {_attacks(aucs, '')}"
        yield from _over_unlearned(aucs)
    if "privleak" in model.rows and (leak := model.rows["privleak"].privleak):
        yield _privleak(leak)
    for name, why in model.not_made.items():
        yield f"  {name:<24} not made: {why}"
    yield f"  log {model.log}"
