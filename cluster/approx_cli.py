"""`sisa approx`: what the frozen base itself knows, beside what the shards were taught.

Rules: as `cli.py`. Whatever is told here is approximate, and says so. Texts are never repeated.

Not covered: the measures (`approx/probe.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cluster import render
from cluster.command import cli, command, model_option, opened
from cluster.render import Result
from sisa.domain import Part, Record
from sisa.errors import InvalidInput


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
def probe(directory: Path, file: Path) -> Result:
    """Ask the base alone whether it produces given texts."""
    from approx.probe import open_probe
    from sisa.reader import read_records

    with opened(directory) as model:
        if file.suffix in (".jsonl", ".json", ".parquet"):
            records = read_records([file], model.config.sisa.group_by)
        else:
            records = _lines(file)
        base = model.parts.base
        found = open_probe(base.directory, base.digest, model.config)(records)
    return Result({**asdict(found), "approximate": True}, "\n".join(render.probed(found)).strip())


def _lines(file: Path) -> list[Record]:
    try:
        lines = [each for each in file.read_text(encoding="utf-8").splitlines() if each.strip()]
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise InvalidInput("the file can't be read", where=str(file), got=str(got)) from None
    if not lines:
        raise InvalidInput(
            "the file holds no text", where=str(file), next_step="write a text on each line"
        )
    return [Record(str(n), None, "text", (Part("text", each),)) for n, each in enumerate(lines)]
