"""Define `sisa eval` and the options that its commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import click

from cluster.cli.command import PATH, command_group, log_format_option, max_new_tokens_option
from cluster.render.result import Result

if TYPE_CHECKING:
    from approx.evaluation.evaluated_models import Dtype
    from approx.evaluation.questions import PromptKind

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
