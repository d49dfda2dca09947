"""Delete at once, or on requests that somebody decides: `sisa forget`, `request`, `run`, `report`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    consent_option,
    executor_option,
    model_option,
    opened,
    option_or_file,
    option_or_input,
    records_options,
)
from cluster.observe.reporting import say
from cluster.render.deletions import (
    already_deleted,
    base_hint,
    forget_plan,
    forgotten,
    meanwhile,
    missing_exports,
    probed,
    request_line,
    retrained,
    view_body,
    view_line,
)
from cluster.render.result import EXIT_ACT, Result, counted, of_model
from cluster.render.rights import drop_standing
from sisa.core.errors import Busy
from sisa.core.requests import CLOSED, Regime

if TYPE_CHECKING:
    from sisa.core.requests import Request, RequestState
    from sisa.flows.requests import RequestView, Submitted
    from sisa.flows.rights.drop import Standing
    from sisa.model import Model
    from sisa.planning.batching import RunPlan


@command("forget", "-m model --subject p001 --dry-run")
@model_option
@records_options
@click.option("--dry-run", is_flag=True, help="Show what would happen; change nothing.")
@click.option(
    "--defer", is_flag=True, help="Erase now; retrain with the next `sisa run`, train or forget."
)
@consent_option
@executor_option
def forget(
    directory: Path,
    ids: list[str],
    subject: str | None,
    dry_run: bool,
    defer: bool,
    consent: str,
    executor: ExecutorChoice,
) -> Result:
    """Delete records exactly, and retrain what they touched."""
    with opened(directory, executor) as model:
        if dry_run:
            return forget_plan(model.plan_forget(ids, subject=subject))
        done = model.forget(ids, subject=subject, consent=consent, defer=defer)
        return _with_certificate(forgotten(done, directory), model, done.request)


def _with_certificate(result: Result, model: Model, request: Request | None) -> Result:
    """Add the state of the certificate of a request to a result."""
    from sisa.flows.wiring.wiring import has_evidence

    if request is None or not request.committed_at:
        return result.with_more({"certificate": request and "none"})
    found, line = "none", "certificate: none, for the model has no signing keys (`sisa keys init`)"
    if has_evidence(model.directory, model.config, model.id):
        from sisa.evidence.open_evidence import standing

        found, at = standing(model, request.request_id), of_model(model.directory)
        line = {
            "issued": f"certificate: `sisa certificate show {at} {request.request_id}`",
            "pending": "certificate: pending, until what it deleted is trained again and it is signed",
            "none": "certificate: none",
        }[found]
    return result.with_more({"certificate": found}, [line])


request = command_group("request", "Submit, decide and look up requests for deletion.")
request_argument = click.argument("request_id", metavar="REQUEST")
by_option = click.option("--by", default="", help="Who decides; stored as given.")


@command("submit", "-m model --subject p001 --external-id T-17", group=request)
@model_option
@records_options
@option_or_input("--find-like", metavar="ID", help="Delete a record; propose its near-duplicates.")
@click.option("--external-id", help="Your own name for the request; a repeated name adds no request.")
@option_or_file("--reason", help="Why; stored as given.")
@click.option(
    "--regime",
    type=click.Choice(get_args(Regime)),
    default="gdpr",
    help="Sets the due date: a month, or 45 days.",
)
@click.option("--due", help="Due date, YYYY-MM-DD, instead of the regime's.")
@click.option(
    "--received-on", help="Day on which it arrived, YYYY-MM-DD, if not today: its term counts from then."
)
@click.option("--submitter", default="", show_default=False, help="Who submits it, for four eyes.")
@click.option("--approver", help="Approve at once, in this name.")
@click.option(
    "--include-copies",
    "--include-duplicates",
    is_flag=True,
    help="Also delete exact copies under other ids.",
)
@consent_option
def submit_request(
    directory: Path,
    ids: list[str],
    subject: str | None,
    find_like: str | None,
    reason: str | None,
    **given: Any,
) -> Result:
    """Submit a request; it runs once it is approved."""
    from sisa.flows.requests import Terms

    named = [*ids, *([find_like] if find_like else [])]
    terms = Terms(reason=reason or "", **given)  # other options have the names of its fields
    with opened(directory) as model:
        done = model.submit(named, subject=subject, terms=terms)
        return submitted(done, model.request(done.request.request_id), directory)


def submitted(found: Submitted, view: RequestView, directory: Path) -> Result:
    lines = [view_line(view), *already_deleted(found.already_deleted)]
    if found.copies:
        fate = "included" if found.request.copies_included else "NOT included (--include-copies)"
        lines.append(f"exact copies under other ids, {fate}: {len(found.copies)}")
        lines += [f"  {each}" for each in found.copies]
    if found.near:
        near = f"near-duplicates, not included: {len(found.near)}"
        lines.append(f"{near}; submit their ids to delete them")
        lines += [f"  {each.score:.4f}  {each.id}" for each in found.near]
    if view.request.state == "received":
        name = view.request.external_id or view.request.request_id
        lines.append(
            f"next: sisa request approve {of_model(directory)} {shlex.quote(name)} --approver WHO"
        )
    elif view.request.state == "approved":
        lines.append(f"next: sisa run {of_model(directory)}")
    body = view_body(view) | {
        "copies": list(found.copies),
        "near": [asdict(each) for each in found.near],
    }
    body["already_deleted"] = len(found.already_deleted)
    return Result(body, lines)


@command("list", "-m model", group=request)
@model_option
@click.option(
    "--overdue",
    is_flag=True,
    help="Open requests past their due date alone; exit with 7 if there are any.",
)
def list_(directory: Path, overdue: bool) -> Result:
    """List all requests with their state, due date and days left."""
    with opened(directory) as model:
        views, cycle = model.requests(), model.drop_standing()
    if not overdue:
        return requests_listed(views, cycle)
    late = [view for view in views if view.days_left < 0 and view.request.state not in CLOSED]
    return replace(requests_listed(late, cycle), exit_code=EXIT_ACT if late else 0)


def requests_listed(views: Sequence[RequestView], cycle: Standing | None = None) -> Result:
    lines = [view_line(view) for view in views] or ["no requests"]
    lines += [drop_standing(cycle)] if cycle else []
    body = {"requests": [view_body(view) for view in views], "drop": asdict(cycle) if cycle else None}
    return Result(body, lines)


@command("show", "-m model T-17", group=request)
@model_option
@request_argument
def show_request(directory: Path, request_id: str) -> Result:
    """Show one request and its history."""
    with opened(directory) as model:
        return _shown(model, model.request(request_id))


def _shown(model: Model, view: RequestView) -> Result:
    return _with_certificate(request_shown(view), model, view.request)


def request_shown(view: RequestView) -> Result:
    request = view.request
    lines = [view_line(view)]
    lines += [f"  reason: {request.reason}"] if request.reason else []
    lines += [f"  {each.at}  {each.state}  {each.note}".rstrip() for each in view.events]
    if request.committed_at:
        lines += [f"  record-epochs of its batch: {retrained(request)}", *meanwhile(request)]
    lines += probed(request.probed)
    return Result(view_body(view) | {"events": [asdict(each) for each in view.events]}, lines)


@command("approve", "-m model T-17 --approver dpo", group=request)
@model_option
@request_argument
@click.option("--approver", required=True, help="Who approves.")
def approve(directory: Path, request_id: str, approver: str) -> Result:
    """Approve a request that was received or held."""
    done = _decide(directory, request_id, "approved", "", approver)
    return done.with_more({}, [f"next: sisa run {of_model(directory)}"])


@command("deny", '-m model T-17 --reason "not the person"', group=request)
@model_option
@request_argument
@option_or_file("--reason", required=True, help="Why; stored as given.")
@by_option
def deny(directory: Path, request_id: str, reason: str, by: str) -> Result:
    """Refuse a request."""
    return _decide(directory, request_id, "denied", reason, by)


@command("hold", '-m model T-17 --reason "court order"', group=request)
@model_option
@request_argument
@option_or_file("--reason", required=True, help="Why; stored as given.")
@by_option
def hold(directory: Path, request_id: str, reason: str, by: str) -> Result:
    """Put a request under a legal hold; `approve` ends it."""
    return _decide(directory, request_id, "held", reason, by)


@command("cancel", "-m model T-17", group=request)
@model_option
@request_argument
@option_or_file("--reason", help="Why; stored as given.")
@by_option
def cancel(directory: Path, request_id: str, reason: str | None, by: str) -> Result:
    """Withdraw a request that has not run."""
    return _decide(directory, request_id, "cancelled", reason or "", by)


def _decide(directory: Path, request_id: str, state: RequestState, note: str, by: str) -> Result:
    with opened(directory) as model:
        return _shown(model, model.decide(request_id, state, note, by=by))


@command("extend", '-m model T-17 --reason "complex"', group=request)
@model_option
@request_argument
@option_or_file("--reason", required=True, help="Why; stored as given.")
@by_option
def extend(directory: Path, request_id: str, reason: str, by: str) -> Result:
    """Extend a request's due date once, by two months (gdpr)."""
    with opened(directory) as model:
        return _shown(model, model.extend(request_id, reason, by=by))


@command("run", "-m model --plan")
@model_option
@click.option(
    "--plan", "only_plan", is_flag=True, help="Compare the cost of running now and of waiting."
)
@click.option("--once", is_flag=True, help="Run what is approved now (the default).")
@click.option("--watch", is_flag=True, help="Keep running requests when the plan says so.")
@click.option(
    "--every", default=60, type=click.IntRange(1, 86_400), help="Seconds between checks with --watch."
)
@executor_option
def run_requests(
    directory: Path, only_plan: bool, once: bool, watch: bool, every: int, executor: ExecutorChoice
) -> Result:
    """Carry out approved requests as one batch."""
    if only_plan + once + watch > 1:
        raise click.UsageError("give one of --plan, --once and --watch")
    with opened(directory, executor) as model:
        if only_plan:
            return run_planned(model.plan_run())
        if watch:
            _watch(model, directory, every)
        done = model.run()
        on_hold = [each for each in model.requests() if each.held_by]
        return ran(done, model.exports_missing(), directory, on_hold)


def run_planned(found: RunPlan) -> Result:
    lines = [
        f"{found.choice}: {found.why}",
        f"  approved or unfinished requests: {len(found.requests)}; "
        f"{found.expected_arrivals:.1f} more expected",
        f"  expected record-epochs, later requests included: {found.cost_now:.1f} if run now, "
        f"{found.cost_waiting:.1f} if you wait",
    ]
    return Result(asdict(found), lines)


def ran(
    done: Sequence[Request],
    missing: Sequence[str] = (),
    directory: Path | str = "DIR",
    on_hold: Sequence[RequestView] = (),
) -> Result:
    lines = [
        request_line(each, f", batch of {retrained(each)} record-epochs in {each.seconds:.1f} s")
        + (f", {each.record_epochs_others} more in other orders" if each.record_epochs_others else "")
        + (f", {counted(each.exports_erased, 'export')} erased" if each.exports_erased else "")
        for each in done
    ] or ["no request can be run" if on_hold else "no request waits to be run"]
    lines += [view_line(each) for each in on_hold]
    body = {"requests": [asdict(each) for each in done], "exports_missing": list(missing)}
    body |= {"on_hold": [each.request.request_id for each in on_hold]}
    hints = [line for each in done for line in base_hint(each, directory)]
    return Result(body, [*lines, *hints, *missing_exports(missing)])


def _watch(model: Model, directory: Path, every: int) -> NoReturn:
    """Carry requests out when they are due or somebody asks for it, and report changes.

    While another process holds the model, wait for the next check. Raise any other error.
    """
    from cluster.serve.runner import carry_out_requests, delivering

    _join_cluster(model)
    is_waiting = False
    with delivering(directory):
        while True:
            try:
                if done := carry_out_requests(model):
                    say(ran(done, model.exports_missing(), directory).text)
                is_waiting = False
            except Busy as error:
                if not is_waiting:
                    say(f"waiting: {error.what}; trying again every {every} s")
                is_waiting = True
            time.sleep(every)


def _join_cluster(model: Model) -> None:
    """Join a running cluster, so that its metrics show the queue before the first deletion."""
    from sisa.flows.wiring.executors import OnCluster

    executor = model.executor
    address = model.config.cluster.address if executor in ("auto", "ray") else None
    if isinstance(executor, OnCluster):
        address = executor.address
    if address is not None:
        from cluster.ray.session import connect

        connect(address, 0)


@command("report", "-m model --html report.html")
@model_option
@click.option("--html", "target", type=PATH, help="File to write; one that exists is replaced.")
@click.option("--made-by", default="", show_default=False, help="Who makes the report; shown as given.")
def report(directory: Path, target: Path | None, made_by: str) -> Result:
    """Make one page for a privacy officer.

    It shows requests, certificates, slices, costs, and what is covered.
    """
    from cluster.render.officer_report import page, read_facts, report_body
    from sisa.store.blobs.files import write_atomic

    with opened(directory) as model:
        facts = read_facts(model, datetime.now(UTC).isoformat(timespec="milliseconds"), made_by)
    body = json.loads(json.dumps(report_body(facts)))
    lines = [
        f"{each['severity']}: {each['what']}" + (f": {each['count']}" if each["count"] else "")
        for each in body["attention"]
    ]
    lines += [f"{counted(len(body['requests']), 'request')}, {counted(len(lines), 'point')} to act on"]
    if target is not None:
        write_atomic(target, page(body).encode())
        lines.append(f"page: {target}")
    return Result(body | {"html": str(target) if target else None}, lines)
