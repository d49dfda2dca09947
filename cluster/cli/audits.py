"""Let others check a model: reports, audits, rebuilds, and feeds of revoked adapters."""

from __future__ import annotations

import json
import secrets
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    evidence_in,
    executor_option,
    logged_statements,
    model_option,
    opened,
    public_keys_option,
    read_bytes,
    read_public_keys,
)
from cluster.cli.evidence import cosigner_option, log
from cluster.observe.reporting import watched
from cluster.render.render import EXIT_INTEGRITY, EXIT_REVOKED, Result, counted
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.evidence.audit import Audit
    from sisa.evidence.rebuild import Rebuild
    from sisa.verifier.envelope import PublicKeys

SEED_BYTES = 8


@command("report", "-m model --html report.html")
@model_option
@click.option("--html", "target", type=PATH, help="File to write; one that exists is replaced.")
@click.option("--made-by", default="", show_default=False, help="Who makes the report; shown as given.")
def report(directory: Path, target: Path | None, made_by: str) -> Result:
    """Make one page for a privacy officer.

    It shows requests, certificates, lineage, costs, and what is covered.
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


revocations = command_group("revocations", "Inform holders of copies which adapters are revoked.")


@command("publish", "-m model", group=revocations)
@model_option
@click.option(
    "-o",
    "--output",
    "target",
    type=PATH,
    help="File to write; by default revocations.json beside the log.",
)
@click.option("--days", default=7, type=click.IntRange(1, 366), help="Days after which it is refused.")
def publish_feed(directory: Path, target: Path | None, days: int) -> Result:
    """Sign the feed of all adapters that deletions revoked."""
    from sisa.evidence.revocations import publish

    with opened(directory) as model:
        found = publish(model, target, days)
    lines = [
        f"feed      {found.feed}",
        f"number    {found.sequence}, valid until {found.next_update}",
        f"revoked   {counted(found.revoked, 'adapter')}, {found.pending} of them by deletions that are "
        "not certified yet",
    ]
    return Result(asdict(found), lines)


@command("check-adapter", "adapters/v1/shard-00000 --feed revocations.json --key keys.json")
@click.argument("held", metavar="DIRECTORY", type=PATH)
@click.option("--feed", "feed_file", required=True, type=PATH, help="The newest feed of revocations.")
@public_keys_option
@click.option(
    "--not-older-than",
    "seen",
    metavar="NUMBER|FEED",
    help="Number of a feed, or a feed that you kept: refuse one that is behind it.",
)
@click.option("--log", metavar="DIR|URL", help="The published log: the feed must be complete.")
def check_held(held: Path, feed_file: Path, key_file: Path, seen: str | None, log: str | None) -> Result:
    """Check offline whether copies of adapters must go. Exit with 7 if a deletion revoked one."""
    from sisa.evidence.keys.model_signature import signed_weights
    from sisa.verifier.feed import check_adapter, check_present, verify_feed

    if not held.exists():
        raise InvalidInput(
            "there is nothing to check", where=str(held), expected="a directory or a file"
        )
    keys = read_public_keys(key_file)
    feed = verify_feed(read_bytes(feed_file), keys)
    least_sequence, kept = 0, None
    if seen is not None and seen.isdecimal():
        least_sequence = int(seen)
    elif seen is not None:
        kept = verify_feed(read_bytes(Path(seen)), keys)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    check_present(feed, now, least_sequence, kept)
    if log is not None:
        _check_complete(feed, log, keys)
    files = check_adapter(held.resolve() if held.is_dir() else held, feed)
    revoked = {
        path: feed["revoked"][sha256] for path, sha256 in files.items() if sha256 in feed["revoked"]
    }
    signed = [] if revoked else signed_weights(files, keys.exports)
    return checked(feed, files, revoked, signed)


def _check_complete(feed: dict[str, Any], log: str, keys: PublicKeys) -> None:
    """Raise Refused if a certificate in a published log revokes an adapter that the feed lacks."""
    from sisa.verifier.certificate import CERTIFICATES
    from sisa.verifier.envelope import Refused

    num_entries, statements = logged_statements(log, keys)
    known = {*feed["revoked"], *map(str, feed["reinstated"])}
    for certificate, statement in statements:
        if statement["predicateType"] not in CERTIFICATES:
            continue
        revokes = statement["predicate"].get("revokes")
        if not isinstance(revokes, list) or not known.issuperset(map(str, revokes)):
            raise Refused(
                "the feed does not name what a certificate in the log revokes",
                where=f"certificate {certificate}",
                expected=f"a feed of {num_entries} entries, without gaps",
                got=f"a feed of {feed['sequence']} entries",
                next_step="get the newest feed; if this is it, keep it and the log: they contradict",
            )


def checked(
    feed: dict[str, Any], files: dict[str, str], revoked: dict[str, dict[str, str]], signed: list[str]
) -> Result:
    """Render which weights files were revoked, and which of the others have the signed bytes."""
    lines, rows = [], []
    for path, sha256 in files.items():
        by = revoked.get(path)
        if by is None:
            lines.append(
                f"not revoked  {path}" + (", as exported (model.sig)" if path in signed else "")
            )
        else:
            certificate = f"certificate {by['certificate']}"
            named = certificate if by["certificate"] else "a deletion that is not certified yet"
            lines.append(f"REVOKED      {path}: by {named} on {by['date']}: delete it, and copies of it")
        row = {"path": path, "sha256": sha256, "revoked": by is not None, "signed": path in signed}
        rows.append(row | {name: by[name] if by else None for name in ("certificate", "date")})
    facts = {name: feed[name] for name in ("model", "sequence", "published", "next_update")}
    number, until = counted(len(feed["revoked"]), "adapter"), f"valid until {feed['next_update']}"
    lines.append(f"feed {feed['sequence']} of {feed['published']}, {until}: {number} revoked")
    return Result(
        {"revoked": bool(revoked), "files": rows, **facts}, lines, EXIT_REVOKED if revoked else 0
    )


@command("audit", "-m model --sample 2 --seed 'a coin toss' -o audit.json")
@model_option
@click.option(
    "--sample", default=1, type=click.IntRange(0), help="Number of shards to train again and compare."
)
@click.option("--seed", help="Draws the shards; by default a random one, which is shown.")
@click.option("--key", "key_file", type=PATH, help="Public keys that you hold, not the published.")
@click.option("--seen", type=PATH, multiple=True, help="A checkpoint of the log that you kept.")
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
    checks = [asdict(each) | {"result": each.result} for each in found.checks]
    body: dict[str, Any] = {
        **{name: getattr(found, name) for name in ("model", "at", "seed", "sample", "passed")},
        "shards": list(found.shards),
        "checks": checks,
        "signed": bool(found.envelope),
        "entry": found.index,
        "report": str(output) if output and found.envelope else None,
    }
    return Result(body, lines, 0 if found.passed else EXIT_INTEGRITY)


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
    help="Not those that the request touched.",
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
    from sisa.store.blobs.files import temporary_directory, write_atomic
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


@command("add-rebuild", "-m model rebuild.json --public-key rebuild.pub.pem", group=log)
@model_option
@click.argument("file", type=PATH)
@click.option(
    "--public-key",
    required=True,
    type=PATH,
    help="Public key of the second party, in PEM.",
)
def log_rebuild(directory: Path, file: Path, public_key: Path) -> Result:
    """Log what a second party's rebuild found."""
    from sisa.evidence.keys.signing import read_public_key
    from sisa.evidence.rebuild import add_rebuild

    key = read_public_key(public_key)
    with opened(directory) as model:
        index = add_rebuild(model, read_bytes(file), key)
    return Result({"entry": index, "keyid": key.keyid}, [f"entry {index}, signed by {key.keyid}"])
