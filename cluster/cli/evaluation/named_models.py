"""Ask and attack the models that a command of `sisa eval` names, on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.evaluation.options import AttackOptions, EvaluationOptions
from cluster.observe.reporting import watched

if TYPE_CHECKING:
    from approx.attacks.attack_run import AttackedModel, AttackOrder
    from approx.benchmarks.headline import Finding
    from approx.evaluation.asking import FinishedLog
    from approx.evaluation.questions import Question

TAUGHT_SHARE = 4  # one of this many texts is taught, where no others are given for it


@dataclass(frozen=True)
class AskedModels:
    """The finished logs of the models of a command, and of their references."""

    models: Sequence[FinishedLog]
    references: Sequence[FinishedLog]
    questions: Sequence[Question] = ()  # empty if only logs were given
    asked: Sequence[str] = ()  # names of the models and references that were not given as logs

    @property
    def all(self) -> list[FinishedLog]:
        return [*self.models, *self.references]


def ask_models(
    benchmark: str, questions: Callable[[], list[Question]], options: EvaluationOptions, name: str = ""
) -> AskedModels:
    """Ask the models and references of a command, all at once on Ray; finished logs are read instead.

    `name` is the prefix of the names of logs. Raise InvalidInput for logs of another benchmark,
    ConfigConflict for references with other settings, and the errors of `evaluate_task`.
    """
    from approx.evaluation.asking import check_same_settings, finished_log
    from cluster.ray.eval_tasks import EvaluationTask, evaluate_task, run_on_models

    models, references = dict.fromkeys(options["models"]), dict.fromkeys(options["references"])
    specs = dict.fromkeys([*models, *references])
    files = [each for each in specs if each.endswith((".json", ".jsonl")) and Path(each).is_file()]
    found = {spec: finished_log(Path(spec), benchmark) for spec in files}
    held: list[Question] = []
    if asked := [spec for spec in specs if spec not in found]:
        held = questions()
        tasks = [
            EvaluationTask(
                spec,
                benchmark,
                held,
                name=name or benchmark,
                out=options["out"],
                kind=options["kind"],
                template=options["template"],
                max_new_tokens=options["max_new_tokens"],
                batch_size=options["batch_size"],
                device=options["device"],
                dtype=options["dtype"],
            )
            for spec in asked
        ]
        with watched() as report:
            done = run_on_models(tasks, evaluate_task, options["executor"], options["address"], report)
        found |= dict(zip(asked, done, strict=True))
    for model in models:
        for judge in references:
            check_same_settings(found[model], found[judge])
    logs = ([found[each] for each in models], [found[each] for each in references])
    return AskedModels(*logs, held, asked)


def weight_findings(
    found: AskedModels, sets: Sequence[str], options: EvaluationOptions
) -> dict[str, dict[str, Finding | None]]:
    """Attack the weights, and return the findings by model; without `--before` there are none.

    `sets` name the questions to be forgotten; a quarter of them is taught. Raise the errors of
    `attack_task`, and UsageError if only logs are given.
    """
    if options["before"] is None:
        return {}
    if not found.asked:
        raise click.UsageError("--before needs a model to attack, and only logs are given")
    from approx.attacks.attack_run import AttackOrder
    from approx.benchmarks.headline import FROM_ATTACKS, attack_findings
    from approx.benchmarks.measures import in_sets

    forget = [each for each in found.questions if in_sets(each.set, sets)]
    taught, asked = split_taught([(each.question, each.answer) for each in forget])
    order = AttackOrder({"asked": asked, "taught": taught}, options["out"], names=FROM_ATTACKS)
    if any(each.how is not None and each.how.kind == "completion" for each in forget):
        options = options | {"kind": "completion", "template": "{question}{answer}"}
    judges = [each.name for each in found.references if each.name in found.asked][:1]
    models = [each.name for each in found.models if each.name in found.asked]
    done = attack_models([*models, *judges], judges, order, options)
    judge = done[-1].rows if judges else None
    return {
        spec: attack_findings(each.rows, judge, each.known_before)
        for spec, each in zip([*models, *judges], done, strict=True)
    }


def attack_models(
    specs: Sequence[str], references: Sequence[str], order: AttackOrder, options: AttackOptions
) -> list[AttackedModel]:
    """Attack models, all at once on Ray. Raise the errors of `attack_task`."""
    from approx.evaluation.questions import PromptForm
    from cluster.ray.eval_tasks import AttackTask, attack_task, run_on_models

    template = options["template"]
    tasks = [
        AttackTask(
            spec,
            tuple(references),
            before=options["before"],
            order=order,
            form=PromptForm(options["kind"], template) if options["kind"] else template,
            device=options["device"],
            dtype=options["dtype"],
        )
        for spec in specs
    ]
    with watched() as report:
        return run_on_models(tasks, attack_task, options["executor"], options["address"], report)


def split_taught(pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split texts into the first quarter, which is taught again, and the rest, which is asked."""
    num = len(pairs) // TAUGHT_SHARE
    return pairs[:num], pairs[num:]
