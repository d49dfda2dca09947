"""`sisa verify-certificate`: what it accepts and refuses, in words, JSON and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sisa.verifier.certificate import CERTIFICATE_FILE, EXACT, log_entry
from sisa.verifier.envelope import canonical
from tests.models.certified import Certified, certified

Sisa = Callable[..., tuple[int, str, str]]


def write(model: Certified, directory: Path) -> None:
    """Write the public keys, and every statement of the log as a certificate file."""
    (directory / "keys.json").write_bytes(model.keys.public_file)
    for each in model.logged:
        file = {
            "type": CERTIFICATE_FILE,
            "envelope": model.log.statement(each.sha256).decode(),
            "entry": log_entry(each.sha256, each.kind).decode(),
            "proof": model.log.proof(each.sequence).decode(),
        }
        (directory / f"{each.sequence}.json").write_bytes(canonical(file) + b"\n")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with a state (0), a certificate (1) and a log; `other` is another model."""
    for directory in (tmp_path, tmp_path / "other"):
        directory.mkdir(exist_ok=True)
        model = certified(directory)
        model.forget(1, 2)
        write(model, directory)
    return tmp_path


def test_a_certificate_is_put_into_words(files: Path, sisa: Sisa) -> None:
    check = ("verify-certificate", files / "1.json", "--key", files / "keys.json")
    code, out, _ = sisa(*check, "--log", files / "log")
    assert code == 0
    for line in ("valid: entry 1 of a log of 2", "the log holds: 2 statements", "guarantee: bit-exact"):
        assert line in out
    assert "does not cover: Source files" in out
    body = json.loads(sisa(*check, "--json")[1])
    assert (body["ok"], body["type"], body["log_statements"]) == (True, EXACT, None)


@pytest.mark.parametrize(
    ("file", "keys", "what"),
    [
        ("other/1.json", "keys.json", "not signed as expected"),
        ("1.json", "other/keys.json", "not signed as expected"),
        ("0.json", "keys.json", "not a certificate"),
        ("keys.json", "keys.json", "another form"),
        ("1.json", "1.json", "another form"),
    ],
)
def test_other_evidence_is_refused(files: Path, sisa: Sisa, file: str, keys: str, what: str) -> None:
    code, out, err = sisa("verify-certificate", files / file, "--key", files / keys, "--json")
    error = json.loads(out)["error"]
    assert (code, error["type"]) == (4, "IntegrityError")
    assert what in error["message"]
    assert "expected" in err


def test_another_log_is_refused(files: Path, sisa: Sisa) -> None:
    check = ("verify-certificate", files / "1.json", "--key", files / "keys.json")
    assert sisa(*check, "--log", files / "other" / "log")[0] == 4
    (statement, _) = (files / "log" / "statements").iterdir()
    statement.unlink()
    assert sisa(*check, "--log", files / "log")[0] == 4


def test_a_cut_file_is_refused_and_a_missing_one_is_2(files: Path, sisa: Sisa) -> None:
    whole = (files / "1.json").read_bytes()
    (files / "cut.json").write_bytes(whole[: len(whole) // 2])
    assert sisa("verify-certificate", files / "cut.json", "--key", files / "keys.json")[0] == 4
    assert sisa("verify-certificate", files / "none.json", "--key", files / "keys.json")[0] == 2
