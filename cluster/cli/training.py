"""Begin, train, add and export: `sisa quickstart`, `init`, `train`, `add`, `export`, `config schema`.

Commands import heavy libraries when they need them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.asking import routing_check
from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    executor_option,
    model_option,
    opened,
    run_file_argument,
)
from cluster.observe.reporting import watched
from cluster.render.result import Result, counted, of_model
from sisa.core.domain import ExportForm

if TYPE_CHECKING:
    from sisa.flows.ingest import Taken


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
    """Train, find, delete and prove in two minutes, with a real model and invented people."""
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
        model, found = train_model(
            run_file,
            executor=executor,
            report=report,
            accept_differences=reconfigure,
            allow_deleted=allow_deleted,
        )
    return taken(found, model.directory)


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
        return taken(model.add(file, allow_deleted=allow_deleted, append=append), directory)


def taken(found: Taken, directory: Path) -> Result:
    lines = [
        f"{counted(found.records, 'record')} in {directory} ({found.added} added now)",
        f"{counted(found.slices_trained, 'slice')} trained, {found.record_epochs_trained} record-epochs"
        + (f"; {found.record_epochs_others} more in other orders" if found.record_epochs_others else ""),
        f"model digest {found.model_digest}",
    ]
    if found.generation:
        text = f"appended as generation {found.generation}: to train the same model from scratch, give"
        lines.insert(1, f"{text} them `generation: {found.generation}`")
    lines += routing_check(found.prompts)
    if found.deleted_not_taken:
        skipped = counted(found.deleted_not_taken, "record")
        lines.append(f"skipped: {skipped} that a request deleted before")
    if found.new_not_taken:
        new = counted(found.new_not_taken, "new record")
        lines.append(f"not added: {new}; use `sisa add {of_model(directory)} FILE`")
    lines.append(f"next: sisa status, find, generate or forget, each with {of_model(directory)}")
    return Result(asdict(found), lines)


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
        return exported(model.export(target, form))


def exported(made: Sequence[Path]) -> Result:
    paths = [str(each) for each in made]
    return Result({"adapters": paths}, paths or ["no shard serves an adapter"])


config = command_group("config", "Inspect the format of the run file.")


@command("schema", "> run.schema.json", group=config)
def schema() -> Result:
    """Print the JSON Schema of the run file."""
    from sisa.config.config import json_schema

    found = json_schema()
    return Result(found, [json.dumps(found, indent=2)])
