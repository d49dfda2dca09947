"""Choose a run file's values before there is a model: `sisa plan`, `simulate`, `routing calibrate`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH, command, command_group, run_file_argument
from cluster.render.result import EXIT_USAGE, Result, counted
from sisa.core.errors import InvalidInput, Problem, extra

if TYPE_CHECKING:
    from sisa.config.config import RunConfig
    from sisa.lm.routing.calibration import Errors
    from sisa.planning.deletion_stream import Group, Replayed, Stream
    from sisa.planning.layout_advice import Advice, LayoutLimits

MAX_PLANNED_RECORDS, MAX_PLANNED_DELETIONS = 10**12, 10**8
# Rank 8 on all linear modules of SmolLM2-135M: 2,442,240 parameters, AdamW's two moments beside them.
ASSUMED_BYTES_PER_RANK = 2_442_240 * 4 * 3 // 8
MAX_ROWS = 12  # of a table
NOTES = (
    "kept         checkpoints per shard",
    "alone        share of a full training that a month's deletions retrain in order 0, one by one",
    "together     the same, as one batch",
    "others       what the other orders retrain in addition, one by one",
    "training     training all orders once, in trainings of order 0",
    "served       share of its slices that a shard serves right after a deletion",
    "epochs or h  record-epochs, or hours of one worker, until a deletion is trained",
)


class _Finite(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is not a finite number.", param, ctx)
        return found


ABOVE_0 = _Finite(0, min_open=True)
records_option = click.option(
    "--records", type=click.IntRange(1, MAX_PLANNED_RECORDS), required=True, help="Records of the model."
)
risk_option = click.option(
    "--risk",
    "risks",
    multiple=True,
    metavar="SHARE:RISK",
    help="A share of the records, and the deletion risk of each. Repeatable.",
)


@command("simulate", "run.yaml --records 100000000 --deletions 1000000")
@run_file_argument
@records_option
@click.option(
    "--deletions",
    type=click.IntRange(1, MAX_PLANNED_DELETIONS),
    required=True,
    help="Records to delete, drawn at random.",
)
@click.option("--batch", type=click.IntRange(1), default=1, help="Deletions per run.")
@click.option("--shards", type=click.IntRange(1, 10_000), help="Shards, instead of the run file's.")
@click.option("--slices", type=click.IntRange(1, 10_000), help="Slices, instead of the run file's.")
@risk_option
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the draw.")
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
    """Simulate a stream of deletions by counts alone.

    Count what is retrained of order 0 if all checkpoints are kept, beside the closed forms.
    """
    from sisa.config.runfile import load_run_file
    from sisa.planning.deletion_stream import Stream, replay_stream
    from sisa.planning.layout import Layout

    config = load_run_file(run_file)
    own = config.sisa
    layout = Layout(shards or own.shards, slices or own.slices, own.bands)
    groups, problems = _groups(risks)
    if own.bands is not None and not own.bands.fits(layout.num_slices):
        wanted = f"at least {own.bands.num_bands}, a slice for each band"
        problems.append(_unfit("--slices", wanted, layout.num_slices))
    if not problems and deletions > records * sum(group.share for group in groups if group.risk):
        problems.append(_unfit("--deletions", "no more than records that are ever asked for", deletions))
    _refuse(problems)
    stream = Stream(layout, own.schedule, config.num_epochs, groups)
    began = time.perf_counter()
    found = replay_stream(stream, records, deletions, batch=batch, seed=seed)
    return replayed(found, stream, batch, time.perf_counter() - began)


def replayed(found: Replayed, stream: Stream, batch: int, seconds: float) -> Result:
    """Render the result of a stream, beside the expectation of the closed forms."""
    layout, full = stream.layout, found.full_record_epochs
    retrained, expected = found.record_epochs, round(found.expected_record_epochs)
    body = {
        "shards": layout.num_shards,
        "slices": layout.num_slices,
        "schedule": stream.schedule,
        "records": found.num_records,
        "deletions": found.num_deletions,
        "batch": batch,
        "shard_runs": found.num_runs,
        "record_epochs_retrained": retrained,
        "record_epochs_expected": expected,
        "record_epochs_full": full,
        "full_trainings": retrained / full,
        "share_per_deletion": retrained / found.num_deletions / full,
        "seconds": round(seconds, 2),
    }
    lines = [
        f"layout      {layout.num_shards} shards x {layout.num_slices} slices, {stream.schedule}, "
        "order 0 with all its checkpoints kept",
        f"deleted     {found.num_deletions:,} of {found.num_records:,} records, "
        f"{batch:,} at a time: {found.num_runs:,} runs of a shard",
        f"retrained   {retrained:,} record-epochs: {retrained / full:.2f} full trainings, "
        f"{100 * retrained / found.num_deletions / full:.6f}% of one for each deletion",
        f"expected    {expected:,} by closed forms for equal shards",
    ]
    return Result(body, lines)


@command("plan", "run.yaml --records 100000 --deletions-per-month 40 --budget-gb 50")
@run_file_argument
@records_option
@click.option("--deletions-per-month", type=ABOVE_0, required=True, help="Records deleted in a month.")
@risk_option
@click.option("--budget-gb", type=ABOVE_0, help="Limit for all checkpoints.")
@click.option("--max-hours", type=ABOVE_0, help="Limit for one deletion, on one worker.")
@click.option("--rate", type=ABOVE_0, help="Record-epochs that one worker trains in a second.")
@click.option("--checkpoint-mb", type=ABOVE_0, help="Size of one stage.")
@click.option(
    "--min-depth",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=False,
    help="Least share of its slices that a shard serves right after a deletion.",
)
@click.option("--plot", type=PATH, help="Draw the choices into this PNG.")
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
    """Recommend shards, slices, orders, bands and checkpoints.

    Compare what a month's deletions retrain, and what each choice stores.
    """
    from sisa.config.runfile import load_run_file
    from sisa.planning.layout_advice import Demand, LayoutLimits, advise, recommended

    config = load_run_file(run_file)
    num_bytes, measured_rate = _measured(config)
    source = "of the model's own stages" if num_bytes else "assumed"
    if checkpoint_mb is not None:
        num_bytes, source = checkpoint_mb * 1e6, "given"
    limits = LayoutLimits(
        bytes_per_checkpoint=round(num_bytes) or ASSUMED_BYTES_PER_RANK * config.lora_r,
        max_bytes=math.inf if budget_gb is None else budget_gb * 1e9,
        max_hours=math.inf if max_hours is None else max_hours,
        record_epochs_per_s=rate or measured_rate,
        min_depth=min_depth,
    )
    groups, problems = _groups(risks)
    if deletions_per_month > records:
        problems.append(_unfit("--deletions-per-month", f"at most {records}", deletions_per_month))
    if max_hours is not None and not limits.record_epochs_per_s:
        wanted = "a rate beside it (--rate), as there is no model yet"
        problems.append(_unfit("--max-hours", wanted, max_hours))
    if plot and (plot.suffix.lower() != ".png" or plot.is_dir() or not plot.parent.is_dir()):
        problems.append(_unfit("--plot", "a file NAME.png in a directory that is there", plot))
    _refuse(problems)
    demand = Demand(records, deletions_per_month, config.sisa.schedule, config.num_epochs, groups)
    advised = advise(demand, limits)
    best = recommended(advised)
    if plot is not None:
        from cluster.render.plan_picture import draw_choices

        with extra("notebook"):
            draw_choices(advised, best).savefig(plot, dpi=120)
    return planned(advised, best, limits, source)


def planned(advised: Sequence[Advice], best: Advice | None, limits: LayoutLimits, source: str) -> Result:
    """Render all choices; `source` is where the bytes of a stage come from."""
    body = {
        "recommended": None if best is None else _plain(best),
        "run_file": None if best is None else {"sisa": block_of(best, limits)},
        "bytes_per_checkpoint": limits.bytes_per_checkpoint,
        "units": source,
        "choices": [_plain(each) for each in advised],
    }
    timed = limits.record_epochs_per_s > 0
    shown = ["nothing fits within the limits; the cheapest that do not:"]
    if best is not None:
        orders = counted(best.num_orders, "order")
        bands = f", bands at {list(best.thresholds)}" if best.thresholds else ""
        shown = [
            f"recommended: {best.num_shards} shards x {best.num_slices} slices, {orders}, "
            f"{best.num_kept} checkpoints kept per shard{bands}; in the run file:",
            "",
            *_yaml(block_of(best, limits)),
        ]
    names = ("shards", "slices", "orders", "kept", "alone", "together", "others", "training", "served")
    widths = (7, 6, 6, 5, 8, 8, 8, 8, 7)
    head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    head += f" {'GB':>8} {'h' if timed else 'epochs':>10}  bands"
    table = [head, *(_row(each, timed=timed) for each in advised[:MAX_ROWS])]
    more = (
        [f"... and {len(advised) - MAX_ROWS} more choices (--json)"] if len(advised) > MAX_ROWS else []
    )
    lines = [*shown, "", *table, *more, "", *NOTES, f"bytes per stage: {source}"]
    return Result(body, lines, 0 if best else EXIT_USAGE)


def block_of(advice: Advice, limits: LayoutLimits) -> dict[str, Any]:
    """Return a choice as the block `sisa:`, without keys at their defaults."""
    block: dict[str, Any] = {"shards": advice.num_shards, "slices": advice.num_slices}
    if advice.num_orders > 1:
        block["orders"] = advice.num_orders
    if advice.thresholds:
        block["bands"] = {"thresholds": list(advice.thresholds)}
    if any(len(kept) <= kept[-1] for kept in advice.kept):  # the last stage is kept of each order
        block["checkpoint_budget_bytes"] = int(limits.max_bytes)
    return block


def _yaml(block: dict[str, Any]) -> list[str]:
    lines = ["sisa:"]
    for key, value in block.items():
        inner = f"{{thresholds: {value['thresholds']}}}" if isinstance(value, dict) else value
        lines.append(f"  {key}: {inner}")
    return lines


def _plain(advice: Advice) -> dict[str, Any]:
    """Return the advice as JSON; an unknown value is null."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(advice).items()
    }


def _row(each: Advice, *, timed: bool) -> str:
    until = f"{each.hours_to_utility:.3g}" if timed else f"{each.record_epochs_to_utility:,.0f}"
    bands = " ".join(map(str, each.thresholds)) or "-"
    over = f"  over: {', '.join(each.over)}" if each.over else ""
    shares = (each.one_by_one, each.together, each.others_one_by_one)
    retrained = " ".join(f"{100 * share:>7.2f}%" for share in shares)
    return (
        f"{each.num_shards:>7} {each.num_slices:>6} {each.num_orders:>6} {each.num_kept:>5} {retrained} "
        f"{each.training:>8.2f} {100 * each.serving_depth:>6.1f}% {each.stored_bytes / 1e9:>8.2f} "
        f"{until:>10}  {bands}{over}"
    )


def _measured(config: RunConfig) -> tuple[float, float]:
    """Return a model's mean bytes of a stage and record-epochs a second; zeros if there is no model."""
    from sisa.flows.wiring.ledger_place import has_ledger, open_ledger

    if not has_ledger(config.output_dir):
        return 0.0, 0.0
    with open_ledger(config.output_dir) as ledger:
        held = ledger.checkpoints()
    seconds = sum(each.seconds for each in held)
    work = sum(each.record_epochs for each in held)
    return sum(each.num_bytes for each in held) / max(1, len(held)), work / seconds if seconds else 0.0


def _groups(risks: Sequence[str]) -> tuple[tuple[Group, ...], list[Problem]]:
    """Return the groups of `--risk`, and every problem with them."""
    from sisa.planning.deletion_stream import Group

    found, problems = [], []
    for text in risks:
        share, _, risk = text.partition(":")
        try:
            group = Group(float(share), float(risk))
        except ValueError:
            problems.append(_unfit("--risk", "SHARE:RISK, such as 0.1:0.05", text))
            continue
        if not (0 < group.share <= 1 and 0 <= group.risk < math.inf):
            problems.append(_unfit("--risk", "a share above 0 and at most 1, and a risk from 0", text))
        found.append(group)
    shown = ", ".join(risks)
    if risks and not problems:
        if not math.isclose(sum(each.share for each in found), 1.0, abs_tol=1e-6):
            problems.append(_unfit("--risk", "shares that make 1 together", shown))
        if not any(each.risk for each in found):
            problems.append(_unfit("--risk", "a group that is ever asked for", shown))
    return tuple(found) or (Group(1.0, 1.0),), problems


def _unfit(where: str, expected: str, got: object) -> Problem:
    return Problem(where, f"expected {expected}, got {got}")


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise InvalidInput(
            "the options do not fit together; nothing was done",
            next_step="correct them and run the command again",
            problems=problems,
        )


routing = command_group("routing", "Calibrate which prompts go to a shard, and which to the base.")


@command("calibrate", "run.yaml --prompts public.jsonl", group=routing)
@run_file_argument
@click.option(
    "--prompts",
    "file",
    required=True,
    type=PATH,
    help="Records that anybody may see, with subjects; columns as in the run file.",
)
def calibrate(run_file: Path, file: Path) -> Result:
    """Choose min_score on public prompts of your own, for the run file's embedder and shards."""
    from sisa.config.runfile import load_run_file
    from sisa.data.reader import read_like
    from sisa.flows.wiring.resources import Resources
    from sisa.lm.routing.calibration import calibrate as calibrated

    config = load_run_file(run_file)
    records = read_like(config, file, subjects="some")
    found = calibrated(records, Resources(config, None, None).embedder, config.sisa)
    lines = [
        f"{found.prompts} prompts about {found.subjects} subjects, in {config.sisa.shards} shards",
        _errors(found.best),
        *([_errors(found.auto) + "  (auto)"] if found.auto else []),
        "for the run file:",
        f"  sisa: {{aggregation: {{method: routed, min_score: {found.best.min_score}}}}}",
    ]
    return Result(asdict(found), lines)


def _errors(of: Errors) -> str:
    shares = [f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in (of.refused, of.sent)]
    return (
        f"min_score {of.min_score}: new questions about held subjects refused {shares[0]}, "
        f"questions about deleted subjects sent to a shard {shares[1]}"
    )
