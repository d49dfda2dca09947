"""Render rights other than erasure, and DROP's cycle, as JSON and as text.

The JSON keys are a contract (README, "The JSON contract"): keys are added, never renamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.render.result import Result, counted

if TYPE_CHECKING:
    from sisa.flows.ingest import Rectified
    from sisa.flows.rights.drop import Details, Standing
    from sisa.flows.rights.restriction import Restriction


def rectified(found: Rectified) -> Result:
    taken, request = found.taken, found.request
    lines = [f"replaced {counted(taken.added, 'record')}, {taken.already_held} unchanged"]
    lines += [f"  request {request.request_id}: {request.state}"] if request else []
    lines.append(f"  trained {counted(taken.slices_trained, 'slice')}; model {taken.model_digest[:16]}")
    body = {
        "request_id": request and request.request_id,
        "replaced": taken.added,
        "unchanged": taken.already_held,
        "slices_trained": taken.slices_trained,
        "record_epochs_trained": taken.record_epochs_trained,
        "model_digest": taken.model_digest,
    }
    return Result(body, lines)


def restricted(found: Restriction, holders: Mapping[str, Any] | None = None) -> Result:
    """Render a restriction or its end, and the earlier exports with the engines that hold them."""
    exports, engines = (list(holders[name]) if holders else [] for name in ("recipients", "engines"))
    records = counted(found.num_records, "record")
    lines = [f"restricted since {found.since}: {records}" if found.since else f"released: {records}"]
    lines += [f"  shard {shard} serves {depth} of {of} slices" for shard, depth, of in found.served]
    lines += [f"  exported before, so tell whoever uses it: {each['path']}" for each in exports]
    lines += engine_lines(engines)
    body = {
        "since": found.since,
        "changed": found.changed,
        "records": found.num_records,
        "served": [list(each) for each in found.served],
        "recipients": exports,
        "engines": engines,
    }
    return Result(body, lines)


def engine_lines(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each engine that holds one of the exports, or could not be asked."""
    return [
        f"engine {each['url']}: "
        + (each["fault"] or f"holds {counted(len(each['adapters']), 'adapter')} of these exports")
        for each in engines
    ]


def drop_standing(found: Standing) -> str:
    """Return the state of DROP's cycle, in one line."""
    return (
        f"DROP: next access due {found.next_access}, {counted(found.days_left, 'day')} left; "
        f"{counted(found.open, 'work item')} open, {found.overdue} overdue"
    )


def drop_shown(found: Details | None) -> Result:
    if found is None:
        empty: dict[str, Any] = {"standing": None, "matched": [], "records_without_identity": None}
        return Result(empty, ["no download of DROP was imported"])
    standing = found.standing
    lines = [
        drop_standing(standing),
        f"  {counted(standing.work_items, 'work item')} on the lists, {standing.withdrawn} withdrawn, "
        f"{standing.to_report} to report, {standing.to_opt_out} to opt out",
        f"  {counted(found.records_without_identity, 'record')} without an identity can't be matched",
    ]
    for each in found.matched:
        what = each.request_id or f"opt out {each.consumers} consumers"
        lines.append(f"  {each.item} ({each.kind}), due {each.due}: {what}")
        lines += [f"    {name}" for name in each.ids]
    return Result(asdict(found), lines)
