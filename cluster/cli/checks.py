"""Check a model and log the result: `sisa verify` and `sisa sweep`.

The strings that `sweep` looks for are never printed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    executor_option,
    ids_options,
    model_option,
    opened,
)
from cluster.cli.input_files import read_lines
from cluster.render.result import EXIT_INTEGRITY, Result, counted
from sisa.core.domain import WitnessHead

if TYPE_CHECKING:
    from sisa.audit.residue import Scan
    from sisa.audit.verify import Replay, Verification
    from sisa.evidence.attestations import Stated


def _event_head(_context: click.Context, _option: click.Parameter, given: Any) -> WitnessHead | None:
    """Parse the head of an event log as `sisa status` prints it."""
    if given is None:
        return None
    if not (found := re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", given)):
        raise click.BadParameter("expected the number of events, a colon and the head's 64 digits")
    return WitnessHead(found[2], int(found[1]))


@command("verify", "-m model --replay all")
@model_option
@click.option(
    "--replay",
    type=click.Choice(["none", "sample", "all"]),
    default="none",
    help="Shards to train from scratch and compare byte for byte.",
)
@click.option("--shard", type=click.IntRange(0), help="Replay this shard alone.")
@click.option("--require-replay", is_flag=True, help="Fail (exit code 4) if a shard cannot be replayed.")
@click.option(
    "--anchor",
    metavar="N:HEAD",
    callback=_event_head,
    help="Head of the event log as `sisa status` printed it; fail unless the history continues it.",
)
@executor_option
def verify(
    directory: Path,
    replay: Replay,
    shard: int | None,
    require_replay: bool,
    anchor: WitnessHead | None,
    executor: ExecutorChoice,
) -> Result:
    """Check every stored byte. --replay trains again, compares, and logs the result."""
    if replay == "none" and (shard is not None or require_replay):
        replay = "sample"
    with opened(directory, executor) as model:
        if replay == "none":
            return verified(model.verify(anchor=anchor))
        from sisa.evidence.attestations import verify_and_log

        found, result = verify_and_log(
            model, replay, shard, require_replay=require_replay, anchor=anchor
        )
        return stated(verified(found), result)


def verified(found: Verification) -> Result:
    from sisa.audit.verify import NOT_REQUESTED

    lines = [
        f"{counted(found.files_checked, 'file')} checked, "
        f"{counted(found.vectors_embedded, 'text')} embedded again, "
        f"{counted(len(found.findings), 'finding')}"
    ]
    lines += [f"  - {each.where}: {each.what}" for each in found.findings]
    for each in found.shards:
        if each.replayed:
            outcome = "equal, byte for byte" if each.equal else "DIFFERENT"
            stages = counted(each.stages, "stage")
            lines.append(f"shard {each.shard}: {stages} trained from scratch: {outcome}")
            if each.equal_apart is not None:
                outcome = "equal, byte for byte" if each.equal_apart else "DIFFERENT"
                lines.append(f"shard {each.shard}: each stage in a process of its own: {outcome}")
        elif each.reason != NOT_REQUESTED:
            lines.append(f"shard {each.shard}: not replayed ({each.reason})")
    if left := sum(each.reason == NOT_REQUESTED for each in found.shards):
        lines.append(f"{counted(left, 'shard')} not replayed ({NOT_REQUESTED})")
    if not found.replayed:
        lines.append(
            "nothing was replayed: this does not show that training gives these weights; "
            "`--replay sample` or `all` does"
        )
    lines.append("ok" if found.ok else "NOT OK")
    code = 0 if found.ok else EXIT_INTEGRITY
    return Result({**asdict(found), "replayed": found.replayed}, lines, code)


@command("sweep", "-m model p001-q1 --also exported-adapters")
@model_option
@ids_options
@click.option(
    "--text-file", type=PATH, help="File with texts to look for (in all records), one on each line."
)
@click.option(
    "--also", multiple=True, type=PATH, help="Also search here, such as an export. Repeatable."
)
def sweep(directory: Path, ids: list[str], text_file: Path | None, also: tuple[Path, ...]) -> Result:
    """Prove that no deleted record left a trace. Otherwise list the traces."""
    from sisa.evidence.attestations import sweep_and_log

    ids = list(dict.fromkeys(ids))
    lines = read_lines(text_file) if text_file else []
    texts = list(dict.fromkeys(line.strip() for line in lines))
    with opened(directory) as model:
        found, result = sweep_and_log(model, also=also, ids=ids, texts=texts)
        return stated(scanned(found), result)


def scanned(found: Scan) -> Result:
    counts = found.scanned
    lines = [
        f"scanned {counted(counts['files'], 'file')}, {counts['bytes']:,} bytes, "
        f"in {counted(len(found.places), 'place')}:",
        f"  {counted(counts['checkpoints'], 'checkpoint')}, {counted(counts['rows'], 'row')}, "
        f"{counted(counts['vectors'], 'vector')}, {counted(counts['adapters'], 'exported adapter')}; "
        f"searched for {counted(counts['strings'], 'string')}",
    ]
    if shredded := counts["shredded"]:
        lines.append(f"  {counted(shredded, 'encrypted file')} that no held key opens")
    if short := counts["strings_too_short_for_raw_bytes"]:
        lines.append(f"  {counted(short, 'string')} too short for raw bytes: compared with values alone")
    lines += [
        f"  - {each.where}{', ' + each.position if each.position else ''}: {each.what}"
        for each in found.residue
    ]
    lines += [f"  outdated, yet clean: {path}" for path in found.outdated_exports]
    lines += ["clean: no residue" if found.clean else f"RESIDUE: {counted(len(found.residue), 'place')}"]
    return Result(asdict(found), lines, 0 if found.clean else EXIT_INTEGRITY)


def stated(done: Result, found: Stated) -> Result:
    """Add to a check's result its entry in the model's log; the verdict stays the last line."""
    body = {**done.json, "entry": found.entry, "not_logged": found.not_logged}
    return replace(done, json=body, lines=[*done.lines[:-1], logged(found), *done.lines[-1:]])


def logged(found: Stated) -> str:
    """Return where a result stands in the log, or why it does not."""
    if found.entry is None:
        return f"not logged: {found.not_logged}"
    return f"logged: entry {found.entry}, {found.result}"
