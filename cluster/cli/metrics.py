"""Show what each run measured, or send it to TensorBoard or MLflow: `sisa metrics`.

Only numbers are shown and sent; the model is not changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import command, model_option, opened
from cluster.observe.curves import points, summary
from cluster.render.render import Result, counted, printable

if TYPE_CHECKING:
    from cluster.observe.curve_sinks import CurveSink


@command("metrics", "sisa metrics -m model --to tensorboard my-board")
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
    if target is not None:
        sink = open_sink(*target, experiment=directory.resolve().parent.name or "sisa")
        for run, lines in runs.items():
            sink.write(run, points(lines))
    found = [{"run": run, **summary(lines)} for run, lines in runs.items()]
    shown = [_row(each) for each in found] or ["nothing was measured yet"]
    if target:
        shown.append(f"{len(runs)} runs are in {target[0]}, {target[1]}")
    body = {"runs": found, "passed_on": list(target) if target else None}
    return Result(body, printable("\n".join(shown)))


def open_sink(tool: str, place: str, experiment: str) -> CurveSink:
    """Open a tool at a place. Raise EnvironmentFault if the tool is not installed."""
    from cluster.observe.curve_sinks import Mlflow, TensorBoard

    return TensorBoard(Path(place)) if tool == "tensorboard" else Mlflow(place, experiment)


def _row(of: dict[str, Any]) -> str:
    speed = "" if of["tokens_per_second"] is None else f", {of['tokens_per_second']:.0f} tok/s a worker"
    loss = "" if of["last_loss"] is None else f", last loss {of['last_loss']:.4f}"
    deletions = f", {counted(of['deletions'], 'deletion')}" * bool(of["deletions"])
    failed = f", {counted(of['erasure_failures'], 'erasure')} FAILED" * bool(of["erasure_failures"])
    done = f"{counted(of['slices_trained'], 'slice')}, {counted(of['tokens'], 'token')}"
    return f"{of['run']}: {done}{speed}{loss}{deletions}{failed}"
