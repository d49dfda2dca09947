"""Show what each run measured, or send it to TensorBoard or MLflow: `sisa metrics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluster.cli.command import command, model_option, opened
from cluster.observe.curves import points, summary, to_mlflow, to_tensorboard
from cluster.render.render import Result, counted


@command("metrics", "-m model --to tensorboard my-board")
@model_option
@click.option(
    "--to",
    "target",
    type=(click.Choice(["tensorboard", "mlflow"]), str),
    metavar="TOOL PLACE",
    help="Send the curves to a tool: `tensorboard DIRECTORY`, or `mlflow URI`.",
)
@click.option("--run", "named", multiple=True, help="Only this run. Repeatable.")
def metrics(directory: Path, target: tuple[str, str] | None, named: tuple[str, ...]) -> Result:
    """Show what each run measured. --to sends it to TensorBoard or MLflow."""
    from sisa.flows.wiring.wiring import METRICS
    from sisa.store.metrics import FileMetrics

    with opened(directory):
        held = FileMetrics(directory / METRICS)
    runs = {run: held.read(run) for run in named or held.runs()}
    found = [{"run": run, **summary(lines)} for run, lines in runs.items()]
    shown = [_row(each) for each in found] or ["nothing was measured yet"]
    if target is not None:
        tool, place = target
        curves = {run: points(lines) for run, lines in runs.items()}
        if tool == "tensorboard":
            to_tensorboard(Path(place), curves)
        else:
            to_mlflow(place, directory.resolve().parent.name or "sisa", curves)
        shown.append(f"{len(runs)} runs are in {tool}, {place}")
    return Result({"runs": found, "passed_on": list(target) if target else None}, shown)


def _row(of: dict[str, Any]) -> str:
    speed = "" if of["tokens_per_second"] is None else f", {of['tokens_per_second']:.0f} tok/s a worker"
    loss = "" if of["last_loss"] is None else f", last loss {of['last_loss']:.4f}"
    deletions = f", {counted(of['deletions'], 'deletion')}" * bool(of["deletions"])
    failed = f", {counted(of['erasure_failures'], 'erasure')} FAILED" * bool(of["erasure_failures"])
    done = f"{counted(of['slices_trained'], 'slice')}, {counted(of['tokens'], 'token')}"
    return f"{of['run']}: {done}{speed}{loss}{deletions}{failed}"
