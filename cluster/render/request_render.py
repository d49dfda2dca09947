"""How requests read, as JSON and as words.

Rules: as `render.py`. Ids of copies are shown to whoever submits, since they are to be decided on.

Not covered: the commands (`request_cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.render.render import Result, base_hint, meanwhile, missing_exports, printable, probed, share

if TYPE_CHECKING:
    from sisa.core.domain import Request
    from sisa.flows.lifecycle import RequestView, Submitted
    from sisa.planning.batching import RunPlan


def _line(view: RequestView) -> str:
    request = view.request
    name = f" ({request.external_id})" if request.external_id else ""
    closed = request.state in ("completed", "denied", "cancelled")
    left = "" if closed else f", due {request.due}, {view.days_left} days left"
    return f"{request.request_id}{name}: {request.state}, {request.num_records} records{left}"


def _body(view: RequestView) -> dict[str, Any]:
    return asdict(view.request) | {"days_left": view.days_left}


def listed(views: Sequence[RequestView]) -> Result:
    text = "\n".join(_line(view) for view in views) or "no requests"
    return Result({"requests": [_body(view) for view in views]}, printable(text))


def shown(view: RequestView) -> Result:
    events = [asdict(each) for each in view.events]
    lines = [_line(view)]
    lines += [f"  {each.at}  {each.state}  {each.note}".rstrip() for each in view.events]
    lines += _cost(view.request) + probed(view.request.probed)
    return Result(_body(view) | {"events": events}, printable("\n".join(lines)))


def _cost(request: Request) -> list[str]:
    """What was served meanwhile, and what the batch that it ran in took; none before its commit."""
    if not request.committed_at:
        return []
    part = share(request.record_epochs_retrained, request.record_epochs_full)
    return [
        f"  record-epochs of its batch: {request.record_epochs_retrained} of "
        f"{request.record_epochs_full} ({part})",
        *meanwhile(request.served, request.serving_depth, request.record_epochs_others),
    ]


def submitted(found: Submitted, view: RequestView) -> Result:
    lines = [_line(view)]
    if found.copies:
        fate = "included" if found.request.copies_included else "NOT included (--include-duplicates)"
        lines.append(f"{len(found.copies)} exact copies under other ids, {fate}:")
        lines += [f"  {each}" for each in found.copies]
    if found.near:
        lines.append(f"{len(found.near)} near-duplicates, not included; name them to delete them:")
        lines += [f"  {each.score:.4f}  {each.id}" for each in found.near]
    body = _body(view) | {"copies": list(found.copies), "near": [asdict(each) for each in found.near]}
    return Result(body, printable("\n".join(lines)))


def planned(found: RunPlan) -> Result:
    lines = [
        f"{found.choice}: {found.why}",
        f"  {len(found.requests)} requests wait, approved or begun; "
        f"{found.expected_arrivals:.1f} more expected",
        f"  expected record-epochs: {found.cost_now:.1f} running now and then, "
        f"{found.cost_waiting:.1f} waiting",
    ]
    return Result(asdict(found), "\n".join(lines))


def ran(done: Sequence[Request], missing: Sequence[str] = (), directory: Path | str = "DIR") -> Result:
    lines = [
        f"{each.request_id}: {each.state}, {each.num_records} records, batch of "
        f"{each.record_epochs_retrained} record-epochs "
        f"({share(each.record_epochs_retrained, each.record_epochs_full)}) in {each.seconds:.1f} s"
        + (f", {each.record_epochs_others} more in other orders" if each.record_epochs_others else "")
        + (f", {each.exports_erased} exports erased" if each.exports_erased else "")
        for each in done
    ] or ["nothing waits"]
    body = {"requests": [asdict(each) for each in done], "exports_missing": list(missing)}
    hints = [line for each in done for line in base_hint(each, directory)]
    return Result(body, printable("\n".join([*lines, *hints, *missing_exports(missing)])))
