"""`sisa plan` and `sisa simulate`: what deletions would cost, before there is a model.

Rules: as `cli.py`. Nothing is trained: closed forms and counts alone. `plan` takes bytes and rates from
the run file's model where there is one; else they are given, or assumed and said to be.

Not covered: the forms and the counting (`sisa/advice.py`, `sisa/stream.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.command import command
from cluster.render import Result
from sisa.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.advice import Advice, Limits
    from sisa.config import RunConfig
    from sisa.stream import Group

F = TypeVar("F", bound=Callable[..., Any])

MAX_RECORDS = 10**12
SHOWN = 12  # rows of a table
# Rank 8 on all linear modules of SmolLM2-135M: 2,442,240 parameters, AdamW's two moments beside them.
ASSUMED_BYTES_PER_RANK = 2_442_240 * 4 * 3 // 8

records_option = click.option(
    "--records", type=click.IntRange(1, MAX_RECORDS), required=True, help="Of the model."
)
risk_option = click.option(
    "--risk",
    "risks",
    multiple=True,
    metavar="SHARE:RISK",
    help="A share of the records and the deletion risk of each; again for every group.",
)


@command("simulate", "sisa simulate run.yaml --records 100000000 --deletions 1000000")
@click.argument("run_file", type=click.Path(path_type=Path))
@records_option
@click.option("--deletions", type=click.IntRange(1), required=True, help="Records, drawn at random.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Deletions of one run."
)
@click.option("--shards", type=click.IntRange(1, 10_000), help="Instead of the run file's.")
@click.option("--slices", type=click.IntRange(1, 10_000), help="Instead of the run file's.")
@risk_option
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
def simulate(
    run_file: Path,
    records: int,
    deletions: int,
    batch: int,
    shards: int | None,
    slices: int | None,
    risks: tuple[str, ...],
    seed: int,
) -> Result:
    """Replay a stream of deletions by counts: what it retrains, and what closed forms expect."""
    from sisa.assign import Layout
    from sisa.runfile import load_run_file
    from sisa.stream import Stream, replay

    config = load_run_file(run_file)
    own = config.sisa
    layout = Layout(shards or own.shards, slices or own.slices, own.bands)
    if own.bands is not None and own.bands.num_bands > layout.num_slices:
        raise _unfit("--slices", f"at least {own.bands.num_bands}, a slice for each band", slices)
    stream = Stream(layout, own.schedule, config.num_epochs, _groups(risks))
    if deletions > records * sum(group.share for group in stream.groups if group.risk):
        raise _unfit("--deletions", "no more than records that are ever asked for", deletions)
    began = time.perf_counter()
    found = replay(stream, records, deletions, batch=batch, seed=seed)
    body = {
        "shards": layout.num_shards,
        "slices": layout.num_slices,
        "schedule": own.schedule,
        "records": records,
        "deletions": deletions,
        "batch": batch,
        "shard_runs": found.num_runs,
        "record_epochs_retrained": found.record_epochs,
        "record_epochs_expected": round(found.expected_record_epochs),
        "record_epochs_full": found.full_record_epochs,
        "full_trainings": found.record_epochs / found.full_record_epochs,
        "share_per_deletion": found.record_epochs / deletions / found.full_record_epochs,
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Result(body, _replayed(body))


def _replayed(body: Mapping[str, Any]) -> str:
    retrained, expected = body["record_epochs_retrained"], body["record_epochs_expected"]
    return "\n".join(
        [
            f"layout      {body['shards']} shards x {body['slices']} slices, {body['schedule']}",
            f"deleted     {body['deletions']:,} of {body['records']:,} records, "
            f"{body['batch']:,} at a time: {body['shard_runs']:,} runs of a shard",
            f"retrained   {retrained:,} record-epochs: {body['full_trainings']:.2f} full trainings, "
            f"{100 * body['share_per_deletion']:.6f}% of one for each deletion",
            f"expected    {expected:,} by closed forms for equal shards",
        ]
    )


@command("plan", "sisa plan run.yaml --records 100000 --deletions-per-month 40 --budget-gb 50")
@click.argument("run_file", type=click.Path(path_type=Path))
@records_option
@click.option(
    "--deletions-per-month", type=click.FloatRange(0, min_open=True), required=True, help="Records."
)
@risk_option
@click.option("--budget-gb", type=click.FloatRange(0, min_open=True), help="Most bytes of checkpoints.")
@click.option(
    "--max-hours", type=click.FloatRange(0, min_open=True), help="Of one deletion, on one worker."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Record-epochs a second of one worker."
)
@click.option("--checkpoint-mb", type=click.FloatRange(0, min_open=True), help="Bytes of one stage.")
@click.option(
    "--min-depth",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Least share of its slices that a shard serves right after a deletion.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to draw the choices into.")
def plan(
    run_file: Path,
    records: int,
    deletions_per_month: float,
    risks: tuple[str, ...],
    budget_gb: float | None,
    max_hours: float | None,
    rate: float | None,
    checkpoint_mb: float | None,
    min_depth: float,
    plot: Path | None,
) -> Result:
    """Recommend shards, slices, orders, bands and checkpoints for a number of records and deletions."""
    from sisa.advice import Demand, advise, recommended
    from sisa.runfile import load_run_file

    config = load_run_file(run_file)
    groups = _groups(risks)
    demand = Demand(records, deletions_per_month, config.sisa.schedule, config.num_epochs, groups)
    limits, source = _limits(config, budget_gb, max_hours, rate, checkpoint_mb)
    limits = replace(limits, min_depth=min_depth)
    if max_hours is not None and not limits.record_epochs_per_s:
        raise _unfit("--max-hours", "a rate beside it (--rate), as there is no model yet", max_hours)
    advised = advise(demand, limits)
    best = recommended(advised)
    if plot is not None:
        from cluster.plan_picture import draw_choices

        draw_choices(advised, best).savefig(plot, dpi=120)
    body = {
        "recommended": None if best is None else _plain(best),
        "bytes_per_checkpoint": limits.bytes_per_checkpoint,
        "units": source,
        "choices": [_plain(each) for each in advised],
    }
    return Result(body, _planned(advised, best, source), 0 if best else 2)


def _limits(
    config: RunConfig,
    budget_gb: float | None,
    max_hours: float | None,
    rate: float | None,
    checkpoint_mb: float | None,
) -> tuple[Limits, str]:
    """What is given, else what the model's own stages took, else what is assumed; and which it was."""
    from sisa.advice import Limits

    num_bytes, measured = _measured(config)
    source = "of the model's own stages" if num_bytes else "assumed"
    if checkpoint_mb is not None:
        num_bytes, source = checkpoint_mb * 1e6, "given"
    found = Limits(
        round(num_bytes) or ASSUMED_BYTES_PER_RANK * config.lora_r,
        math.inf if budget_gb is None else budget_gb * 1e9,
        math.inf if max_hours is None else max_hours,
        rate or measured,
    )
    return found, source


def _measured(config: RunConfig) -> tuple[float, float]:
    """Mean bytes of a stage and record-epochs a second, of a model that there is; else 0 and 0."""
    from sisa.opening import LEDGER
    from sisa.store.ledger import SqlLedger

    file = config.output_dir / LEDGER
    if not file.is_file():
        return 0.0, 0.0
    ledger = SqlLedger(file)
    try:
        held = ledger.checkpoints()
    finally:
        ledger.close()
    seconds = sum(each.seconds for each in held)
    work = sum(each.record_epochs for each in held)
    return sum(each.num_bytes for each in held) / max(1, len(held)), work / seconds if seconds else 0.0


def _groups(risks: tuple[str, ...]) -> tuple[Group, ...]:
    from sisa.stream import Group

    found = []
    for text in risks:
        share, _, risk = text.partition(":")
        try:
            group = Group(float(share), float(risk))
        except ValueError:
            raise _unfit("--risk", "SHARE:RISK, such as 0.1:0.05", text) from None
        if not (0 < group.share <= 1 and 0 <= group.risk < math.inf):
            raise _unfit("--risk", "a share above 0 and at most 1, and a risk from 0", text)
        found.append(group)
    if not found:
        return (Group(1.0, 1.0),)
    if not math.isclose(sum(each.share for each in found), 1.0, abs_tol=1e-6):
        raise _unfit("--risk", "shares that make 1 together", ", ".join(risks))
    if not any(each.risk for each in found):
        raise _unfit("--risk", "a group that is ever asked for", ", ".join(risks))
    return tuple(found)


def _unfit(where: str, expected: str, got: object) -> InvalidInput:
    return InvalidInput("the numbers do not fit together", where=where, expected=expected, got=str(got))


def _plain(advice: Advice) -> dict[str, Any]:
    """As JSON: what is not known is null."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(advice).items()
    }


def _planned(advised: list[Advice], best: Advice | None, source: str) -> str:
    names = ("shards", "slices", "orders", "kept", "alone", "together", "others", "served", "GB")
    widths = (7, 6, 6, 5, 8, 8, 8, 7, 8)
    head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    head += f" {'h/deletion':>10}  bands"
    rows = [_row(each) for each in advised[:SHOWN]]
    if best is None:
        told = "nothing fits within the limits; the cheapest that do not:"
    else:
        bands = f", bands at {list(best.thresholds)}" if best.thresholds else ""
        orders = "1 order" if best.num_orders == 1 else f"{best.num_orders} orders"
        kept = f"{best.num_kept} checkpoints kept a shard"
        told = (
            f"recommended: {best.num_shards} shards x {best.num_slices} slices, {orders}, {kept}{bands}"
        )
    notes = [
        "alone, together: share of a full training that a month's deletions retrain in order 0, each by",
        "itself or as one batch; others: what the other orders retrain beside that, each by itself;",
        "served: share of its slices that a shard serves right after a deletion; kept: checkpoints of a",
        f"shard; bytes of a stage: {source}",
    ]
    return "\n".join([told, "", head, *rows, "", *notes])


def _row(each: Advice) -> str:
    hours = "-" if math.isnan(each.hours_to_utility) else f"{each.hours_to_utility:.3f}"
    bands = " ".join(map(str, each.thresholds)) or "-"
    over = f"  over: {', '.join(each.over)}" if each.over else ""
    shares = (each.one_by_one, each.together, each.others_one_by_one)
    retrained = " ".join(f"{100 * share:>7.2f}%" for share in shares)
    return (
        f"{each.num_shards:>7} {each.num_slices:>6} {each.num_orders:>6} {each.num_kept:>5} {retrained} "
        f"{100 * each.serving_depth:>6.1f}% {each.stored_bytes / 1e9:>8.2f} {hours:>10}  {bands}{over}"
    )
