"""`sisa certificate`, `sisa receipt` and `sisa verify-certificate`, over a model that a fake trains."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.evidence.certificates import shown
from sisa.core.errors import EnvironmentFault
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import keys_of
from sisa.evidence.open_evidence import certificate_file
from sisa.model import open_model
from sisa.verifier.certificate import EXACT, RECTIFICATION, STATE, verify_logged
from tests.models.confessing import NUM_RECORDS, record
from tests.unit.commands import Ask, Sisa


@pytest.fixture
def certified(model: Path, ask: Ask) -> Path:
    """Return a model with keys."""
    ask("keys", "init", "-m", model)
    return model


def forget(ask: Ask, model: Path, *numbers: int) -> dict[str, Any]:
    return ask("forget", "-m", model, *(record(each).id for each in numbers))


def test_a_deletion_is_certified_for_whoever_has_the_public_keys(
    certified: Path, ask: Ask, sisa: Sisa, tmp_path: Path
) -> None:
    before, after = shutil.copytree(certified / "log", tmp_path / "before"), tmp_path / "after"
    request = forget(ask, certified, 3, 4)["request_id"]
    listed = ask("certificate", "list", "-m", certified)
    assert [each["kind"] for each in listed["statements"]] == [STATE, EXACT]
    assert listed["pending"] == []
    certificate, receipt = tmp_path / "certificate.json", tmp_path / "receipt.json"
    ask("certificate", "export", "-m", certified, request, "-o", certificate)
    ask("receipt", "-m", certified, request, record(4).id, "-o", receipt)
    shown = ask("certificate", "show", "-m", certified, request)
    (certified / "log").rename(after)
    certified.rename(tmp_path / "away")

    check = ("verify-certificate", certificate, "--key", after / "keys.json")
    done = ask(*check, "--receipt", receipt, "--log", after)
    assert (done["ok"], done["type"], done["receipt"], done["log_statements"]) == (True, EXACT, True, 2)
    assert ask(*check)["log_statements"] is None
    assert done["statement"] == shown["statement"]
    stated = done["statement"]["predicate"]
    assert stated["commitments"]["number"] == 2
    assert stated["checks"]["replay"] == "not run"
    assert stated["checks"]["sweep"]["predicate"]["result"] == "PASSED"
    heads = {each["sha256"] for each in stated["served"]}
    assert heads == {each["digest"]["sha256"] for each in done["statement"]["subject"]}
    code, out, _ = sisa(*check, "--log", after)
    assert code == 0
    for line in ("valid: entry 1 of a log of 2", "the log holds: 2 statements", "guarantee: bit-exact"):
        assert line in out
    assert "does not cover: Source files" in out
    assert f"keyid {done['keyid']}" in out
    assert (
        done["keyid"]
        == ask("keys", "check", after / "keys.json", "--trusted", after / "keys.json")["keyid"]
    )

    ask(*check, "--log", before, code=4)
    next((after / "statements").iterdir()).unlink()
    ask(*check, "--log", after, code=4)


def test_a_certificate_says_that_the_term_was_over(certified: Path, ask: Ask, sisa: Sisa) -> None:
    late = ("--received-on", "2020-01-31", "--external-id", "T-1", "--approver", "dpo")
    ask("request", "submit", record(3).id, *late, "-m", certified)
    ask("run", "--executor", "serial", "-m", certified)
    stated = ask("certificate", "show", "T-1", "-m", certified)["statement"]["predicate"]["request"]
    assert (stated["received_on"], stated["due"]) == ("2020-01-31", "2020-02-29")
    words = r"\(gdpr, received on 2020-01-31, due 2020-02-29, completed after that\)"
    assert re.search(words, sisa("certificate", "show", "T-1", "-m", certified)[1])


def test_a_receipt_is_for_a_record_of_the_request(certified: Path, ask: Ask, tmp_path: Path) -> None:
    one, _ = (forget(ask, certified, number)["request_id"] for number in (3, 4))
    receipt = ("receipt", "-m", certified, one, "-o", tmp_path / "receipt.json")
    refused = ask(*receipt, record(4).id, code=3)["error"]
    assert refused["type"] == "UnknownRecord"
    assert record(4).id not in str(refused)
    (certified / "evidence.sqlite").unlink()  # made again from log and slices, without the commitments
    lost = ask(*receipt, record(3).id, code=4)["error"]
    assert lost["type"] == "IntegrityError"
    assert "commitments" in lost["message"]


def test_what_is_pending_is_reported_and_issued_later(
    certified: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise EnvironmentFault("the token is not plugged in")

    issue = ("certificate", "issue", "-m", certified)
    with monkeypatch.context() as patched:
        patched.setattr(Keys, "sign", fail)
        done = forget(ask, certified, 3)
        assert done["certificate"] == "pending"
        assert ask(*issue, code=6)["error"]["type"] == "EnvironmentFault"
    name = done["request_id"]
    assert ask("status", "-m", certified)["certificates_pending"] == [name]
    ask("certificate", "show", "-m", certified, name, code=3)
    (issued,) = ask(*issue)["issued"]
    assert (issued["kind"], issued["about"]) == (EXACT, name)
    assert ask("status", "-m", certified)["certificates_pending"] == []
    assert ask("request", "show", "-m", certified, name)["certificate"] == "issued"


def test_a_rectification_is_one_certificate(certified: Path, ask: Ask, tmp_path: Path) -> None:
    row = {
        "id": record(3).id,
        "subject_id": None,
        "prompt": "question 3",
        "completion": "another answer",
    }
    (tmp_path / "corrected.jsonl").write_text(json.dumps(row) + "\n")
    done = ask("rectify", "-m", certified, tmp_path / "corrected.jsonl")
    assert (done["replaced"], done["unchanged"]) == (1, 0)
    shown = ask("certificate", "show", "-m", certified, done["request_id"])
    assert shown["type"] == RECTIFICATION
    assert shown["statement"]["predicate"]["membership"]["num_records"] == NUM_RECORDS
    assert ask("certificate", "issue", "-m", certified) == {"issued": []}


def test_a_model_without_keys_has_no_certificates(model: Path, ask: Ask) -> None:
    name = forget(ask, model, 3)["request_id"]
    assert ask("status", "-m", model)["certificates_pending"] is None
    for arguments in (("list",), ("issue",), ("show", name)):
        refused = ask("certificate", *arguments, "-m", model, code=2)["error"]
        assert refused["type"] == "InvalidInput"
        assert "sisa keys init" in refused["next_step"]
    assert not (model / "log").exists()
    assert not (model / "evidence.sqlite").exists()

    ask("keys", "init", "-m", model)  # too late for that deletion
    assert "no keys" in ask("certificate", "show", "-m", model, name, code=3)["error"]["next_step"]


def test_a_certificate_of_another_form_says_which_fact_is_missing(certified: Path, ask: Ask) -> None:
    name = forget(ask, certified, 3)["request_id"]
    model = open_model(certified)
    found = verify_logged(certificate_file(model, name), keys_of(model).public)
    assert shown(found).lines[1].startswith("  signed at ")
    del found.statement["predicate"]["plan"]["seconds"]
    (line,) = shown(found).lines
    assert line.startswith("not in words, for it has another form (plan: expected record_epochs_retr")
    assert shown(found).json["statement"] == found.statement
