"""Carry out rights other than erasure, and requests that a regulator passes on: `sisa drop ...`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH, command, command_group, model_option, opened
from cluster.render.render import Result, counted

if TYPE_CHECKING:
    from sisa.flows.rights.drop import Details, Imported, Reported, Standing

drop = command_group("drop", "California's DROP: import deletion lists, report statuses.")


@command("import", "-m model 20260812_4821_DROP.zip", group=drop)
@model_option
@click.argument("file", metavar="ZIP", type=PATH)
@click.option("--submitter", default="", show_default=False, help="Who submits them, for four eyes.")
@click.option("--approver", help="Approve the new requests at once, in this name.")
def drop_import(directory: Path, file: Path, submitter: str, approver: str | None) -> Result:
    """Import a download of DROP; submit a request for each consumer whom it matches."""
    with opened(directory) as model:
        return imported(model.drop_import(file, approver=approver, submitter=submitter), directory)


@command("report", "-m model -o responses", group=drop)
@model_option
@click.option("-o", "--output", "target", required=True, type=PATH, help="Directory to write to.")
@click.option(
    "--opted-out",
    is_flag=True,
    help="State that all consumers who share an identifier were opted out of sale and sharing.",
)
@click.option("--suffix", default="", help="Suffix of the names: up to 10 letters and digits.")
def drop_report(directory: Path, target: Path, opted_out: bool, suffix: str) -> Result:
    """Write the responses that are due, to be uploaded to DROP."""
    with opened(directory) as model:
        return reported(model.drop_report(target, opted_out=opted_out, suffix=suffix))


@command("status", "-m model", group=drop)
@model_option
@click.option("--show-ids", is_flag=True, help="Show the ids of the records that are matched.")
def drop_status(directory: Path, show_ids: bool) -> Result:
    """Show the 45-day cycle: next access, open and overdue work items, and what they wait for."""
    with opened(directory) as model:
        return status_shown(model.drop_details(show_ids=show_ids))


def imported(done: Imported, directory: Path) -> Result:
    lines = [
        f"download of {done.downloaded}: {counted(done.new, 'new work item')}, {done.known} known, "
        f"{done.withdrawn} withdrawn",
        f"of all open ones: {done.matched} matched by one consumer, {done.shared} by several, "
        f"{done.not_found} not found",
        f"requests: {len(done.requests)} submitted, {len(done.cancelled)} cancelled",
    ]
    if done.shared:
        lines.append("opt out those who share an identifier: `sisa drop status --show-ids` names them")
    step = f"`sisa request approve` each, sisa run -m {directory}, " if done.requests else ""
    return Result(asdict(done), [*lines, f"next: {step}sisa drop report -m {directory} -o DIR"])


def reported(done: Reported) -> Result:
    statuses = ", ".join(f"{count} of status {status}" for status, count in done.statuses.items())
    lines = [f"reported: {statuses or 'nothing'}; {counted(done.open, 'work item')} without a status"]
    lines += [f"  to upload: {done.directory}/{each}" for each in done.upload]
    lines += [f"  to amend:  {done.directory}/{each}" for each in done.amend]
    return Result({**asdict(done), "statuses": {str(k): n for k, n in done.statuses.items()}}, lines)


def standing_line(found: Standing) -> str:
    """Return the cycle in one line."""
    return (
        f"DROP: next access due {found.next_access}, {counted(found.days_left, 'day')} left; "
        f"{counted(found.open, 'work item')} open, {found.overdue} overdue"
    )


def status_shown(found: Details | None) -> Result:
    if found is None:
        empty: dict[str, Any] = {"standing": None, "matched": [], "records_without_identity": None}
        return Result(empty, ["no download of DROP was imported"])
    standing = found.standing
    lines = [
        standing_line(standing),
        f"  {counted(standing.work_items, 'work item')} on the lists, {standing.withdrawn} withdrawn, "
        f"{standing.to_report} to report, {standing.to_opt_out} to opt out",
        f"  {counted(found.records_without_identity, 'record')} without an identity can't be matched",
    ]
    for each in found.matched:
        what = each.request_id or f"opt out {each.consumers} consumers"
        lines.append(f"  {each.item} ({each.kind}), due {each.due}: {what}")
        lines += [f"    {name}" for name in each.ids]
    return Result(asdict(found), lines)
