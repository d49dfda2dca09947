"""Check a model and keep it in order: `sisa verify`, `sweep`, `gc`, `doctor`, `metrics`, `ledger`.

The strings that `sweep` looks for are never printed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    executor_option,
    ids_options,
    model_option,
    opened,
)
from cluster.cli.input_files import read_lines
from cluster.observe.curves import points, summary, to_mlflow, to_tensorboard
from cluster.render.deletions import old_versions
from cluster.render.result import EXIT_INTEGRITY, Result, counted
from sisa.core.domain import DeviceName, Dtype, Precision, WitnessHead
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.audit.doctor import Diagnosis
    from sisa.audit.garbage import Collected
    from sisa.audit.repair import RepairOutcome
    from sisa.audit.residue import Scan
    from sisa.audit.verify import Replay, Verification
    from sisa.evidence.attestations import Stated
    from sisa.lm.train.self_test import Numerics


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


@command("gc", "-m model --dry-run")
@model_option
@click.option("--dry-run", is_flag=True, help="List what would be removed; change nothing.")
@click.option(
    "--lost-exports",
    is_flag=True,
    help="Give up stale exports that can't be found; you vouch that they are gone.",
)
def gc(directory: Path, dry_run: bool, lost_exports: bool) -> Result:
    """Remove files that are retired or unknown to the ledger."""
    from sisa.audit.garbage import collect_garbage

    if dry_run and lost_exports:
        raise click.UsageError("give one of --dry-run and --lost-exports")
    with opened(directory) as model:
        return collected(collect_garbage(model, dry_run=dry_run, lost_exports=lost_exports))


def collected(found: Collected) -> Result:
    num_bytes = sum(each.num_bytes for each in found.items)
    outcome = f"{found.removed} removed, {found.removed_bytes:,} bytes"
    kept = old_versions(found.old_versions_kept)
    if found.dry_run:
        outcome = "nothing was changed"
        kept = [f"old versions in the bucket: {e.where} ({e.why})" for e in found.old_versions_kept]
    lines = [
        f"retired or unknown files and directories: {len(found.items)}, {num_bytes:,} bytes",
        *(
            f"  {each.num_bytes:12,}  {each.path}: {each.reason}{'' if each.removable else '  (kept)'}"
            for each in found.items
        ),
        outcome,
        *(f"given up: the export {path}" for path in found.given_up),
        *kept,
    ]
    return Result(asdict(found), lines)


@command("doctor", "-m model")
@click.option("-m", "--model", "directory", type=PATH, help="Model directory.")
@click.option("--repair", is_flag=True, help="Repair what can be derived again.")
@click.option(
    "--numerics",
    is_flag=True,
    help="Test whether this machine trains the same bytes twice; needs no model.",
)
@click.option(
    "--device", type=click.Choice(get_args(DeviceName)), help="Device to test; cpu by default."
)
@click.option(
    "--dtype", type=click.Choice(get_args(Dtype)), help="Data type of the base; float32 by default."
)
@executor_option
def doctor(
    directory: Path | None,
    repair: bool,
    numerics: bool,
    device: DeviceName | None,
    dtype: Dtype | None,
    executor: ExecutorChoice,
) -> Result:
    """Diagnose a model directory. --repair repairs it; --numerics tests this machine instead."""
    if numerics:
        return _numerics(directory, repair, device, dtype)
    if device or dtype:
        raise click.UsageError("--device and --dtype need --numerics")
    if directory is None:
        raise click.UsageError("Missing option '-m' / '--model'.")
    from sisa.audit.doctor import diagnose

    found = diagnose(directory)
    if not repair or found.unopenable:
        return diagnosed(found)
    from sisa.audit.repair import repair as repair_model

    with opened(directory, executor) as model:
        return repaired(repair_model(model))


def _numerics(
    directory: Path | None, repair: bool, device: DeviceName | None, dtype: Dtype | None
) -> Result:
    """Test a model's threads, device and dtype, or one thread on the given device and dtype."""
    from sisa.lm.train.self_test import check

    if repair:
        raise click.UsageError("give one of --repair and --numerics")
    if directory is None:
        return tested(check(threads=1, precision=Precision(device or "cpu", dtype or "float32")))
    if device or dtype:
        raise click.UsageError("--model sets the device and dtype: leave out --device and --dtype")
    with opened(directory) as model:
        config = model.config
        return tested(check(threads=config.sisa.threads_per_shard, precision=config.precision))


def diagnosed(found: Diagnosis) -> Result:
    lines = [f"{found.directory}: {_verdict(found)}"]
    for each in found.findings:
        lines.append(f"  {each.severity:7}  {each.where}: {each.what}")
        lines.append(f"           next step: {each.next_step}")
    body = {"directory": found.directory, "ok": found.ok, "healthy": found.healthy}
    return Result(body | {"findings": _findings(found)}, lines, 0 if found.ok else EXIT_INTEGRITY)


def _findings(found: Diagnosis) -> list[dict[str, Any]]:
    names = ("kind", "severity", "where", "what", "repair", "next_step")
    rows = [{name: getattr(each, name) for name in names} for each in found.findings]
    return [row | {"repair": row["repair"] or None} for row in rows]


def _verdict(found: Diagnosis) -> str:
    if found.healthy:
        return "healthy"
    errors = sum(each.severity == "error" for each in found.findings)
    return f"{counted(errors, 'error')}, {counted(len(found.findings) - errors, 'warning')}"


def repaired(found: RepairOutcome) -> Result:
    after = diagnosed(found.after)
    done = [f"found: {_verdict(found.before)}", *(f"  {each}" for each in found.done), "now:"]
    body = after.json | {"done": list(found.done), "findings_before": _findings(found.before)}
    return Result(body, [*done, *after.lines], after.exit_code)


def tested(found: Numerics) -> Result:
    """Render the result of a numerics test: whether the machine trains the same bytes twice."""
    details = found.description
    processor = details["processor"]
    lines = [
        f"fingerprint {found.fingerprint}",
        f"  {details['device']}, {details['dtype']}, threads: {details['threads']}",
        f"  {processor['machine']}, {processor['model']}",
        *(f"  {name}: {value}" for name, value in (details.get("gpu") or {}).items()),
        "  " + ", ".join(f"{name} {version}" for name, version in details["libraries"].items()),
        *(f"  {name}={value}" for name, value in details["settings"].items() if value is not None),
    ]
    if found.repeats:
        lines.append(f"repeats itself: {len(found.digests)} trainings gave {found.digests[0]}")
    else:
        lines.append("DOES NOT REPEAT ITSELF: do not train here. The trainings gave")
        lines += [f"  {each}" for each in found.digests]
    body = asdict(found) | {"repeats": found.repeats}
    return Result(body, lines, 0 if found.repeats else EXIT_INTEGRITY)


@command("metrics", "-m model --to tensorboard my-board")
@model_option
@click.option(
    "--to",
    "target",
    type=(click.Choice(["tensorboard", "mlflow"]), str),
    metavar="TOOL PLACE",
    help="Send the curves to a tool: `tensorboard DIRECTORY`, or `mlflow URI`.",
)
@click.option("--run", "named", multiple=True, help="Only this run. Repeatable.")
def metrics(directory: Path, target: tuple[str, str] | None, named: tuple[str, ...]) -> Result:
    """Show what each run measured. --to sends it to TensorBoard or MLflow."""
    from sisa.store.areas import METRICS
    from sisa.store.metrics import FileMetrics

    with opened(directory):
        held = FileMetrics(directory / METRICS)
    runs = {run: held.read(run) for run in named or held.runs()}
    found = [{"run": run, **summary(lines)} for run, lines in runs.items()]
    shown = [_run_row(each) for each in found] or ["nothing was measured yet"]
    if target is not None:
        tool, place = target
        curves = {run: points(lines) for run, lines in runs.items()}
        if tool == "tensorboard":
            to_tensorboard(Path(place), curves)
        else:
            to_mlflow(place, directory.resolve().parent.name or "sisa", curves)
        shown.append(f"{counted(len(runs), 'run')} written to {tool}, {place}")
    return Result({"runs": found, "passed_on": list(target) if target else None}, shown)


def _run_row(of: dict[str, Any]) -> str:
    facts = [counted(of["slices_trained"], "slice"), counted(of["tokens"], "token")]
    if of["tokens_per_second"] is not None:
        facts.append(f"{of['tokens_per_second']:.0f} tok/s a worker")
    if of["last_loss"] is not None:
        facts.append(f"last loss {of['last_loss']:.4f}")
    if of["deletions"]:
        facts.append(counted(of["deletions"], "deletion"))
    if of["erasure_failures"]:
        facts.append(f"{counted(of['erasure_failures'], 'erasure')} FAILED")
    return f"{of['run']}: {', '.join(facts)}"


ledger = command_group("ledger", "Move the ledger to a server and back; bring up an older one.")


@command("move", "-m model --to postgresql://db.example/models", group=ledger)
@model_option
@click.option("--to", required=True, help="postgresql://HOST/DATABASE, without a password; or `file`.")
def move(directory: Path, to: str) -> Result:
    """Move the ledger to PostgreSQL, or back to a file; compare every row, then erase the old one."""
    from sisa.config.fields import ledger_url
    from sisa.flows.wiring.moving import move_ledger

    try:
        url = None if to == "file" else ledger_url(to)
    except ValueError as error:
        raise InvalidInput(str(error), where="--to") from None
    moved = move_ledger(directory, url)
    lines = [
        f"moved {sum(moved.rows.values()):,} rows of {counted(len(moved.rows), 'table')}, all compared:",
        f"  from {moved.before} (erased)",
        f"  to   {moved.now}",
        f"write into the run file: `ledger: {url or 'null'}`",
    ]
    return Result(asdict(moved), lines)


@command("upgrade", "-m model", group=ledger)
@model_option
def upgrade(directory: Path) -> Result:
    """Bring the ledger of an earlier version up to this one. Earlier versions can't open it then."""
    from sisa.flows.wiring.moving import upgrade_model

    place, older = upgrade_model(directory)
    change = "brought up to this version" if older else "is of this version: nothing was changed"
    return Result({"ledger": place, "upgraded": older}, [f"{place}: {change}"])
