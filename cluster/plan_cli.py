"""`sisa simulate`: what a stream of deletions would cost, before there is a model.

Rules: as `cli.py`. Nothing is read but the run file, and nothing is trained: counts alone.

Not covered: the counting (`sisa/stream.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cluster.command import command
from cluster.render import Result
from sisa.errors import InvalidInput

MAX_RECORDS = 10**12


@command("simulate", "sisa simulate run.yaml --records 100000000 --deletions 1000000")
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option("--records", type=click.IntRange(1, MAX_RECORDS), required=True, help="Of the model.")
@click.option("--deletions", type=click.IntRange(1), required=True, help="Records, drawn at random.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Deletions of one run."
)
@click.option("--shards", type=click.IntRange(1), help="Instead of the run file's.")
@click.option("--slices", type=click.IntRange(1), help="Instead of the run file's.")
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
def simulate(
    run_file: Path,
    records: int,
    deletions: int,
    batch: int,
    shards: int | None,
    slices: int | None,
    seed: int,
) -> Result:
    """Replay a stream of deletions by counts: what it retrains, and what closed forms expect."""
    from sisa.runfile import load_run_file
    from sisa.stream import Layouted, replay

    if deletions > records:
        raise InvalidInput(
            "more records would be deleted than there are",
            where="--deletions",
            expected=f"at most {records}",
            got=str(deletions),
        )
    config = load_run_file(run_file)
    layout = Layouted(
        shards or config.sisa.shards,
        slices or config.sisa.slices,
        config.sisa.schedule,
        config.num_epochs,
    )
    began = time.perf_counter()
    found = replay(layout, records, deletions, batch=batch, seed=seed)
    seconds = time.perf_counter() - began
    body = {
        "shards": layout.num_shards,
        "slices": layout.num_slices,
        "schedule": layout.schedule,
        "records": records,
        "deletions": deletions,
        "batch": batch,
        "shard_runs": found.num_runs,
        "record_epochs_retrained": found.record_epochs,
        "record_epochs_expected": round(found.expected_record_epochs),
        "record_epochs_full": found.full_record_epochs,
        "full_trainings": found.record_epochs / found.full_record_epochs,
        "share_per_deletion": found.record_epochs / deletions / found.full_record_epochs,
        "seconds": round(seconds, 2),
    }
    return Result(body, _told(body))


def _told(body: Mapping[str, Any]) -> str:
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
