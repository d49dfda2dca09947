"""`sisa approx`: what the frozen base itself knows, beside what the shards were taught.

Rules: as `cli.py`. Whatever is told here is approximate, and says so. Texts are never repeated.

Not covered: the measures (`approx/evaluation/probe.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cluster.cli.command import cli, command, model_option, opened, read_lines
from cluster.render import render
from cluster.render.render import Result


@cli.group("approx", help="What the frozen base itself knows; never exact.")
def approx() -> None:
    """The group of approximate commands."""


@command("probe", "sisa approx probe -m model --file texts.jsonl", group=approx)
@model_option
@click.option(
    "--file",
    required=True,
    type=click.Path(path_type=Path),
    help="Records (JSONL, Parquet), or a text file: each line is a text.",
)
@click.option("--without-patches", is_flag=True, help="Ask the base as it was before any patch.")
def probe(directory: Path, file: Path, without_patches: bool) -> Result:
    """Ask the base alone, as it is served, whether it produces given texts."""
    from approx.evaluation.probe import open_probe
    from sisa import unlearn
    from sisa.core.domain import Part, Record
    from sisa.data.reader import read_like

    with opened(directory) as model:
        if file.suffix in (".jsonl", ".json", ".parquet"):
            records = list(read_like(model.config, file))
        else:
            lines = enumerate(read_lines(file))
            records = [Record(str(n), None, "text", (Part("text", line),)) for n, line in lines]
        base = model.resources.base
        patches = [] if without_patches else unlearn.served(model)
        found = open_probe(base.directory, base.digest, model.config, patches)(records)
    return Result({**asdict(found), "approximate": True}, "\n".join(render.probed(found)).strip())
