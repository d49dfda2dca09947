"""How `sisa plan` and `sisa simulate` read: as JSON, and as a table.

Rules: pure. What is not known (hours without a rate) is null in JSON; words have record-epochs.

Not covered: the picture (`plan_picture.py`), the commands (`plan_cli.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.render.render import Result

if TYPE_CHECKING:
    from sisa.planning.deletion_stream import Replayed, Stream
    from sisa.planning.layout_advice import Advice, LayoutLimits

SHOWN = 12  # rows of a table
NOTES = (
    "alone, together: share of a full training that a month's deletions retrain in order 0, each by",
    "itself or as one batch; others: what the other orders retrain beside that, each by itself;",
    "training: all orders once, in trainings of order 0; served: share of its slices that a shard",
    "serves right after a deletion; kept: checkpoints of a shard; epochs, h: record-epochs, or hours",
    "of one worker, until a deletion is trained",
)


def replayed(found: Replayed, stream: Stream, batch: int, seconds: float) -> Result:
    """What a stream came to, beside what the closed forms expect of it."""
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
    return Result(body, "\n".join(lines))


def planned(advised: Sequence[Advice], best: Advice | None, limits: LayoutLimits, source: str) -> Result:
    """All choices, and the recommended one as lines for a run file; `source` is that of the bytes."""
    body = {
        "recommended": None if best is None else _plain(best),
        "run_file": None if best is None else {"sisa": block_of(best, limits)},
        "bytes_per_checkpoint": limits.bytes_per_checkpoint,
        "units": source,
        "choices": [_plain(each) for each in advised],
    }
    timed = limits.record_epochs_per_s > 0
    told = ["nothing fits within the limits; the cheapest that do not:"]
    if best is not None:
        orders = "1 order" if best.num_orders == 1 else f"{best.num_orders} orders"
        bands = f", bands at {list(best.thresholds)}" if best.thresholds else ""
        told = [
            f"recommended: {best.num_shards} shards x {best.num_slices} slices, {orders}, "
            f"{best.num_kept} checkpoints kept a shard{bands}; in the run file:",
            "",
            *_yaml(block_of(best, limits)),
        ]
    names = ("shards", "slices", "orders", "kept", "alone", "together", "others", "training", "served")
    widths = (7, 6, 6, 5, 8, 8, 8, 8, 7)
    head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    head += f" {'GB':>8} {'h' if timed else 'epochs':>10}  bands"
    rows = [_row(each, timed=timed) for each in advised[:SHOWN]]
    more = [f"... and {len(advised) - SHOWN} more choices (--json)"] if len(advised) > SHOWN else []
    lines = [*told, "", head, *rows, *more, "", *NOTES, f"bytes of a stage: {source}"]
    return Result(body, "\n".join(lines), 0 if best else 2)


def block_of(advice: Advice, limits: LayoutLimits) -> dict[str, Any]:
    """What a choice is in the block `sisa:`; keys at their defaults are left out."""
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
    """As JSON: what is not known is null."""
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
