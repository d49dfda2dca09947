"""Choose `min_score` on public prompts: `sisa routing calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import PATH, command, command_group, run_file_argument
from cluster.render.render import Result

if TYPE_CHECKING:
    from sisa.lm.answer.calibration import Errors


routing = command_group("routing", "Which shards answer a prompt.")


@command("calibrate", "sisa routing calibrate run.yaml --prompts public.jsonl", group=routing)
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
    from sisa.flows.wiring.context import Resources
    from sisa.lm.answer.calibration import calibrate as calibrated

    config = load_run_file(run_file)
    records = read_like(config, file, subjects="some")
    found = calibrated(records, Resources(config, None, None).embedder, config.sisa)
    lines = [
        f"{found.prompts} prompts about {found.subjects} subjects, in {config.sisa.shards} shards",
        _line(found.best),
        *([_line(found.auto) + "  (auto)"] if found.auto else []),
        "for the run file:",
        f"  sisa: {{aggregation: {{method: routed, min_score: {found.best.min_score}}}}}",
    ]
    return Result(asdict(found), lines)


def _line(of: Errors) -> str:
    shares = [f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in (of.refused, of.sent)]
    return (
        f"min_score {of.min_score}: new questions about held subjects refused {shares[0]}, "
        f"questions about deleted subjects sent to a shard {shares[1]}"
    )
