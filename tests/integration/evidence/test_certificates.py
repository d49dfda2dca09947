"""Certificates of a real model: issued by deletions, exported, and checked where the model is not."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from sisa.core.errors import EnvironmentFault
from sisa.data.samples import to_jsonl
from sisa.evidence.issued import certificate_file, issue, receipt_file
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import init_keys
from sisa.verifier.certificate import EXACT, RECTIFICATION, STATE, verify_certificate
from sisa.verifier.envelope import PublicKeys, parse_keys
from tests.models.tiny_model import PEOPLE, Done, Tiny, command

pytestmark = pytest.mark.torch
HEAVY = {"torch", "ray", "faiss", "numpy", "transformers", "sqlalchemy", "pydantic", "scipy", "nacl"}


@pytest.fixture
def certified(tiny: Tiny) -> Tiny:
    model = tiny.open()
    keys = init_keys(model.config, model.id)
    (tiny.folder / "keys.json").write_bytes(keys.public_file)
    issue(model)
    return tiny


def sisa(tiny: Tiny, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    return command(capsys, *arguments[:2], "-m", tiny.directory, *arguments[2:])


def test_a_deletion_is_certified_for_whoever_has_the_public_keys(
    certified: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = certified.folder
    request = certified.open().forget(subject="p004").request
    assert request is not None
    listed = sisa(certified, capsys, "certificate", "list").json
    assert [each["kind"] for each in listed["statements"]] == [STATE, EXACT]
    assert listed["pending"] == []
    name, keys = request.request_id, folder / "keys.json"
    certificate, receipt = folder / "certificate.json", folder / "receipt.json"
    assert sisa(certified, capsys, "certificate", "export", name, "-o", certificate).code == 0
    assert (
        command(capsys, "receipt", "-m", certified.directory, name, "p004-q1", "-o", receipt).code == 0
    )
    shown = sisa(certified, capsys, "certificate", "show", name).json
    certified.directory.rename(folder / "away")
    (folder / "away" / "log").rename(folder / "log")
    check = ("verify-certificate", certificate, "--key", keys, "--receipt", receipt)
    done = command(capsys, *check, "--log", folder / "log")
    assert (done.code, done.json["ok"], done.json["receipt"], done.json["log_statements"]) == (
        *(0, True, True),
        2,
    )
    assert done.json["statement"] == shown["statement"]
    stated = done.json["statement"]["predicate"]
    assert stated["commitments"]["number"] == 2
    assert stated["checks"]["replay"] == "not run"
    assert stated["checks"]["sweep"]["predicate"]["result"] == "PASSED"
    heads = {each["sha256"] for each in stated["served"]}
    assert heads == {each["digest"]["sha256"] for each in done.json["statement"]["subject"]}

    certificate.write_bytes(certificate.read_bytes().replace(b'"proof"', b'"Proof"'))
    refused = command(capsys, *check)
    assert refused.code == 4
    assert refused.error["type"] == "IntegrityError"
    assert refused.error["expected"]


def test_a_receipt_is_for_a_record_of_the_request(
    certified: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = certified.open()
    one, other = model.forget(["p001-q1"]).request, model.forget(["p002-q1"]).request
    assert one is not None
    assert other is not None
    receipt = ("receipt", "-m", certified.directory, one.request_id)
    refused = command(capsys, *receipt, "p002-q1", "-o", certified.folder / "r.json")
    assert (refused.code, refused.error["type"]) == (3, "UnknownRecord")
    assert "p002" not in refused.out
    file = certified.directory / "evidence.sqlite"
    kept = file.read_bytes()
    file.unlink()  # it is made again from log and slices, without the commitments
    lost = command(capsys, *receipt, "p001-q1", "-o", certified.folder / "r.json")
    assert (lost.code, lost.error["type"]) == (4, "IntegrityError")
    assert "commitments" in lost.error["message"]
    file.write_bytes(kept)
    keys = public_keys(certified)
    mine = receipt_file(model, one.request_id, "p001-q1")
    verify_certificate(certificate_file(model, one.request_id), keys, mine)
    with pytest.raises(ValueError, match="another certificate"):
        verify_certificate(certificate_file(model, other.request_id), keys, mine)


def public_keys(tiny: Tiny) -> PublicKeys:
    return parse_keys((tiny.folder / "keys.json").read_bytes())


def test_what_is_pending_is_said_and_issued_later(
    certified: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise EnvironmentFault("the token is not plugged in")

    model = ("-m", certified.directory)
    with monkeypatch.context() as patched:
        patched.setattr(Keys, "sign", fail)
        done = command(capsys, "forget", *model, "p001-q1", "--executor", "serial")
        assert (done.code, done.json["certificate"]) == (0, "pending")
        refused = sisa(certified, capsys, "certificate", "issue")
        assert (refused.code, refused.error["type"]) == (6, "EnvironmentFault")
    name = done.json["request_id"]
    assert command(capsys, "status", *model).json["certificates_pending"] == [name]
    assert sisa(certified, capsys, "certificate", "show", name).code == 3
    (issued,) = sisa(certified, capsys, "certificate", "issue").json["issued"]
    assert (issued["kind"], issued["about"]) == (EXACT, name)
    assert command(capsys, "status", *model).json["certificates_pending"] == []
    assert sisa(certified, capsys, "request", "show", name).json["certificate"] == "issued"


def test_a_rectification_is_one_certificate(certified: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "completion": "Corrected."} for row in PEOPLE if row["id"] == "p003-q1"]
    (certified.folder / "corrected.jsonl").write_text(to_jsonl(rows))
    file = certified.folder / "corrected.jsonl"
    done = command(capsys, "rectify", "-m", certified.directory, file, "--executor", "serial")
    assert (done.code, done.json["replaced"], done.json["unchanged"]) == (0, 1, 0)
    shown = sisa(certified, capsys, "certificate", "show", done.json["request_id"]).json
    assert shown["type"] == RECTIFICATION
    assert shown["statement"]["predicate"]["membership"]["num_records"] == len(PEOPLE)
    assert sisa(certified, capsys, "certificate", "issue").json == {"issued": []}


def test_a_model_without_keys_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    request = tiny.open().forget(["p001-q1"]).request
    assert request is not None
    assert command(capsys, "status", "-m", tiny.directory).json["certificates_pending"] is None
    for arguments in (("list",), ("issue",), ("show", request.request_id)):
        refused = sisa(tiny, capsys, "certificate", *arguments)
        assert (refused.code, refused.error["type"]) == (2, "InvalidInput")
        assert "sisa keys init" in refused.error["next_step"]
    assert not (tiny.directory / "log").exists()
    assert not (tiny.directory / "evidence.sqlite").exists()


def test_a_deletion_before_the_keys_has_no_certificate(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.open()
    request = model.forget(["p001-q1"]).request
    assert request is not None
    init_keys(model.config, model.id)
    issue(model)
    refused = sisa(tiny, capsys, "certificate", "show", request.request_id)
    assert refused.code == 3
    assert "no keys" in refused.error["next_step"]


def test_an_auditor_needs_little(certified: Tiny) -> None:
    """The command loads neither models nor databases, in a process of its own."""
    model = certified.open()
    request = model.forget(["p001-q1"]).request
    assert request is not None
    file = certified.folder / "certificate.json"
    file.write_bytes(certificate_file(model, request.request_id))
    code = (
        "import sys; from sisa.__main__ import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    keys = str(certified.folder / "keys.json")
    check = ("verify-certificate", str(file), "--key", keys, "--json")
    done = subprocess.run(
        [sys.executable, "-c", code, *check], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["ok"]
    assert HEAVY & {*done.stderr.split()} == set()
    took = min(process_seconds(*check) - process_seconds("--version") for _ in range(3))
    assert took < 0.3  # beside the start of any command, which takes 0.2 s on an idle machine
    assert min(process_seconds(*check) for _ in range(2)) < 1


def process_seconds(*arguments: str) -> float:
    """Return the processor's time of a command, which other processes hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sisa", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
