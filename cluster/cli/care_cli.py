"""`sisa gc`, `sisa sweep` and `sisa doctor`: what lies around, what is left, what is wrong.

Rules: as `cli.py`. Residue, and an error that stays, end with exit code 4. The strings that `sweep`
looks for are never repeated.

Not covered: what the commands do (`sisa.audit.garbage`, `sisa.audit.residue`, `sisa.audit.doctor`,
`sisa.audit.repair`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from cluster.cli.command import (
    command,
    executor_option,
    ids_argument,
    ids_file_option,
    model_option,
    named_ids,
    opened,
    read_lines,
)
from cluster.render import care_render as render
from cluster.render.render import Result
from sisa.core.precision import DeviceName, Dtype, Precision

if TYPE_CHECKING:
    from sisa.flows.wiring.wiring import OpenExecutor


@command("gc", "sisa gc -m model --dry-run")
@model_option
@click.option("--dry-run", is_flag=True, help="List it; change nothing.")
@click.option(
    "--lost-exports", is_flag=True, help="Give up stale exports that can't be found: you vouch for them."
)
def gc(directory: Path, dry_run: bool, lost_exports: bool) -> Result:
    """Remove what is retired or unknown to the ledger."""
    from sisa.audit.garbage import collect_garbage

    if dry_run and lost_exports:
        raise click.UsageError("give one of --dry-run and --lost-exports")
    with opened(directory) as model:
        return render.collected(collect_garbage(model, dry_run=dry_run, lost_exports=lost_exports))


@command("sweep", "sisa sweep -m model p001-q1 --also exported-adapters")
@model_option
@ids_argument
@ids_file_option
@click.option(
    "--text-file", type=click.Path(path_type=Path), help="File with one text a line to look for."
)
@click.option(
    "--also", multiple=True, type=click.Path(path_type=Path), help="Another place, such as an export."
)
def sweep(
    directory: Path,
    ids: tuple[str, ...],
    ids_file: Path | None,
    text_file: Path | None,
    also: tuple[Path, ...],
) -> Result:
    """Prove that nothing is left of the deleted records, or list what is."""
    from sisa.audit.residue import sweep_model

    named = list(dict.fromkeys(named_ids(ids, ids_file)))
    lines = read_lines(text_file) if text_file else []
    texts = list(dict.fromkeys(line.strip() for line in lines))
    with opened(directory) as model:
        return render.scanned(sweep_model(model, also=also, ids=named, texts=texts))


@command("doctor", "sisa doctor -m model")
@click.option("-m", "--model", "directory", type=click.Path(path_type=Path), help="Model directory.")
@click.option("--repair", is_flag=True, help="Mend what can be derived again.")
@click.option(
    "--numerics",
    is_flag=True,
    help="Test whether this machine trains the same bytes again; no model needed.",
)
@click.option("--device", type=click.Choice(get_args(DeviceName)), help="What --numerics tests: cpu.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), help="Of the base it trains on: float32.")
@executor_option
def doctor(
    directory: Path | None,
    repair: bool,
    numerics: bool,
    device: DeviceName | None,
    dtype: Dtype | None,
    executor: str | OpenExecutor,
) -> Result:
    """Diagnose a model directory; with --repair mend it; with --numerics test this machine."""
    if numerics:
        return _numerics(directory, repair, device, dtype)
    if device or dtype:
        raise click.UsageError("--device and --dtype are of --numerics")
    if directory is None:
        raise click.UsageError("Missing option '-m' / '--model'.")
    from sisa.audit.doctor import diagnose

    found = diagnose(directory)
    if not repair or found.unopenable:
        return render.diagnosed(found)
    from sisa.audit.repair import repair as mend

    with opened(directory, executor) as model:
        return render.repaired(mend(model))


def _numerics(
    directory: Path | None, repair: bool, device: DeviceName | None, dtype: Dtype | None
) -> Result:
    """For a model's threads, device and dtype; else for one thread and what is named."""
    from sisa.lm.train.self_test import check

    if repair:
        raise click.UsageError("give one of --repair and --numerics")
    if directory is None:
        return render.tested(check(threads=1, precision=Precision(device or "cpu", dtype or "float32")))
    if device or dtype:
        raise click.UsageError("--model says which device and dtype: leave --device and --dtype out")
    with opened(directory) as model:
        config = model.config
        return render.tested(check(threads=config.sisa.threads_per_shard, precision=config.precision))
