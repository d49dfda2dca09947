"""Show a model to people who check it: `sisa report`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click

from cluster.cli.command import PATH, command, model_option, opened
from cluster.render.render import Result, counted


@command("report", "-m model --html report.html")
@model_option
@click.option("--html", "target", type=PATH, help="File to write; one that exists is replaced.")
@click.option("--made-by", default="", show_default=False, help="Who makes the report; shown as given.")
def report(directory: Path, target: Path | None, made_by: str) -> Result:
    """Make one page for a privacy officer: requests, certificates, lineage, costs, what is covered."""
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
