"""Render deletions as JSON and as text: what one would do, what it did, what is left to do by hand.

The JSON keys are a contract (README, "The JSON contract"): keys are added, never renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.render.result import Result, counted, of_model, share, shortened, time_left
from sisa.core.requests import CLOSED, Request

if TYPE_CHECKING:
    from sisa.core.domain import Tombstone
    from sisa.core.ports import KeptVersions
    from sisa.core.requests import Probed
    from sisa.flows.deletion import ForgetOutcome, ForgetPlan
    from sisa.flows.requests import RequestView


def request_line(request: Request, more: str = "") -> str:
    """Return a request in one line of a list."""
    name = f" ({request.external_id})" if request.external_id else ""
    return f"{request.request_id}{name}: {request.state}, {counted(request.num_records, 'record')}{more}"


def view_line(view: RequestView) -> str:
    """Return a request in one line, with when it arrived, when it is due, and what it waits for."""
    request = view.request
    if request.state in CLOSED:
        return request_line(request)
    arrived = f", received on {request.received_on}" if request.received_on else ""
    holds = f", waits for the legal hold of {', '.join(view.held_by)}" if view.held_by else ""
    return request_line(request, f"{arrived}, due {request.due}, {time_left(view.days_left)}{holds}")


def view_body(view: RequestView) -> dict[str, Any]:
    """Return a request with its days left and the holds that it waits for, as JSON values."""
    return asdict(view.request) | {"days_left": view.days_left, "held_by": list(view.held_by)}


def retrained(of: Request | ForgetPlan) -> str:
    """Return the record-epochs that a deletion retrains, and their share of a full training."""
    part, whole = of.record_epochs_retrained, of.record_epochs_full
    return f"{part} of {whole} ({share(part, whole)})"


def meanwhile(of: Request | ForgetPlan) -> Iterator[str]:
    """Yield what is served until the shards are retrained, and the additional cost of other orders."""
    if of.served:
        shards = shortened([f"shard {s}: {n} of {whole} slices" for s, n, whole in of.served])
        yield f"  meanwhile served: {shards}; {100 * of.serving_depth:.1f}% of all shards' slices"
    if of.record_epochs_others:
        yield f"  other orders: {of.record_epochs_others} record-epochs more"


def _numbers(of: Request | ForgetPlan, shards: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return the keys that a deletion and its dry run share."""
    return {
        "shards": [{"shard": s, "first_slice": f, "slices_retrained": n} for s, f, n in shards],
        "record_epochs_retrained": of.record_epochs_retrained,
        "record_epochs_full": of.record_epochs_full,
        "record_epochs_others": of.record_epochs_others,
        "served": [{"shard": s, "slices_served": n, "of": whole} for s, n, whole in of.served],
        "serving_depth": of.serving_depth,
    }


def forget_plan(planned: ForgetPlan) -> Result:
    seconds = planned.estimated_seconds
    rows = [(shard, planned.first_slices[shard], n) for shard, n in planned.stages_retrained.items()]
    erased = {
        "checkpoints": len(planned.tainted),
        "slice_files": planned.num_slice_files,
        "index_rows": len(planned.removed),
        "exports": len(planned.exports),
    }
    body = {
        "dry_run": True,
        "records": len(planned.removed),
        "already_deleted": len(planned.already_deleted),
        **_numbers(planned, rows),
        "estimated_seconds": seconds,
        "would_erase": erased,
    }
    estimate = "unknown" if seconds is None else f"{seconds:.1f} s of one worker"
    *most, last = (counted(n, name.removesuffix("s").replace("_", " ")) for name, n in erased.items())
    lines = [
        f"would delete {counted(len(planned.removed), 'record')}; nothing was changed",
        *(f"  shard {s}: retrain {counted(n, 'slice')} from slice {first} on" for s, first, n in rows),
        f"  record-epochs: {retrained(planned)}; estimated time of training {estimate}",
        *meanwhile(planned),
        f"  would erase {', '.join(most)} and {last}",
        *already_deleted(planned.already_deleted),
        "next: the same command without --dry-run",
    ]
    return Result(body, lines)


def already_deleted(found: Sequence[Tombstone]) -> list[str]:
    """Return how many of the named records earlier requests deleted, as one line, or none."""
    if not found:
        return []
    by = shortened(sorted({each.request_id for each in found}))
    return [f"already deleted before: {counted(len(found), 'record')}, by {by}"]


def forgotten(outcome: ForgetOutcome, directory: Path | str = "DIR") -> Result:
    already, after = outcome.already_deleted, outcome.model_digest
    nothing = Request("", "", "", 0, model_digest_before=after, model_digest_after=after)
    request = outcome.request or nothing
    body = {
        "request_id": request.request_id or None,
        "records": request.num_records,
        **_numbers(request, request.shards),
        "deferred": outcome.deferred,
        "seconds": request.seconds,
        "model_digest_before": request.model_digest_before,
        "model_digest_after": request.model_digest_after,
        "already_deleted": len(already),
        "already_deleted_by": sorted({each.request_id for each in already}),
        "exports_erased": request.exports_erased,
        "exports_missing": list(outcome.exports_missing),
        "old_versions_kept": [asdict(each) for each in outcome.old_versions_kept],
        "probed": request.probed and asdict(request.probed),
    }
    lines = already_deleted(already)
    if outcome.request is not None:
        lines = _deleted(request, outcome, directory)
    lines += missing_exports(outcome.exports_missing) + old_versions(outcome.old_versions_kept)
    if request.state == "erased":
        lines.append(f"next: `sisa run {of_model(directory)}` retrains the deferred slices")
    elif outcome.request is not None:
        lines.append(
            f"next: `sisa verify {of_model(directory)} --replay sample` proves it by retraining"
        )
    return Result(body, lines)


def _deleted(request: Request, outcome: ForgetOutcome, directory: Path | str) -> list[str]:
    """Return the facts of a deletion, and what the base alone knew."""
    to_do = "to be retrained" if request.state == "erased" else "retrained"
    lines = [f"deleted {counted(request.num_records, 'record')} exactly; request {request.request_id}"]
    for shard, first, num in request.shards:
        lines.append(f"  shard {shard}: {counted(num, 'slice')} {to_do} from slice {first} on")
    lines += meanwhile(request)
    lines.append(f"  record-epochs: {retrained(request)} in {request.seconds:.1f} s")
    before, after = request.model_digest_before, outcome.model_digest
    lines.append(f"  model digest {before[:16]}... -> {after[:16]}...")
    lines += already_deleted(outcome.already_deleted)
    if request.exports_erased:
        lines.append(f"  {counted(request.exports_erased, 'export')} erased")
    return lines + probed(request.probed) + base_hint(request, directory)


def probed(found: Probed | None) -> list[str]:
    """Return what the base alone knew, as one line, or none if the base was not probed."""
    if found is None:
        return []
    if found.failure:
        return [f"  the base alone could not be asked what it knows ({found.failure})"]
    return [
        f"  approximately still known to the base alone: {found.num_known} of {found.num_probed} probed "
        f"records (continuation {found.continuation:.2f}, extraction strength "
        f"{found.extraction_strength:.2f}, exact memorisation {found.exact_memorisation:.2f}, "
        f"membership margin {found.membership_margin:+.2f})"
    ]


def base_hint(request: Request, directory: Path | str) -> list[str]:
    """Return what to do if the base alone knows a deleted record, as one line, or none."""
    if request.probed is None or not request.probed.num_known:
        return []
    command = f"sisa approx unlearn {of_model(directory)}"
    start = f"  to make the base say less of it, approximately: {command}"
    if request.vaulted:
        return [f"{start} --request {request.request_id}"]
    return [
        f"{start} --forget FILE --consent WHO, if you may have the text; it rests encrypted until the "
        "base no longer knows it, or you release it"
    ]


def missing_exports(paths: Sequence[str]) -> list[str]:
    """Return what to do about each export that could not be erased."""
    from sisa.flows.export import unload_command

    return [
        f"stale export, moved or changed, to be removed by you: {path}\n"
        f"  if a vLLM server loaded it: {unload_command(path)}"
        for path in paths
    ]


def old_versions(found: Sequence[KeptVersions]) -> list[str]:
    """Return a line for each place whose old versions a bucket keeps."""
    from sisa.audit.findings import REPAIR_STEPS

    lines = [f"NOT PURGED, kept by the bucket: {each.where} ({each.why})" for each in found]
    return [*lines, f"  next: {REPAIR_STEPS['purge']}"] if lines else []
