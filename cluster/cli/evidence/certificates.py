"""Show, issue and check certificates and receipts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import (
    PATH,
    command,
    command_group,
    model_option,
    opened,
    output_option,
    record_argument,
)
from cluster.cli.evidence.published import (
    evidence_in,
    keyid_line,
    logged_statements,
    public_keys_option,
    read_public_keys,
)
from cluster.cli.input_files import read_bytes
from cluster.render.result import Result, counted

if TYPE_CHECKING:
    from sisa.evidence.database import Logged
    from sisa.verifier.certificate import Certificate
    from sisa.verifier.envelope import Refused

TIMES = ("received", "approved", "committed", "erased", "completed")
ENDS = ("passed", "warned", "failed")  # of a check's tests
certificate = command_group("certificate", "Show, export and issue certificates of deletions.")
stated_argument = click.argument("name", metavar="REQUEST")


@command("list", "-m model", group=certificate)
@model_option
def list_certificates(directory: Path) -> Result:
    """List the statements in the log, and the requests whose certificates are pending."""
    from sisa.evidence.open_evidence import issued

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
    """Show the certificate of a request, or any statement by its sha256, in words.

    The checks in the log about the adapters that it names follow.
    """
    from sisa.evidence.keys.model_keys import keys_of
    from sisa.evidence.open_evidence import certificate_file, results_of_checks
    from sisa.verifier.certificate import verify_logged

    with opened(directory) as model:
        data, keys = certificate_file(model, name), keys_of(model)
        statements = results_of_checks(model)
    found = verify_logged(data, keys.public)
    checks = checks_about(found.statement, statements)
    return shown(found).with_more({"checks": checks}, _check_lines(found.statement, checks))


@command("export", "-m model T-17 -o certificate.json", group=certificate)
@model_option
@stated_argument
@output_option
def export_certificate(directory: Path, name: str, target: Path) -> Result:
    """Write a certificate as a file that verifies with the public keys alone."""
    from sisa.evidence.open_evidence import certificate_file

    with opened(directory) as model:
        return _written(target, certificate_file(model, name))


@command("issue", "-m model", group=certificate)
@model_option
def issue_certificates(directory: Path) -> Result:
    """Sign and log what is pending, after a signer or the log could not be reached."""
    from sisa.evidence.open_evidence import issue

    with opened(directory) as model:
        found = issue(model)
    lines = [_line(each) for each in found] or ["nothing was pending"]
    return Result({"issued": [asdict(each) for each in found]}, lines)


@command("provenance", "-m model", group=certificate)
@model_option
def state_provenance(directory: Path) -> Result:
    """State how the served adapters were trained, as SLSA Provenance. Log it, once."""
    from sisa.evidence.attestations import log_provenance

    with opened(directory) as model:
        found = log_provenance(model)
    return Result({"statements": [asdict(each) for each in found]}, [_line(each) for each in found])


@command("receipt", "-m model T-17 p001-q1 -o receipt.json")
@model_option
@stated_argument
@record_argument
@output_option
def write_receipt(directory: Path, name: str, record: str, target: Path) -> Result:
    """Write a receipt, which shows that a certificate is about this record, for its requester alone."""
    from sisa.evidence.open_evidence import receipt_file

    with opened(directory) as model:
        return _written(target, receipt_file(model, name, record))


def _written(target: Path, data: bytes) -> Result:
    from sisa.store.blobs.files import write_atomic

    write_atomic(target, data)
    return Result({"file": str(target), "num_bytes": len(data)}, [f"written: {target}"])


@command("verify-certificate", "certificate.json --key keys.json --log log")
@click.argument("file", type=PATH)
@public_keys_option
@click.option("--receipt", type=PATH, help="A receipt: show that the certificate is about its record.")
@click.option("--log", metavar="DIR|URL", help="The published log: check all of it.")
def verify_certificate_file(file: Path, key_file: Path, receipt: Path | None, log: str | None) -> Result:
    """Check a certificate offline, without the model. Exit with 4 if it is refused."""
    from sisa.verifier.certificate import verify_certificate, verify_receipt

    public = read_public_keys(key_file)
    with evidence_in(file):
        found = verify_certificate(read_bytes(file), public)
    lines = [f"valid: entry {found.index} of a log of {found.checkpoint.size}, of model {public.model}"]
    lines.append(keyid_line(public))
    if receipt is not None:
        with evidence_in(receipt):
            verify_receipt(read_bytes(receipt), found, public)
        lines.append("the receipt is of this certificate")
    num_statements, checks = None, None
    if log is not None:
        _, statements = logged_statements(log, public, json.loads(read_bytes(file))["proof"])
        num_statements, checks = len(statements), checks_about(found.statement, statements)
        lines.append(f"the log holds: {counted(num_statements, 'statement')}")
    about_log = {"log_statements": num_statements, "checks": checks}
    body = {"ok": True, "keyid": public.present.keyid, "receipt": receipt is not None, **about_log}
    result = Result(body, lines).with_more(shown(found).json, shown(found).lines)
    return result if checks is None else result.with_more({}, _check_lines(found.statement, checks))


def checks_about(
    stated: Mapping[str, Any], statements: Iterable[tuple[str, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the checks among `statements` that are about adapters of the statement `stated`."""
    from sisa.verifier.certificate import AUDIT, TEST_RESULT
    from sisa.verifier.envelope import Refused

    named, found = _digests(stated), []
    for sha256, each in statements:
        if each["predicateType"] in (AUDIT, TEST_RESULT) and (same := named & _digests(each)):
            try:
                _check_form(each)
                check = _audited(each) if each["predicateType"] == AUDIT else _tested(each)
            except Refused as error:
                check = {"check": f"of another form ({_fault(error)})", "result": "UNKNOWN", "at": ""}
            found.append({"sha256": sha256, "adapters": len(same), **check})
    return found


def _check_form(statement: Mapping[str, Any]) -> None:
    """Raise Refused unless a statement of a documented type has the form that its schema describes."""
    from sisa.verifier.envelope import check_form

    if form := _documented_forms().get(statement["predicateType"]):
        check_form(statement["predicate"], "the statement", form)


@cache
def _documented_forms() -> dict[str, Any]:
    """Return the form of each documented type of statement."""
    schema = json.loads((resources.files("sisa.evidence") / "schemas/statements.json").read_bytes())
    kinds = [each["properties"] for each in schema["oneOf"]]
    return {
        name: _form(each["predicate"], schema["$defs"])
        for each in kinds
        for name in each["predicateType"]["enum"]
    }


def _form(schema: Mapping[str, Any], named: Mapping[str, Any]) -> Any:
    """Return the form (of `check_form`) that a schema describes; it may have other members as well."""
    from sisa.verifier.envelope import Among

    if "$ref" in schema:
        return _form(named[schema["$ref"].removeprefix("#/$defs/")], named)
    if schema.get("type") == "object":
        required = {name: schema["properties"][name] for name in schema.get("required", ())}
        return Among({name: _form(each, named) for name, each in required.items()})
    if schema.get("type") == "array":
        return [_form(schema["items"], named)]
    if "oneOf" in schema:
        return str | dict
    if schema.get("type") == ["integer", "null"]:
        return int | None
    return {"integer": int, "boolean": bool}.get(str(schema.get("type")), str)


def _fault(error: Refused) -> str:
    """Return where a statement has another form than this version's."""
    return f"{error.where or 'predicate'}: expected {error.expected}"


def _digests(statement: Mapping[str, Any]) -> set[str]:
    return {each["digest"]["sha256"] for each in statement["subject"]}


def _tested(statement: Mapping[str, Any]) -> dict[str, Any]:
    stated = statement["predicate"]
    runs, tests = stated["configuration"], {end: stated[f"{end}Tests"] for end in ENDS}
    check = ", ".join(each["name"] for each in runs)
    at = ", ".join(each["annotations"]["at"] for each in runs)
    return {"check": check, "result": stated["result"], "at": at, **tests}


def _audited(statement: Mapping[str, Any]) -> dict[str, Any]:
    stated = statement["predicate"]
    results = [(each["name"], each["result"]) for each in stated["checks"]]
    ends = {"passed": "passed", "skipped": "warned", "failed": "failed"}
    tests = {ends[end]: [name for name, result in results if result == end] for end in ends}
    result = "PASSED" if stated["passed"] else "FAILED"
    return {"check": "audit", "result": result, "at": stated["at"], **tests}


def _check_lines(stated: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the checks about a statement's adapters, with the names of their tests."""
    if not checks:
        yield "  checks: the log has none of these adapters"
    number = counted(len(_digests(stated)), "adapter")
    for each in checks:
        about = f"of {each['adapters']} of {number}"
        yield f"  check: {each['check']} {each['result']} at {each['at']}, {about}"
        for end in ENDS:
            yield from (f"    {end}: {name}" for name in each.get(end, ()))


def shown(found: Certificate) -> Result:
    """Render a verified statement; in words, if it has the form that this version knows."""
    from sisa.verifier.envelope import Refused

    body = {
        "type": found.kind,
        "sha256": found.sha256,
        "entry": found.index,
        "log_size": found.checkpoint.size,
        "statement": found.statement,
    }
    try:
        _check_form(found.statement)
        lines = list(_words(found))
    except Refused as error:
        lines = [f"not in words, for it has another form ({_fault(error)}): --json prints it"]
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
    if "right" in stated:
        records = counted(stated["num_records"], "record")
        yield f"  {stated['right']} of {records}, made at {stated['at']}"
    if "reason" in stated:
        new = stated["keys"]["certificates"][-1]
        yield f"  {stated['reason']}: {new['keyid']} signs entries from {new['since']} on"
    for each in stated.get("in_force", ()):
        yield f"  restricted since {each['since']}: {counted(each['num_records'], 'record')}"
    for each in stated.get("held_back", ()):
        yield f"  shard {each['shard']} serves {each['served'] or 'nothing'} instead of {each['head']}"


def _deletion_words(stated: Mapping[str, Any]) -> Iterator[str]:
    """Yield the facts of a certificate about its request, the most asked for first."""
    from sisa.verifier.envelope import Among, check_form

    request, plan, checks = stated["request"], stated["plan"], stated["checks"]
    arrived = f"received on {on}, " if (on := request.get("received_on")) else ""
    late = ", completed after that" if request["times"]["completed"][:10] > request["due"] else ""
    yield f"  request {request['id']} ({request['regime']}, {arrived}due {request['due']}{late})"
    times = {state: request["times"][state] for state in TIMES}
    yield f"  {', '.join(f'{state} {at}' for state, at in times.items() if at)}"
    yield f"  guarantee: {stated['guarantee']}"
    for each in stated["touched"]:
        slices = ", ".join(map(str, each["slices"]))
        yield f"  touched: shard {each['shard']}, slice{'s' * (len(each['slices']) > 1)} {slices}"
    erased: Counter[str] = Counter()
    for each in stated["erased"]:
        erased[f"{each['what']} ({each['where']})"] += each["number"]
    yield from (f"  erased: {what}: {count}" for what, count in erased.items())
    for each in stated["remains"]:
        count = f"{each['number']}, " if each["number"] else ""
        yield f"  remains: {each['what']} ({each['where']}): {count}{each['why']}"
    epochs = f"{plan['record_epochs_retrained']} of {plan['record_epochs_full']} record-epochs"
    yield f"  retrained: {epochs}, in {plan['seconds']} s"
    if isinstance(sweep := checks["sweep"], dict):
        result = Among({"predicate": Among({"result": str})})
        sweep = check_form(sweep, "the search", result)["predicate"]["result"]
    yield f"  sweep: {sweep}"
    yield f"  replay: {checks['replay']}"
    yield f"  probe: {stated['probe']['result']}"
    left = stated["exceptions"]
    yield f"  exports not found: {left['exports_not_found']}; legal holds: {stated['legal_holds']}"
    yield from (f"  old versions kept: {why}" for why in left["old_versions_kept"])
    if stated["live_patches"]:
        yield f"  approximate patches beneath: {len(stated['live_patches'])}"
    yield from (f"  covers: {each}" for each in stated["coverage"]["covers"])
    yield from (f"  does not cover: {each}" for each in stated["coverage"]["does_not_cover"])
