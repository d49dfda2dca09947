"""Carry out rights of a person other than erasure, and the deletion lists of California's DROP.

The commands are `sisa access`, `rectify`, `restrict`, `release`, `recipients` and `sisa drop ...`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    executor_option,
    model_option,
    opened,
    option_or_file,
    records_options,
)
from cluster.cli.input_files import STANDARD_INPUT
from cluster.cli.maintenance import logged
from cluster.observe.reporting import say
from cluster.render.result import Result, counted, of_model
from cluster.render.rights import drop_shown, engine_lines, rectified, restricted
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.flows.rights.drop import Imported, Reported

STANDARD_OUTPUT = STANDARD_INPUT  # `-`
subject_option = option_or_file("--subject", required=True, help="Whose records.")


@command("access", "-m model --subject p001 -o p001.json")
@model_option
@records_options
@click.option(
    "-o", "--output", "target", required=True, type=PATH, help="New file; `-`: standard output."
)
def write_access(directory: Path, ids: list[str], subject: str | None, target: Path) -> Result:
    """Write all that is held of a person to a JSON file, for them to read and take along."""
    from cluster.serve.engines import with_engines
    from sisa.evidence.attestations import log_hand_out
    from sisa.flows.rights.access import as_file

    if target != STANDARD_OUTPUT and os.path.lexists(target):
        raise _exists(target)
    with opened(directory) as model:
        found = with_engines(model, model.access(ids, subject=subject))
        missing = [name for name, each in found["processing"]["controller"].items() if each is None]
        if missing:
            keys = ", ".join(f"privacy.{name}" for name in missing)
            say(f"null, since the run file does not say it: {keys}")
        data = as_file(found)
        if target == STANDARD_OUTPUT:
            say(logged(log_hand_out(model, "access", data, ids or [str(subject)])))
            return Result(found, [data.decode().rstrip("\n")])
        _write_new(target, data)
        stated = log_hand_out(model, "access", data, ids or [str(subject)])
    counts = {name: len(found[name]) for name in ("records", "deleted", "requests", "recipients")}
    summary = ", ".join(f"{name}: {count}" for name, count in counts.items())
    wrote = f"wrote {target} ({summary}); it is personal data: hand it to that person alone"
    body = {"file": str(target), "num_bytes": len(data), **counts, "missing": missing}
    body |= {"entry": stated.entry, "not_logged": stated.not_logged}
    return Result(body, [wrote, logged(stated)])


def _write_new(path: Path, data: bytes) -> None:
    """Write a file for its owner alone. Raise InvalidInput if there is one, EnvironmentFault."""
    from sisa.store.blobs.files import FILE_MODE, disk_errors

    with disk_errors(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        except FileExistsError:
            raise _exists(path) from None
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _exists(path: Path) -> InvalidInput:
    return InvalidInput("there is a file already", where=str(path), next_step="name a new file")


@command("recipients", "-m model --subject p001")
@model_option
@records_options
def list_recipients(directory: Path, ids: list[str], subject: str | None) -> Result:
    """List the exports that hold what a person's records touched."""
    from cluster.serve.engines import with_engines
    from sisa.evidence.attestations import log_hand_out
    from sisa.flows.rights.access import as_file

    with opened(directory) as model:
        found = with_engines(model, model.recipients(ids, subject=subject))
        say(logged(log_hand_out(model, "recipients", as_file(found), ids or [str(subject)])))
    lines = [
        f"{each['path']}: {each['standing']}{', STALE' if each['stale'] else ''}"
        for each in found["recipients"]
    ]
    lines += engine_lines(found["engines"])
    return Result(found, lines or ["nothing was exported that these records touched"])


@command("rectify", "-m model corrected.jsonl")
@model_option
@click.argument("file", type=PATH)
@executor_option
def rectify(directory: Path, file: Path, executor: ExecutorChoice) -> Result:
    """Replace held records by new versions of the same ids, exactly. One certificate states both."""
    with opened(directory, executor) as model:
        return rectified(model.rectify(file))


@command("restrict", "-m model --subject p001")
@model_option
@subject_option
def restrict_person(directory: Path, subject: str) -> Result:
    """Store a person's records and serve none of them, until released; nothing is retrained."""
    from cluster.serve.engines import with_engines

    with opened(directory) as model:
        found = model.restrict(subject)
        return restricted(found, with_engines(model, model.recipients(subject=subject)))


@command("release", "-m model --subject p001")
@model_option
@subject_option
def release_person(directory: Path, subject: str) -> Result:
    """End the restriction of a person's records: they are served as before."""
    with opened(directory) as model:
        found = model.release(subject)
    return restricted(found)


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


def imported(done: Imported, directory: Path) -> Result:
    lines = [
        f"download of {done.downloaded}: {counted(done.new, 'new work item')}, {done.known} known, "
        f"{done.withdrawn} withdrawn",
        f"matched: {done.matched} by one consumer, {done.shared} by several, {done.not_found} not found",
        f"requests: {len(done.requests)} submitted, {len(done.cancelled)} cancelled",
    ]
    if done.shared:
        shared = "opt out those who share an identifier, unless you did: "
        lines.append(f"{shared}`sisa drop status --show-ids` names them")
    at = of_model(directory)
    step = f"`sisa request approve` each, sisa run {at}, " if done.requests else ""
    return Result(asdict(done), [*lines, f"next: {step}sisa drop report {at} -o DIR"])


@command("report", "-m model -o responses", group=drop)
@model_option
@click.option("-o", "--output", "target", required=True, type=PATH, help="Directory to write to.")
@click.option(
    "--opted-out",
    is_flag=True,
    help="State that all consumers who share an identifier were opted out of sale and sharing.",
)
@click.option("--again", is_flag=True, help="Also write what was reported before, if it was lost.")
@click.option("--suffix", default="", help="Suffix of the names: up to 10 letters and digits.")
def drop_report(directory: Path, target: Path, opted_out: bool, again: bool, suffix: str) -> Result:
    """Write the responses that are due, to be uploaded to DROP."""
    with opened(directory) as model:
        done = model.drop_report(target, opted_out=opted_out, again=again, suffix=suffix)
        return reported(done)


def reported(done: Reported) -> Result:
    statuses = ", ".join(f"{count} of status {status}" for status, count in done.statuses.items())
    lines = [f"reported: {statuses or 'nothing'}; {counted(done.open, 'work item')} without a status"]
    lines += [f"  to upload: {done.directory}/{each}" for each in done.upload]
    lines += [f"  to amend:  {done.directory}/{each}" for each in done.amend]
    return Result({**asdict(done), "statuses": {str(k): n for k, n in done.statuses.items()}}, lines)


@command("status", "-m model", group=drop)
@model_option
@click.option("--show-ids", is_flag=True, help="Show the ids of the records that are matched.")
def drop_status(directory: Path, show_ids: bool) -> Result:
    """Show the 45-day cycle: next access, open and overdue work items, and what they wait for."""
    with opened(directory) as model:
        return drop_shown(model.drop_details(show_ids=show_ids))
