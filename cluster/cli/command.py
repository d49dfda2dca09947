"""Define the root group, `--json`, and the options that several commands share.

A command is a function that returns a `Result`; `cli.run` prints it. A function beside it, named by a
participle, renders what it found: `audit` returns `audited(found)`. What several commands, or the
service, show of deletions, requests and rights is rendered in `cluster/render/`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from cluster.cli.input_files import STANDARD_INPUT, read_lines, read_text
from cluster.observe.reporting import LOG_FORMAT_OPTION, logged_run, watched
from cluster.render.result import Result

if TYPE_CHECKING:
    from sisa.flows.wiring.executors import OpenExecutor
    from sisa.model import Model


ExecutorChoice: TypeAlias = "str | OpenExecutor"
PATH = click.Path(path_type=Path)


SECTIONS = {
    "Begin": ("quickstart", "init", "plan", "simulate", "routing", "config"),
    "Train and use": ("train", "add", "generate", "serve", "export", "cluster"),
    "Look": ("status", "find", "where", "metrics", "report"),
    "Delete": ("forget", "request", "run", "rectify", "drop"),
    "Other rights of a person": ("access", "recipients", "restrict", "release"),
    "Prove": (
        *("verify", "sweep", "audit", "keys", "certificate", "receipt", "log", "prove", "revocations"),
        *("verify-certificate", "verify-proof", "rebuild", "check-adapter"),
    ),
    "What the base knows": ("approx", "eval"),
    "Maintain": ("doctor", "gc", "ledger", "token", "engines"),
}


class _Root(click.Group):
    """The root group. Its help shows commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str()) for name in names])


@click.group(
    cls=_Root,
    help="Train a language model from which records can be deleted exactly.\n\n"
    "Start with `sisa quickstart`, or with `sisa init DIR`.",
    context_settings={"show_default": True},
)
@click.version_option(package_name="deletion-ready-model", prog_name="sisa")
def cli() -> None:
    """Hold all commands."""


def command_group(name: str, help: str) -> click.Group:
    """Add a group of commands to the root group."""
    made = click.Group(name, help=help, short_help=help)
    cli.add_command(made)
    return made


def command(
    name: str, example: str, group: click.Group = cli
) -> Callable[[Callable[..., Result]], click.Command]:
    """Register a function that returns a Result as a command, with `--json` and an example."""

    def register(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def invoke(as_json: bool, **arguments: Any) -> tuple[int, str]:
            with logged_run(click.get_current_context().command_path):
                result = function(**arguments)
            return result.exit_code, json.dumps(result.json, indent=2) if as_json else result.text

        path = name if group is cli else f"{group.name} {name}"
        epilog = f"\b\nExample:\n  sisa {path} {example}"
        # The first sentence, since click cuts a summary that it makes itself to one line.
        summary = re.split(r"(?<=\.)\s", function.__doc__ or "", maxsplit=1)[0]
        made = click.command(name, short_help=summary, epilog=epilog)(invoke)
        made.params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object.")
        )
        group.add_command(made)
        return made

    return register


run_file_argument = click.argument("run_file", type=PATH)
model_option = click.option(
    "-m", "--model", "directory", required=True, type=PATH, help="Model directory."
)
log_format_option = click.option(
    LOG_FORMAT_OPTION,
    type=click.Choice(["text", "json"]),
    default="text",
    expose_value=False,
    help="Format of standard error: words and progress, or one JSON object a line.",
)


def executor_option(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add `--executor` and `--address`, passed as one argument `executor`, and `--log-format`."""

    @log_format_option
    @click.option(
        "--executor",
        "name",
        metavar="[auto|ray|serial]",
        default="auto",
        help="ray; serial: the same bytes in this process; auto: Ray, unless a single shard is to be "
        "trained here.",
    )
    @click.option(
        "--address",
        metavar="HOST:PORT",
        help="A running Ray cluster to use instead of the run file's; `auto`: this machine's.",
    )
    @functools.wraps(function)
    def invoke(name: str, address: str | None, **arguments: Any) -> Result:
        if address is None:
            return function(executor=name, **arguments)
        if "://" in address:
            raise click.UsageError(
                "--address takes HOST:PORT of a cluster to which this machine belongs; "
                "`sisa cluster submit` takes the http:// address of its dashboard"
            )
        if name == "serial":
            raise click.UsageError("--address needs --executor ray: the serial executor uses no cluster")
        from sisa.flows.wiring.executors import OnCluster

        return function(executor=OnCluster(name, address), **arguments)

    return invoke


def option_or_file(
    option: str, *, required: bool = False, **options: Any
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Add an option and its twin `-file`, since others can see a command line, and shells store it."""
    name = option.removeprefix("--")

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @click.option(option, **options)
        @click.option(f"{option}-file", type=PATH, help=f"File with the {name}; `-`: standard input.")
        @functools.wraps(function)
        def invoke(**arguments: Any) -> Result:
            file: Path | None = arguments.pop(f"{name}_file")
            given = (file is not None) + (arguments[name] is not None)
            if given > 1 or (required and not given):
                raise click.UsageError(f"give {option} or {option}-file")
            if file is not None:
                arguments[name] = "\n".join(read_lines(file))
            return function(**arguments)

        return invoke

    return decorate


def option_or_input(option: str, *, help: str, **options: Any) -> Callable[..., Any]:
    """Add an option that reads standard input for `-`, to keep its value out of the command line."""
    help = f"{help.rstrip('.')}; `-`: standard input."
    return click.option(option, callback=_or_input, help=help, **options)


def _or_input(_context: click.Context, _parameter: click.Parameter, given: Any) -> Any:
    return read_text(STANDARD_INPUT).rstrip("\n") if given == str(STANDARD_INPUT) else given


record_argument = click.argument("record", metavar="ID", callback=_or_input)
output_option = click.option("-o", "--output", "target", required=True, type=PATH, help="File to write.")


def max_new_tokens_option(default: int) -> Callable[..., Any]:
    """Return the option that bounds the length of an answer."""
    return click.option(
        "--max-new-tokens",
        default=default,
        type=click.IntRange(1, 100_000),
        help="Longest answer, in tokens.",
    )


def ids_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add `[ID]...` and `--ids-file`, passed as one list `ids`."""

    @click.argument("ids", nargs=-1, metavar="[ID]...")
    @click.option("--ids-file", type=PATH, help="File with one id on each line; `-`: standard input.")
    @functools.wraps(function)
    def invoke(ids: tuple[str, ...], ids_file: Path | None, **arguments: Any) -> Result:
        from sisa.data.reader import read_ids

        stream = sys.stdin.buffer if ids_file == STANDARD_INPUT else None
        more = [] if ids_file is None else read_ids(ids_file, stream)
        return function(ids=[*ids, *more], **arguments)

    return invoke


def records_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options of `ids_options` and `--subject` with its twin; ids or a subject must be given.

    A command may also take an id by `--find-like`.
    """

    @ids_options
    @option_or_file("--subject", help="All records of a subject.")
    @functools.wraps(function)
    def invoke(ids: list[str], subject: str | None, **arguments: Any) -> Result:
        if bool(ids or arguments.get("find_like")) == (subject is not None):
            raise click.UsageError("give IDs (or --ids-file), or --subject")
        return function(ids=ids, subject=subject, **arguments)

    return invoke


consent_option = click.option(
    "--consent",
    default="",
    show_default=False,
    help="Who consented, or the legal ground, to keep the text encrypted for an approximate patch.",
)


@contextmanager
def opened(directory: Path, executor: ExecutorChoice = "auto") -> Iterator[Model]:
    """Open the model in a directory and show its progress."""
    from sisa.model import open_model

    with watched() as report:
        yield open_model(directory, executor=executor, report=report)
