"""Hand out certificates and receipts, check them, and rectify records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import (
    PATH,
    STANDARD_INPUT,
    ExecutorChoice,
    command,
    command_group,
    executor_option,
    model_option,
    opened,
    read_bytes,
    read_text,
)
from cluster.render.render import Result, counted

if TYPE_CHECKING:
    from sisa.evidence.hook import Logged
    from sisa.verifier.certificate import Certificate
    from sisa.verifier.envelope import PublicKeys

TIMES = ("received", "approved", "committed", "erased", "completed")
certificate = command_group("certificate", "Show, export and issue certificates of deletions.")
stated_argument = click.argument("name", metavar="REQUEST")
output_option = click.option("-o", "--output", "target", required=True, type=PATH, help="File to write.")


@command("list", "-m model", group=certificate)
@model_option
def list_certificates(directory: Path) -> Result:
    """List what is stated in the log, and the requests whose certificates are pending."""
    from sisa.evidence.issued import issued

    with opened(directory) as model:
        found = issued(model)
    lines = [_line(each) for each in found.logged] or ["nothing is stated yet"]
    lines += [f"pending: {each}" for each in found.pending]
    body = {"statements": [asdict(each) for each in found.logged], "pending": list(found.pending)}
    return Result(body, lines)


def _line(each: Logged) -> str:
    from sisa.verifier.certificate import URN

    about = f"  {each.about}" if each.about else ""
    return f"{each.sequence:>5}  {each.kind.removeprefix(URN):<20} {each.sha256[:16]}{about}"


@command("show", "-m model T-17", group=certificate)
@model_option
@stated_argument
def show_certificate(directory: Path, name: str) -> Result:
    """Show the certificate of a request, or any statement by its sha256, in words."""
    from sisa.evidence.issued import certificate_file
    from sisa.evidence.keys import open_keys
    from sisa.verifier.certificate import verify_logged

    with opened(directory) as model:
        data, keys = certificate_file(model, name), open_keys(model.config, model.id)
    if keys is None:
        raise AssertionError("a model without keys has no certificates")
    return shown(verify_logged(data, keys.public))


@command("export", "-m model T-17 -o certificate.json", group=certificate)
@model_option
@stated_argument
@output_option
def export_certificate(directory: Path, name: str, target: Path) -> Result:
    """Write a certificate as a file that verifies with the public keys alone."""
    from sisa.evidence.issued import certificate_file

    with opened(directory) as model:
        return _written(target, certificate_file(model, name))


@command("issue", "-m model", group=certificate)
@model_option
def issue_certificates(directory: Path) -> Result:
    """Sign and log what is pending, after a signer or the log could not be reached."""
    from sisa.evidence.issued import issue

    with opened(directory) as model:
        found = issue(model)
    lines = [_line(each) for each in found] or ["nothing was pending"]
    return Result({"issued": [asdict(each) for each in found]}, lines)


@command("receipt", "-m model T-17 p001-q1 -o receipt.json")
@model_option
@stated_argument
@click.argument("record", metavar="ID")
@output_option
def write_receipt(directory: Path, name: str, record: str, target: Path) -> Result:
    """Write a receipt, which shows that a certificate is about this record, for its requester alone."""
    from sisa.evidence.issued import receipt_file

    if record == str(STANDARD_INPUT):  # others can see a command line
        record = read_text(STANDARD_INPUT).rstrip("\n")
    with opened(directory) as model:
        return _written(target, receipt_file(model, name, record))


def _written(target: Path, data: bytes) -> Result:
    from sisa.store.blobs.files import write_atomic

    write_atomic(target, data)
    return Result({"file": str(target), "num_bytes": len(data)}, [f"written: {target}"])


@command("verify-certificate", "certificate.json --key keys.json --log log")
@click.argument("file", type=PATH)
@click.option("--key", "keys", required=True, type=PATH, help="The model's public keys.")
@click.option("--receipt", type=PATH, help="A receipt: show that the certificate is about its record.")
@click.option("--log", "log", metavar="DIR|URL", help="The published log: check all of it.")
def verify_certificate_file(file: Path, keys: Path, receipt: Path | None, log: str | None) -> Result:
    """Check a certificate offline, without the model. Exit with 4 if it is refused."""
    from sisa.verifier.certificate import verify_certificate
    from sisa.verifier.envelope import parse_keys

    public = parse_keys(read_bytes(keys))
    given = None if receipt is None else read_bytes(receipt)
    found = verify_certificate(read_bytes(file), public, given)
    done = shown(found)
    statements = None if log is None else _check_log(log, read_bytes(file), public)
    lines = [f"valid: entry {found.index} of a log of {found.checkpoint.size}, signed by {public.model}"]
    lines += ["the receipt is of this certificate"] if receipt is not None else []
    lines += [f"the log holds: {counted(statements, 'statement')}"] if statements is not None else []
    body = {"ok": True, "receipt": receipt is not None, "log_statements": statements}
    return Result(body | done.json, [*lines, *done.lines])


def _check_log(where: str, certificate_file: bytes, keys: PublicKeys) -> int:
    """Check a whole log, which the certificate is in, and return its number of statements."""
    from sisa.evidence.log import check_log, published
    from sisa.verifier.certificate import verify_chain
    from sisa.verifier.note import parse_proof

    read, proof = published(where), json.loads(certificate_file)["proof"].encode()
    _, _, entries = check_log(read, keys.log, seen=[parse_proof(proof)[2]])
    return len(list(verify_chain(entries, read, keys)))


def shown(found: Certificate) -> Result:
    """Return a verified statement as JSON and in words."""
    body = {
        "type": found.kind,
        "sha256": found.sha256,
        "entry": found.index,
        "log_size": found.checkpoint.size,
        "statement": found.statement,
    }
    try:
        lines = list(_words(found))
    except (KeyError, TypeError, ValueError, AttributeError):  # signed, and of another form than ours
        lines = ["this version can't put the statement into words: --json prints it"]
    return Result(body, lines)


def _words(found: Certificate) -> Iterator[str]:
    from sisa.verifier.certificate import CHAINED, URN

    stated = found.statement["predicate"]
    yield f"{found.kind.removeprefix(URN)}  {found.sha256}"
    if found.kind in CHAINED:
        records, issued_at = stated["membership"]["num_records"], stated["issued_at"]
        yield f"  signed at {issued_at}; {counted(records, 'record')} remain"
        prints = stated["numerics"]["fingerprints"]
        heads = f"{counted(len(stated['served']), 'adapter')}, {counted(len(prints), 'fingerprint')}"
        yield f"  served: {heads}"
    if "request" in stated:
        yield from _deletion_words(stated)


def _deletion_words(stated: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a certificate says of its request, in the order in which it is asked for."""
    request, plan, checks = stated["request"], stated["plan"], stated["checks"]
    yield f"  request {request['id']} ({request['regime']}, due {request['due']})"
    times = {state: request["times"][state] for state in TIMES}
    yield f"  {', '.join(f'{state} {at}' for state, at in times.items() if at)}"
    yield f"  guarantee: {stated['guarantee']}"
    for each in stated["touched"]:
        slices = ", ".join(map(str, each["slices"]))
        yield f"  touched: shard {each['shard']}, slices {slices}"
    erased: Counter[str] = Counter()
    for each in stated["erased"]:
        erased[f"{each['what']} ({each['where']})"] += each["number"]
    yield from (f"  erased: {what}: {count}" for what, count in erased.items())
    for each in stated["remains"]:
        count = f"{each['number']} " if each["number"] else ""
        yield f"  remains: {count}{each['what']} ({each['where']}): {each['why']}"
    epochs = f"{plan['record_epochs_retrained']} of {plan['record_epochs_full']} record-epochs"
    yield f"  retrained: {epochs}, in {plan['seconds']} s"
    yield f"  sweep: {checks['sweep']}; replay: {checks['replay']}; probe: {stated['probe']['result']}"
    left = stated["exceptions"]
    yield f"  exports not found: {left['exports_not_found']}; legal holds: {stated['legal_holds']}"
    yield from (f"  old versions kept: {why}" for why in left["old_versions_kept"])
    if stated["live_patches"]:
        yield f"  approximate patches beneath: {len(stated['live_patches'])}"
    yield from (f"  covers: {each}" for each in stated["coverage"]["covers"])
    yield from (f"  does not cover: {each}" for each in stated["coverage"]["does_not_cover"])


@command("rectify", "-m model corrected.jsonl")
@model_option
@click.argument("file", type=PATH)
@executor_option
def rectify(directory: Path, file: Path, executor: ExecutorChoice) -> Result:
    """Replace held records by new versions of the same ids, exactly. One certificate states both."""
    with opened(directory, executor) as model:
        done = model.rectify(file)
    taken, request = done.taken, done.request
    lines = [f"replaced {counted(taken.added, 'record')}, {taken.already_held} unchanged"]
    lines += [f"  request {request.request_id}: {request.state}"] if request else []
    lines.append(f"  trained {counted(taken.slices_trained, 'slice')}; model {taken.model_digest[:16]}")
    body = {
        "request_id": request and request.request_id,
        "replaced": taken.added,
        "unchanged": taken.already_held,
        "slices_trained": taken.slices_trained,
        "record_epochs_trained": taken.record_epochs_trained,
        "model_digest": taken.model_digest,
    }
    return Result(body, lines)
