"""Results of checks and provenance of training: what the log states, by which commands, and for whom."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as ResultPb

import sisa.model
from cluster.cli.evidence.certificates import checks_about
from sisa.audit.residue import Residue, Scan, sweep_model
from sisa.audit.verify import EMPTY, ShardProof, Verification
from sisa.core.errors import EnvironmentFault
from sisa.evidence import attestations
from sisa.evidence.attestations import replay_results, sweep_results
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import keys_of
from sisa.evidence.open_evidence import results_of_checks
from sisa.evidence.statements import PROVENANCE
from sisa.model import Model, open_model
from sisa.store.blobs import files
from sisa.verifier.certificate import EXACT, STATE, TEST_RESULT
from tests.models.certified import statements_of
from tests.models.confessing import record
from tests.unit.commands import Ask

REQUEST = ("--executor", "serial")


@pytest.fixture
def bare(bare: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model without keys, which is replayed in this process alone."""
    monkeypatch.setattr(sisa.model, "stages_apart", lambda *_: None)
    return bare


@pytest.fixture
def model(bare: Path, ask: Ask) -> Path:
    """Return a model with keys."""
    ask("keys", "init", "-m", bare)
    ask("certificate", "issue", "-m", bare)
    return bare


def statements(directory: Path) -> list[dict[str, Any]]:
    return statements_of(directory / "log", keys_of(open_model(directory)).public)


def test_a_replay_and_a_sweep_are_logged_about_what_is_served(model: Path, ask: Ask) -> None:
    replayed = ask("verify", "-m", model, "--replay", "all", *REQUEST)
    scanned = ask("sweep", "-m", model, record(3).id, code=4)  # that record is held
    assert (replayed["entry"], replayed["not_logged"], scanned["entry"]) == (1, "", 2)
    state, replay, sweep = statements(model)
    assert state["predicateType"] == STATE
    for each in (replay, sweep):
        assert each["predicateType"] == TEST_RESULT
        assert each["subject"] == state["subject"]
        assert ParseDict(each["predicate"], ResultPb()).result == each["predicate"]["result"]
    assert replay["predicate"]["result"] == "PASSED"
    assert replay["predicate"]["passedTests"][0] == "shard-00000 trained from scratch: equal bytes"
    assert sweep["predicate"]["result"] == "FAILED"
    number = len(scanned["residue"])
    assert sweep["predicate"]["failedTests"] == [f"traces of kind string: {number}"]


def test_a_check_that_is_no_replay_logs_nothing(model: Path, ask: Ask) -> None:
    body = ask("verify", "-m", model)
    assert "entry" not in body
    assert len(statements(model)) == 1


def test_a_sweep_logs_numbers_alone(model: Path, ask: Ask, tmp_path: Path) -> None:
    place = tmp_path / "a-telling-name"
    place.mkdir()
    (place / "left.txt").write_text(record(5).text)
    (tmp_path / "texts").write_text(record(5).text)
    given = ("sweep", "-m", model, record(5).id, "--text-file", tmp_path / "texts", "--also", place)
    ask(*given, code=4)
    published = b"".join(each.read_bytes() for each in (model / "log").rglob("*") if each.is_file())
    data = published + json.dumps(statements(model)).encode()
    for each in (record(5).id, record(5).text, place.name, str(tmp_path)):
        assert each.encode() not in data


def logged(directory: Path) -> dict[Path, bytes]:
    return {each: each.read_bytes() for each in (directory / "log").rglob("*") if each.is_file()}


def without_keys(_directory: Path, _patched: pytest.MonkeyPatch) -> str:
    return "has no keys"


def read_only(_directory: Path, patched: pytest.MonkeyPatch) -> str:
    def refuse(*_: object) -> None:
        raise EnvironmentFault("the directory can't be written")

    patched.setattr(files, "writer_lock", refuse)
    return "can't be written"


def failing_signer(_directory: Path, patched: pytest.MonkeyPatch) -> str:
    def refuse(*_: object) -> bytes:
        raise EnvironmentFault("the token is not plugged in")

    patched.setattr(Keys, "sign", refuse)
    return "not plugged in"


@pytest.mark.parametrize("fault", [without_keys, read_only, failing_signer])
def test_a_result_that_cannot_be_logged_is_the_same(
    fault: Callable[[Path, pytest.MonkeyPatch], str],
    bare: Path,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is not without_keys:
        ask("keys", "init", "-m", bare)
    before, why = logged(bare), fault(bare, monkeypatch)
    body = ask("sweep", "-m", bare, "nobody")
    assert (body["clean"], body["entry"]) == (True, None)
    assert why in body["not_logged"]
    if fault is not read_only:  # a replay needs the lock anyway
        body = ask("verify", "-m", bare, "--replay", "all", *REQUEST)
        assert (body["ok"], body["entry"]) == (True, None)
        assert why in body["not_logged"]
    assert logged(bare) == before


def test_checks_are_named_beside_the_certificate_they_are_about(
    model: Path, ask: Ask, tmp_path: Path
) -> None:
    keys, file = model / "log" / "keys.json", tmp_path / "certificate.json"
    ask("verify", "-m", model, "--replay", "all", *REQUEST)
    request = ask("forget", "-m", model, record(7).id, *REQUEST)["request_id"]
    ask("sweep", "-m", model, record(7).id)
    ask("certificate", "export", "-m", model, request, "-o", file)
    shown = ask("certificate", "show", "-m", model, request)
    checked = ask("verify-certificate", file, "--key", keys, "--log", model / "log")
    assert shown["type"] == EXACT
    assert checked["checks"] == shown["checks"]
    replay, sweep = shown["checks"]
    assert (sweep["check"], sweep["result"], sweep["adapters"]) == ("sweep", "PASSED", 2)
    assert sweep["passed"][1:] == ["no given id or text (strings: 1)"]
    assert sweep["at"] > shown["statement"]["predicate"]["issued_at"]
    assert (replay["check"], replay["adapters"]) == ("replay", 1)  # the other shard has a new adapter
    assert ask("verify-certificate", file, "--key", keys)["checks"] is None


def test_a_check_of_another_form_is_shown_as_unknown(model: Path, ask: Ask) -> None:
    ask("sweep", "-m", model)
    ((sha256, stated),) = results_of_checks(open_model(model))
    members = "expected result, configuration, passedTests, warnedTests, failedTests"
    run = {**stated["predicate"], "configuration": [{"name": 1, "annotations": {"at": ""}}]}
    for strange, why in (
        ({}, f"predicate: {members}"),
        (run, "configuration: expected name, uri, annotations"),
    ):
        other = {**stated, "predicate": strange}
        (found,) = checks_about(stated, [(sha256, other)])
        assert (found["result"], found["sha256"]) == ("UNKNOWN", sha256)
        assert why in found["check"]
    elsewhere = {**stated, "subject": [{"name": "base", "digest": {"sha256": "0" * 64}}]}
    assert checks_about(stated, [(sha256, elsewhere)]) == []


def test_provenance_states_once_how_adapters_were_trained(model: Path, ask: Ask) -> None:
    body = ask("certificate", "provenance", "-m", model)
    assert len(body["statements"]) == 1
    assert ask("certificate", "provenance", "-m", model) == body
    state, stated = statements(model)
    assert (stated["predicateType"], stated["subject"]) == (PROVENANCE, state["subject"])
    parsed = ParseDict(stated["predicate"], Provenance())
    build_ = parsed.build_definition
    fingerprint = state["predicate"]["numerics"]["fingerprints"][0]
    assert parsed.run_details.builder.id == f"urn:deletion-ready-model:numerics:{fingerprint}"
    digests = {each.name: each.digest["sha256"] for each in build_.resolved_dependencies if each.digest}
    assert digests["base"] == "b" * 64
    assert digests["records"] == state["predicate"]["membership"]["after"]
    assert {"torch", "numpy"} <= {each.name for each in build_.resolved_dependencies if each.uri}
    text = json.dumps(stated)
    assert not any(each in text for each in ("owner/people", str(model), record(0).id))
    ask("forget", "-m", model, record(7).id, *REQUEST)
    assert ask("certificate", "provenance", "-m", model) != body


PROOF = ShardProof(3, "key", True, True, 2)


@pytest.mark.parametrize(
    ("proof", "ok", "result", "name"),
    [
        (PROOF, True, "PASSED", "shard-00003 trained from scratch: equal bytes"),
        (dataclasses.replace(PROOF, equal=False), False, "FAILED", "trained from scratch: other bytes"),
        (dataclasses.replace(PROOF, equal_apart=False), False, "FAILED", "own process: other bytes"),
        (ShardProof(3, "key", False, None, 0, "another machine"), True, "WARNED", "another machine"),
        (ShardProof(3, None, False, None, 0, EMPTY), True, "PASSED", "stored files"),
    ],
)
def test_results_of_a_replay(proof: ShardProof, ok: bool, result: str, name: str) -> None:
    findings = () if ok else (object(),)
    found = replay_results(Verification(ok, 9, findings, (proof,)))  # type: ignore[arg-type]
    assert found.result == result
    where = {"PASSED": found.passed, "WARNED": found.warned, "FAILED": found.failed}[result]
    assert any(name in each for each in where)


def test_results_of_a_sweep_name_kinds_and_numbers() -> None:
    counts = {"files": 9, "strings": 2, "strings_too_short_for_raw_bytes": 1}
    left = Residue("unreadable", "/home/ada/file", "byte 3", "can't be read")
    found = sweep_results(Scan(False, ("model", "/home/ada"), counts, (left, left), ()))
    assert found.failed == ["traces of kind unreadable: 2"]
    assert found.passed == ["no given id or text (strings: 2)"]
    assert len(found.warned) == 1


@pytest.mark.parametrize(
    ("meanwhile", "logged"),
    [(lambda m: m.submit(["id-0001"]), True), (lambda m: m.forget(["id-0001"]), False)],
    ids=["a request came in", "a record was deleted"],
)
def test_a_result_is_logged_unless_the_model_has_changed_meanwhile(
    model: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Model], object], logged: bool
) -> None:
    opened = open_model(model)

    def swept_beside(*given: Any, **options: Any) -> Scan:
        found = sweep_model(*given, **options)
        meanwhile(open_model(model))
        return found

    monkeypatch.setattr(attestations, "sweep_model", swept_beside)
    _, stated = attestations.sweep_and_log(opened)
    assert (stated.entry is not None, stated.not_logged == attestations.CHANGED) == (logged, not logged)
