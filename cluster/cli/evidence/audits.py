"""Check a model for others, or without it: `sisa audit`, `sisa rebuild`."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import PATH, ExecutorChoice, command, executor_option, model_option, opened
from cluster.cli.evidence.log import cosigner_option
from cluster.cli.evidence.published import evidence_in, public_keys_option, read_public_keys
from cluster.cli.input_files import read_bytes
from cluster.observe.reporting import watched
from cluster.render.result import EXIT_INTEGRITY, Result, counted

if TYPE_CHECKING:
    from sisa.evidence.audit import Audit
    from sisa.evidence.rebuild import Rebuild


SEED_BYTES = 8


@command("audit", "-m model --sample 2 --seed 'a coin toss' -o audit.json")
@model_option
@click.option(
    "--sample", default=1, type=click.IntRange(0), help="Number of shards to train again and compare."
)
@click.option("--seed", help="Draws the shards; by default a random one, which is shown.")
@click.option("--key", "key_file", type=PATH, help="Public keys that you hold, not the published.")
@click.option(
    "--seen", type=PATH, multiple=True, help="A checkpoint of the log that you kept. Repeatable."
)
@cosigner_option
@click.option("-o", "--output", type=PATH, help="File for the signed report.")
@executor_option
def audit(
    directory: Path,
    sample: int,
    seed: str | None,
    key_file: Path | None,
    seen: tuple[Path, ...],
    cosigners: tuple[str, ...],
    output: Path | None,
    executor: ExecutorChoice,
) -> Result:
    """Check all evidence and a drawn sample; sign a report."""
    from sisa.evidence.audit import audit_model
    from sisa.store.blobs.files import write_atomic

    seed = seed if seed is not None else secrets.token_hex(SEED_BYTES)
    public = None if key_file is None else read_public_keys(key_file)
    kept = [read_bytes(each) for each in seen]
    with opened(directory, executor) as model:
        found = audit_model(model, sample, seed, public=public, kept=kept, cosigners=cosigners)
    if output is not None and found.envelope:
        write_atomic(output, found.envelope)
    return audited(found, output)


def audited(found: Audit, output: Path | None) -> Result:
    shards = ", ".join(map(str, found.shards)) or "none"
    lines = [f"model {found.model}, seed {found.seed}: shards drawn: {shards}"]
    for each in found.checks:
        lines.append(f"  {each.result:7}  {each.name}{': ' + each.skipped if each.skipped else ''}")
        lines += [f"           {problem.where}: {problem.what}" for problem in each.findings]
    if not found.envelope:
        lines.append("NOT SIGNED: the model has no keys (`sisa keys init`)")
    else:
        lines.append(f"signed: entry {found.index} of the log" + (f", {output}" if output else ""))
    lines.append("PASSED" if found.passed else "FAILED")
    report = str(output) if output and found.envelope else None
    signed = {"signed": bool(found.envelope), "entry": found.index, "report": report}
    return Result(found.facts | signed, lines, 0 if found.passed else EXIT_INTEGRITY)


@command(
    "rebuild",
    "certificate.json --key keys.json --run run.yaml --records remaining.jsonl "
    "--partition-key partition.key --sign-with mine.pem -o rebuild.json",
)
@click.argument("certificate", type=PATH)
@public_keys_option
@click.option("--run", "run_file", required=True, type=PATH, help="The model's run file.")
@click.option("--records", required=True, type=PATH, help="File of the records that remain.")
@click.option(
    "--partition-key",
    "secret",
    required=True,
    type=PATH,
    help="The model's secret, which places records. Keep it as secret as the records.",
)
@click.option("--sign-with", "own_key", type=PATH, help="Your own private key, Ed25519 in PEM.")
@click.option("-o", "--output", type=PATH, help="File for your signed statement.")
@click.option(
    "--shard",
    "shards",
    multiple=True,
    type=click.IntRange(0),
    help="Shards to train, instead of those that the request touched. Repeatable.",
)
@click.option("--directory", type=PATH, help="Where to train, and go on; by default it is erased.")
@executor_option
def rebuild(
    certificate: Path,
    key_file: Path,
    run_file: Path,
    records: Path,
    secret: Path,
    own_key: Path | None,
    output: Path | None,
    shards: tuple[int, ...],
    directory: Path | None,
    executor: ExecutorChoice,
) -> Result:
    """Train certified shards again, without the model."""
    from sisa.evidence.keys.signing import read_private_key, sign_as
    from sisa.evidence.rebuild import rebuild as train_again
    from sisa.evidence.rebuild import rebuild_statement
    from sisa.store.blobs.files import write_atomic
    from sisa.store.blobs.temporary_directories import temporary_directory
    from sisa.verifier.certificate import verify_certificate

    if (own_key is None) != (output is None):
        raise click.UsageError("--sign-with and --output belong together")
    private = None if own_key is None else read_private_key(own_key)
    keys = read_public_keys(key_file)
    with evidence_in(certificate):
        checked = verify_certificate(read_bytes(certificate), keys)
    with ExitStack() as stack:
        place = directory or stack.enter_context(temporary_directory())
        report = stack.enter_context(watched())
        found = train_again(checked, shards, run_file, records, secret, place, executor, report)
    if private is not None and output is not None:
        made = rebuild_statement(found, checked, datetime.now(UTC).isoformat(timespec="seconds"))
        envelope, pem = sign_as(made, private)
        write_atomic(output, envelope)
        write_atomic(output.with_suffix(".pub.pem"), pem)
    return rebuilt(found, checked.sha256, output)


def rebuilt(found: Rebuild, certificate: str, output: Path | None) -> Result:
    failed = found.verdict in ("other procedure", "differs")
    lines = [
        f"certificate {certificate}",
        *(f"shard {each.shard}: {each.verdict}" for each in found.shards),
        f"{counted(found.num_records, 'record')}, fingerprint {found.fingerprint[:16]}: {found.verdict}",
    ]
    if found.verdict == "other procedure":
        lines.append(
            f"records, run file, partition key or base are not those of the certificate: "
            f"{found.num_certified} records remained, and the file has {found.num_given}"
        )
    if output is not None:
        lines.append(f"signed: {output}, by the key in {output.with_suffix('.pub.pem')}")
    shards = [asdict(each) | {"verdict": each.verdict} for each in found.shards]
    body = {
        "certificate": certificate,
        "verdict": found.verdict,
        "fingerprint": found.fingerprint,
        "num_records": found.num_records,
        "num_given": found.num_given,
        "num_certified": found.num_certified,
        "shards": shards,
        "statement": str(output) if output else None,
        "public_key": str(output.with_suffix(".pub.pem")) if output else None,
    }
    return Result(body, lines, EXIT_INTEGRITY if failed else 0)
