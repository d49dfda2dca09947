"""`sisa audit`: what its report says, where it is signed, and which shards it draws."""

from __future__ import annotations

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from sisa.audit.residue import Scan, sweep_model
from sisa.core.errors import Busy, Problem
from sisa.evidence.audit import Check, audit_statement, drawn
from sisa.evidence.log.log import Log, statement_in
from sisa.model import Model
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier.certificate import AUDIT, STATE
from sisa.verifier.envelope import verify_envelope
from tests.integration.evidence.conftest import Operator
from tests.models.certified import check_statement
from tests.models.confessing import build, use_fake_resources


def test_a_model_without_keys_is_audited_without_a_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_resources(monkeypatch)
    build(tmp_path / "model")
    found = Operator(tmp_path / "model").audit(sample=1)
    assert (found.passed, found.envelope, found.index) == (True, b"", None)
    skipped = {each.name for each in found.checks if each.result == "skipped"}
    assert skipped == {"log", "chain", "certificates", "membership", "heads"}


def test_the_report_is_signed_and_logged(operator: Operator) -> None:
    found = operator.audit(sample=1)
    log = Log(LocalBlobs(operator.log), operator.keys)
    assert log.statement(list(log.entries())[-1].sha256) == found.envelope
    statement = verify_envelope(found.envelope, operator.keys.public, found.index)
    assert (statement["predicateType"], statement["predicate"]["passed"]) == (AUDIT, True)
    assert statement["predicate"]["shards"] == list(found.shards)
    check_statement(statement)


def test_the_schema_describes_a_report_with_findings(operator: Operator) -> None:
    kept = operator.keep()
    operator.directory.joinpath("records", "left-behind").write_text("what nobody lists")
    shutil.rmtree(operator.log / "statements")
    found = operator.audit(kept)
    assert {each.result for each in found.checks} == {"passed", "failed"}
    check_statement(statement_in(found.envelope))


def test_a_signed_statement_that_lacks_facts_is_found(operator: Operator) -> None:
    log = Log(LocalBlobs(operator.log), operator.keys)
    last = list(log.entries())[-1]
    stated = statement_in(log.statement(last.sha256))
    held = stated["predicate"]["membership"]
    predicate = {
        "model": operator.model.id,
        "sequence": log.size,
        "previous": last.sha256,
        "membership": {**held, "before": held["after"]},
    }
    lacking = {"subject": stated["subject"], "predicateType": STATE, "predicate": predicate}
    log.append(operator.keys.sign(lacking), STATE)
    assert operator.failed() == {"chain", "certificates", "membership", "heads"}


def test_a_fault_of_a_check_is_not_taken_for_a_finding(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(_: object) -> list[Problem]:
        raise KeyError("a mistake in the check")

    monkeypatch.setattr("sisa.evidence.audit.EVIDENCE_CHECKS", (("chain", faulty),))
    with pytest.raises(KeyError):
        operator.audit()


def test_one_report_is_about_one_state(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(model: Model) -> Scan:
        found = sweep_model(model)
        operator.forget(5)
        return found

    monkeypatch.setattr("sisa.evidence.audit.sweep_model", disturbed)
    with pytest.raises(Busy):
        operator.audit()


def test_a_published_report_names_no_file(operator: Operator) -> None:
    """A file may be named after whoever it is about."""
    names = ("records/a", "of-p001-q1.txt")
    inside = [str(operator.directory / each) for each in names]
    places = (*inside, str(Path.home() / "secret"), "s3://bucket/of-p001-q1", "shard 1")
    findings = tuple(Problem(each, "what is wrong") for each in places)
    done = replace(operator.audit(), checks=(Check("sweep", findings),))
    (check,) = audit_statement(done, operator.directory)["predicate"]["checks"]
    where = ["records", "the model's directory", *["outside the model"] * 2, "shard 1"]
    assert [each["where"] for each in check["findings"]] == where


def test_the_drawing_is_documented_and_depends_on_the_seed() -> None:
    def lot(shard: int) -> str:
        return sha256(f"deletion-ready-model/audit/v1\n2026\n{shard}".encode()).hexdigest()

    assert drawn("2026", range(50), 5) == sorted(sorted(range(50), key=lot)[:5])
    assert len({tuple(drawn(str(seed), range(50), 5)) for seed in range(20)}) == 20
    assert drawn("2026", [3, 1], 9) == [1, 3]
