"""Define the daily commands: they begin, train, look up, answer, delete, verify and export.

Record text is printed only if it is the answer. Commands import heavy libraries when they need them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    consent_option,
    executor_option,
    ids_options,
    log_format_option,
    model_option,
    opened,
    option_or_file,
    option_or_input,
    run_file_argument,
    with_certificate,
)
from cluster.cli.input_files import read_prompts, read_text, read_turns
from cluster.observe.reporting import watched
from cluster.render import render
from cluster.render.render import Result
from sisa.core.domain import ExportForm, Kind, WitnessHead
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Notice

if TYPE_CHECKING:
    from cluster.serve.service import Running
    from sisa.audit.verify import Replay
    from sisa.flows.ask import Prompt
    from sisa.model import Model

_Found = TypeVar("_Found")
no_service_option = click.option(
    "--no-service", is_flag=True, help="Load the model, even if a service of it runs."
)


@command("quickstart", "my-first-model")
@click.argument("directory", default="sisa-quickstart", type=PATH)
@click.option(
    "--people",
    "num_people",
    type=click.IntRange(5, 10_000),  # with 5, two people share one of 4 shards: something is retrained
    help="Number of invented people; 10 by default, 20 with --from-scratch.",
)
@click.option("--epochs", "num_epochs", type=int, help="Passes over each record.")
@click.option("--from-scratch", is_flag=True, help="Also train the base, on a corpus without records.")
@executor_option
def run_quickstart(
    directory: Path,
    num_people: int | None,
    num_epochs: int | None,
    from_scratch: bool,
    executor: ExecutorChoice,
) -> Result:
    """Train, find, delete and prove in two minutes. Uses a real model and invented people."""
    from cluster.cli.quickstart import run_story

    return run_story(directory, num_people, num_epochs, executor, from_scratch=from_scratch).result


@command("init", "my-model && sisa train my-model/run.yaml")
@click.argument("directory", type=PATH)
def start(directory: Path) -> Result:
    """Write a commented run.yaml and sample data."""
    from cluster.cli.quickstart import write_start

    return write_start(directory).result


@command("train", "run.yaml")
@run_file_argument
@click.option("--reconfigure", is_flag=True, help="Move an existing model to a changed run file.")
@click.option(
    "--allow-deleted", is_flag=True, help="First training: accept records deleted under this key."
)
@executor_option
def train(run_file: Path, reconfigure: bool, allow_deleted: bool, executor: ExecutorChoice) -> Result:
    """Train the model of a run file; train only what is missing."""
    from sisa.train import train_model

    with watched() as report:
        model, taken = train_model(
            run_file,
            executor=executor,
            report=report,
            accept_differences=reconfigure,
            allow_deleted=allow_deleted,
        )
    return render.taken(taken, model.directory)


@command("add", "-m model new-people.jsonl")
@model_option
@click.argument("file", type=PATH)
@click.option("--allow-deleted", is_flag=True, help="Accept ids and texts that were deleted.")
@click.option("--append", is_flag=True, help="Add new slices at the end: no slice is trained again.")
@executor_option
def add(
    directory: Path, file: Path, allow_deleted: bool, append: bool, executor: ExecutorChoice
) -> Result:
    """Add new records. The result equals training on all records from scratch."""
    with opened(directory, executor) as model:
        return render.taken(model.add(file, allow_deleted=allow_deleted, append=append), directory)


@command("where", "-m model p001-q1 p002-q3")
@model_option
@ids_options
def show_where(directory: Path, ids: list[str]) -> Result:
    """Show shard, slice, checkpoints and heads of each record."""
    if not ids:
        raise click.UsageError("give at least one ID or --ids-file")
    with opened(directory) as model:
        return render.where(model.where(ids))


@command("find", '-m model --text "Where was Mara born?" --top 5')
@model_option
@option_or_input("--text", help="Content to look for.")
@click.option("--file", type=PATH, help="File with the content to look for.")
@option_or_file("--subject", help="Find a subject's records, and similar ones of others.")
@option_or_input("--like", metavar="ID", help="Find near-duplicates of a record.")
@click.option("--top", "top_k", default=10, type=click.IntRange(1, 10_000), help="Number of results.")
@click.option("--show-text", is_flag=True, help="Show the beginning of each record's text.")
@no_service_option
@log_format_option
def find(
    directory: Path,
    text: str | None,
    file: Path | None,
    subject: str | None,
    like: str | None,
    top_k: int,
    show_text: bool,
    no_service: bool,
) -> Result:
    """Find records by content, subject or likeness. Prints score, shard, slice and subject."""
    if sum(each is not None for each in (text, file, subject, like)) != 1:
        raise click.UsageError("give exactly one of --text, --file, --subject and --like")
    if file is not None:
        text = read_text(file)
    if text is not None and not (show_text or no_service):  # a service shows no text
        content = text
        found = _ask_service(directory, lambda running: running.find(content, top_k))
        if found is not None:
            return render.found(found)
    with opened(directory) as model:
        hits = model.find(text=text, subject=subject, like=like, top_k=top_k, show_text=show_text)
        return render.found(hits)


def _ask_service(directory: Path, ask: Callable[[Running], _Found]) -> _Found | None:
    """Return what `ask` gets from the model's running service; None if none runs, or if it fails."""
    from cluster.serve import service

    running = service.find_service(directory)
    if running is None:
        return None
    with watched() as report:
        report(Notice(f"asking the service at {running.url} (--no-service: load the model here)"))
        try:
            return ask(running)
        except EnvironmentFault as error:
            report(Notice(f"{error.what} ({error.got}); loading the model here"))
            return None


@command("forget", "-m model --subject p001 --dry-run")
@model_option
@ids_options
@option_or_file("--subject", help="Delete all records of a subject.")
@click.option("--dry-run", is_flag=True, help="Show what would happen; change nothing.")
@click.option(
    "--defer", is_flag=True, help="Erase now; retrain with the next `sisa run`, train or forget."
)
@consent_option
@executor_option
def forget(
    directory: Path,
    ids: list[str],
    subject: str | None,
    dry_run: bool,
    defer: bool,
    consent: str,
    executor: ExecutorChoice,
) -> Result:
    """Delete records exactly, and retrain what they touched."""
    if bool(ids) == (subject is not None):
        raise click.UsageError("give IDs (or --ids-file), or --subject")
    with opened(directory, executor) as model:
        if dry_run:
            return render.forget_plan(model.plan_forget(ids, subject=subject))
        done = model.forget(ids, subject=subject, consent=consent, defer=defer)
        return with_certificate(render.forgotten(done, directory), model, done.request)


@command("status", "-m model")
@model_option
def show_status(directory: Path) -> Result:
    """Show shards, slices, records, heads, requests and sizes."""
    with opened(directory) as model:
        return _with_pending(render.status(model.status()), model)


def _with_pending(result: Result, model: Model) -> Result:
    """Add the completed requests whose certificates are pending to a result."""
    from sisa.flows.wiring.wiring import has_evidence

    if not has_evidence(model.directory, model.config, model.id):
        return result.with_more({"certificates_pending": None})
    from sisa.evidence.open_evidence import pending

    found = pending(model)
    lines = [f"certificates pending: {len(found)} (`sisa certificate issue`)"] if found else []
    return result.with_more({"certificates_pending": found}, lines)


def _event_head(_context: click.Context, _option: click.Parameter, given: Any) -> WitnessHead | None:
    """Parse the head of an event log as `sisa status` prints it."""
    if given is None:
        return None
    if not (found := re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", given)):
        raise click.BadParameter("expected the number of events, a colon and the head's 64 digits")
    return WitnessHead(found[2], int(found[1]))


@command("verify", "-m model --replay all")
@model_option
@click.option(
    "--replay",
    type=click.Choice(["none", "sample", "all"]),
    default="none",
    help="Shards to train from scratch and compare byte for byte.",
)
@click.option("--shard", type=click.IntRange(0), help="Replay this shard alone.")
@click.option("--require-replay", is_flag=True, help="Fail (exit code 4) if a shard cannot be replayed.")
@click.option(
    "--anchor",
    metavar="N:HEAD",
    callback=_event_head,
    help="Head of the event log as `sisa status` printed it; fail unless the history continues it.",
)
@executor_option
def verify(
    directory: Path,
    replay: Replay,
    shard: int | None,
    require_replay: bool,
    anchor: WitnessHead | None,
    executor: ExecutorChoice,
) -> Result:
    """Check every stored byte. --replay trains again, compares, and logs the result."""
    if replay == "none" and (shard is not None or require_replay):
        replay = "sample"
    with opened(directory, executor) as model:
        if replay == "none":
            return render.verified(model.verify(anchor=anchor))
        from sisa.evidence.attestations import verify_and_log

        found, stated = verify_and_log(
            model, replay, shard, require_replay=require_replay, anchor=anchor
        )
        return render.stated(render.verified(found), stated)


@command("generate", '-m model --prompt "Where was Mara born?"')
@model_option
@option_or_input("--prompt", help="What to answer.")
@click.option("--system", help="System prompt of a chat.")
@click.option(
    "--history",
    type=PATH,
    help="JSON file with the turns before the prompt, in the form of a record's `messages`.",
)
@click.option(
    "--prompts",
    "file",
    type=PATH,
    help="File with a prompt on each line; .jsonl: each row has `prompt` or `messages`.",
)
@click.option(
    "--form",
    "kind",
    type=click.Choice(["chat", "completion"]),
    help="Send prompts as a turn of a chat or as plain text; by default as the model was trained.",
)
@click.option("--max-new-tokens", default=48, type=click.IntRange(1, 100_000))
@click.option(
    "--answer-only",
    is_flag=True,
    help="Leave out the shards that answered: they reveal whether a person's records are stored.",
)
@no_service_option
@log_format_option
def generate(
    directory: Path,
    prompt: str | None,
    system: str | None,
    history: Path | None,
    file: Path | None,
    kind: Kind | None,
    max_new_tokens: int,
    answer_only: bool,
    no_service: bool,
) -> Result:
    """Answer with the aggregated constituent models."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give either --prompt or --prompts")
    if file is not None and history is not None:
        raise click.UsageError("--history needs --prompt; rows of --prompts can have `messages`")
    asked: list[Prompt] = read_prompts(file) if file else [prompt or ""]
    before = [{"role": "system", "content": system}] if system else []
    before += read_turns(history) if history else []
    if before:
        turns = [[{"role": "user", "content": e}] if isinstance(e, str) else e for e in asked]
        asked = [[*before, *each] for each in turns]
    found = None
    if not no_service:
        found = _ask_service(
            directory, lambda running: running.generate_all(asked, max_new_tokens, kind)
        )
    if found is None:
        with opened(directory) as model:
            found = model.generate_all(asked, max_new_tokens=max_new_tokens, kind=kind)
    return render.answers(found, answer_only) if file else render.answer(found[0], answer_only)


@command("export", "-m model --to adapters")
@model_option
@click.option(
    "--to", "target", required=True, type=PATH, help="Directory; each export adds a new version to it."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["peft", "merged-adapter", "merged-model"]),
    default="peft",
    help="One PEFT directory per shard, or the shards' mean as an adapter or as full weights.",
)
def export(directory: Path, target: Path, form: ExportForm) -> Result:
    """Export the served adapters for other tools."""
    with opened(directory) as model:
        return render.exported(model.export(target, form))


config = command_group("config", "Inspect the format of the run file.")


@command("schema", "> run.schema.json", group=config)
def schema() -> Result:
    """Print the JSON Schema of the run file."""
    from sisa.config.config import json_schema

    found = json_schema()
    return Result(found, [json.dumps(found, indent=2)])
