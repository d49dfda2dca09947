"""Define what the commands of `sisa eval` share: options, how models are asked, and lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import click

from cluster.cli.command import PATH, command_group, log_format_option, max_new_tokens_option
from cluster.observe.reporting import watched
from cluster.render.result import Result

if TYPE_CHECKING:
    from approx.attacks.attack_run import AttackedModel, AttackOrder
    from approx.benchmarks.headline import Finding, Headline
    from approx.evaluation.asking import FinishedLog
    from approx.evaluation.evaluated_models import Dtype
    from approx.evaluation.questions import PromptKind, Question
    from approx.metrics.auc import Auc
    from approx.metrics.privleak import PrivLeak

TAUGHT_SHARE = 4  # one of this many texts is taught, where no others are given for it
evaluation = command_group("eval", "Measure what models know.")


class AttackOptions(TypedDict):
    """The options by which models are attacked."""

    before: str | None
    template: str
    kind: PromptKind | None
    device: str
    dtype: Dtype
    executor: Literal["ray", "serial"]
    address: str | None


class EvaluationOptions(AttackOptions):
    """The options of every benchmark."""

    models: tuple[str, ...]
    references: tuple[str, ...]
    data: str
    out: Path
    limit: int | None
    max_new_tokens: int
    batch_size: int


def template_option(default: str = "{question}{answer}") -> Callable[..., Any]:
    """Return the option `--template`, in which the shell's \\n becomes a line break."""
    return click.option(
        "--template",
        default=default,
        callback=lambda _context, _option, given: given.replace("\\n", "\n"),
        help="Form of a prompt; \\n is a line break.",
    )


def logs_option(default: str) -> Callable[..., Any]:
    """Return the option that names the directory of logs."""
    return click.option(
        "-o",
        "--output",
        "--out",
        "out",
        default=default,
        type=PATH,
        help="Directory of the logs; an interrupted run continues from them.",
    )


def machine_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options about the machine and the form of prompts."""
    for option in (  # `--help` shows the last one first
        log_format_option,
        click.option(
            "--address", metavar="HOST:PORT", help="A running Ray cluster; by default a local Ray."
        ),
        click.option(
            "--executor",
            type=click.Choice(["ray", "serial"]),
            default="ray",
            help="ray; serial: the same numbers in this process.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            help="Data type of the weights.",
        ),
        click.option("--device", default="cpu", help="A torch device, such as cuda."),
        click.option(
            "--prompt",
            "kind",
            type=click.Choice(["completion", "chat"]),
            help="Form of prompts; by default what suits the model.",
        ),
    ):
        function = option(function)
    return function


def evaluation_options(
    data: str, template: str = "{question}{answer}", max_new_tokens: int = 256
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Return a decorator that adds the options of every benchmark.

    `data` is its name on the hub, if there is one; logs go to a directory named after the command.
    """

    def add(function: Callable[..., Result]) -> Callable[..., Result]:
        name = function.__name__
        hub = {"default": data} if data else {"required": True}
        for option in (  # `--help` shows the last one first
            machine_options,
            click.option(
                "--batch-size", default=8, type=click.IntRange(1), help="Questions asked at once."
            ),
            max_new_tokens_option(max_new_tokens),
            template_option(template),
            click.option(
                "--limit",
                "--questions",
                "limit",
                type=click.IntRange(1),
                help="Ask this many of each set.",
            ),
            logs_option(f"{name}-logs"),
            click.option("--data", help="Directory or hub name.", **hub),
            click.option(
                "--before", help="The model before unlearning: adds relearning and the depth score."
            ),
            click.option(
                "--reference",
                "references",
                multiple=True,
                help="A model that never saw what is to be forgotten, or its log. Repeatable.",
            ),
            click.option(
                "-m",
                "--model",
                "models",
                multiple=True,
                required=True,
                help="Directory, hub name or finished log. Repeatable.",
            ),
        ):
            function = option(function)
        return function

    return add


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


def about_model(model: FinishedLog | AttackedModel) -> dict[str, Any]:
    """Return the keys of a model that all of these commands print."""
    settings = None if model.settings is None else dict(model.settings)
    return {"model": model.name, "digest": model.digest, "log": str(model.log), "settings": settings}


def headline_words(found: Headline) -> Iterator[str]:
    """Yield a line for each finding of a headline."""
    for name, each in found.findings.items():
        beside = "" if each.target is None else f", beside {each.target:.4f}"
        if each.away is not None:
            beside += f": {each.away.value:+.4f} [{each.away.low:+.4f}, {each.away.high:+.4f}]"
        lost = "  LOST" if each.lost else ""
        yield f"  {name:<20} {each.value:.4f}{beside} ({each.measure}){lost}"
    for name, needs in found.not_measured.items():
        yield f"  {name:<20} not measured: needs {needs}"


def privleak_words(found: PrivLeak) -> str:
    """Return PrivLeak with the meaning of its sign."""
    return (
        f"  PrivLeak {found.value:+.1f}% [{found.low:+.1f}, {found.high:+.1f}]: 0 is the reference, "
        "below 0 still recognised, above 0 over-unlearned"
    )


def over_unlearned_words(found: Mapping[str, Auc] | None) -> list[str]:
    """Return a line for each meaning of AUCs below 0.5, with its attacks."""
    from approx.metrics.auc import reading

    by_reading: dict[str, list[str]] = {}
    for name, each in (found or {}).items():
        if each.high < 0.5:
            by_reading.setdefault(reading(each), []).append(name)
    return [f"    {', '.join(names)}: {words}" for words, names in by_reading.items()]


def auc_words(found: Mapping[str, Auc] | None, needs: str = "") -> str:
    """Return AUCs with their intervals, or the option that they need."""
    if found is None:
        return f"not measured: give {needs}"
    return ", ".join(
        f"{name} AUC {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for name, each in found.items()
    )
