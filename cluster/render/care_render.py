"""How `gc`, `sweep` and `doctor` read: the JSON contract, and the same in words.

Rules: as `render.py`. Paths are shown; strings that were looked for are not.

Not covered: arguments (`care_cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.render.render import EXIT_INTEGRITY, Result, old_versions, printable

if TYPE_CHECKING:
    from sisa.audit.doctor import Diagnosis
    from sisa.audit.findings import Finding
    from sisa.audit.garbage import Collected
    from sisa.audit.repair import RepairOutcome
    from sisa.audit.residue import Scan
    from sisa.lm.train.self_test import Numerics


def collected(found: Collected) -> Result:
    num_bytes = sum(each.num_bytes for each in found.items)
    lines = [f"{len(found.items)} files and directories are retired or unknown, {num_bytes:,} bytes"]
    for each in found.items:
        kept = "" if each.removable else "  (kept)"
        lines.append(f"  {each.num_bytes:12,}  {each.path}: {each.reason}{kept}")
    if found.dry_run:
        lines.append("nothing was changed")
    else:
        lines.append(f"{found.removed} removed, {found.removed_bytes:,} bytes")
    lines += [f"given up: the export {path}" for path in found.given_up]
    if found.dry_run:
        lines += [f"old versions in the bucket: {each.where} ({each.why})" for each in found.kept]
    else:
        lines += old_versions(found.kept)
    return Result(asdict(found), printable("\n".join(lines)))


def scanned(found: Scan) -> Result:
    counts = found.scanned
    lines = [
        f"scanned {counts['files']} files, {counts['bytes']:,} bytes, in {len(found.places)} places:",
        f"  {counts['checkpoints']} checkpoints, {counts['rows']} rows, {counts['vectors']} vectors, "
        f"{counts['adapters']} exported adapters, {counts['strings']} strings looked for",
    ]
    if shredded := counts["shredded"]:
        lines.append(f"  {shredded} encrypted files that no held key opens")
    if short := counts["strings_too_short_for_raw_bytes"]:
        lines.append(f"  {short} of the strings are too short for raw bytes: compared with values alone")
    lines += [
        f"  - {each.where}{', ' + each.position if each.position else ''}: {each.what}"
        for each in found.residue
    ]
    lines += [f"  outdated, yet clean: {path}" for path in found.outdated_exports]
    lines.append("clean: no residue" if found.clean else f"RESIDUE: {len(found.residue)} places")
    return Result(asdict(found), printable("\n".join(lines)), 0 if found.clean else EXIT_INTEGRITY)


def _findings(findings: Sequence[Finding]) -> tuple[list[dict[str, Any]], list[str]]:
    body = [
        {
            "kind": each.kind,
            "severity": each.severity,
            "where": each.where,
            "what": each.what,
            "repair": each.repair or None,
            "next_step": each.next_step,
        }
        for each in findings
    ]
    lines = []
    for each in findings:
        lines.append(f"  {each.severity:7}  {each.where}: {each.what}")
        lines.append(f"           next step: {each.next_step}")
    return body, lines


def diagnosed(found: Diagnosis) -> Result:
    body, lines = _findings(found.findings)
    text = [f"{found.directory}: {_verdict(found)}", *lines]
    whole = {"directory": found.directory, "ok": found.ok, "healthy": found.healthy, "findings": body}
    return Result(whole, printable("\n".join(text)), 0 if found.ok else EXIT_INTEGRITY)


def _verdict(found: Diagnosis) -> str:
    if found.healthy:
        return "healthy"
    errors = sum(each.severity == "error" for each in found.findings)
    warnings = len(found.findings) - errors
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"


def repaired(found: RepairOutcome) -> Result:
    before, _ = _findings(found.before.findings)
    after = diagnosed(found.after)
    text = [f"found: {_verdict(found.before)}", *(f"  {each}" for each in found.done), "now:"]
    body = after.json | {"done": list(found.done), "findings_before": before}
    return Result(body, printable("\n".join([*text, after.text])), after.exit_code)


def tested(found: Numerics) -> Result:
    """How the machine repeats itself."""
    body = {
        "fingerprint": found.fingerprint,
        "description": dict(found.description),
        "digests": list(found.digests),
        "repeats": found.repeats,
    }
    said = found.description
    processor = said["processor"]
    lines = [
        f"fingerprint {found.fingerprint}",
        f"  {said['device']}, {said['dtype']}, threads: {said['threads']}",
        f"  {processor['machine']}, {processor['model']}",
        *(f"  {name}: {value}" for name, value in (said.get("gpu") or {}).items()),
        "  " + ", ".join(f"{name} {version}" for name, version in said["libraries"].items()),
        *(f"  {name}={value}" for name, value in said["settings"].items() if value is not None),
    ]
    if found.repeats:
        lines.append(f"repeats itself: {len(found.digests)} trainings gave {found.digests[0]}")
    else:
        lines.append("DOES NOT REPEAT ITSELF: do not train here. The trainings gave")
        lines += [f"  {each}" for each in found.digests]
    return Result(body, printable("\n".join(lines)), 0 if found.repeats else EXIT_INTEGRITY)
