"""`sisa log`: what it shows, checks, proves and cosigns, in words, JSON and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sisa.evidence.keys.model_keys import log_of, start_evidence
from sisa.model import open_model
from sisa.verifier.note import verify_proof
from tests.models.confessing import NAME
from tests.models.written_log import TYPE, entry, statement
from tests.unit.commands import Ask, Sisa


@pytest.fixture
def model(model: Path) -> Path:
    """Return a model with keys and three statements in its log."""
    start_evidence(open_model(model))
    for number in range(3):
        append(model, number)
    return model


def append(directory: Path, number: int) -> int:
    return log_of(open_model(directory)).append(statement(number), TYPE)


def test_a_log_is_shown_checked_and_proved(model: Path, ask: Ask, tmp_path: Path) -> None:
    at, keys = model / "log", model / "log" / "keys.json"
    shown = ask("log", "show", "-m", model, "--last", 2)
    assert (shown["origin"], shown["size"]) == (f"deletion-ready-model/{NAME}", 3)
    assert (shown["location"], shown["cosigned"]) == (str(at), [])
    assert [each["index"] for each in shown["entries"]] == [1, 2]
    logged = json.loads(entry(2))
    assert shown["entries"][1] == {"index": 2, "type": TYPE, "sha256": logged["sha256"]}
    proved = ask("log", "proof", "-m", model, 1)
    assert verify_proof(proved["proof"].encode(), entry(1), shown["vkey"])[0] == 1
    kept = shutil.copy(at / "checkpoint", tmp_path / "kept")
    append(model, 3)
    for where in (("-m", model), (at, "--key", keys)):
        checked = ask("log", "check", *where, "--seen", kept)
        assert (checked["ok"], checked["size"], checked["seen"]) == (True, 4, 1)
    ask("log", "proof", "-m", model, 4, code=2)


def test_a_witness_and_the_operator_cosign(model: Path, ask: Ask, sisa: Sisa, tmp_path: Path) -> None:
    at, keys = model / "log", model / "log" / "keys.json"
    key, state = tmp_path / "witness.key", tmp_path / "witness.state"
    made = ask("log", "witness-key", "witness.example/w1", key)
    assert (made["name"], key.stat().st_mode & 0o777) == ("witness.example/w1", 0o600)
    ask("log", "witness-key", "witness.example/w1", key, code=2)  # not twice
    witness = ("--key", keys, "--witness-key", key, "--state", state)
    code, line, _ = sisa("log", "cosign", at, *witness)
    assert (code, line.count("\n"), line[:21]) == (0, 1, "— witness.example/w1 ")
    (tmp_path / "line").write_text(line)
    add = ("log", "add-cosignature", "-m", model, tmp_path / "line", "--witness", made["vkey"])
    added = ask(*add)
    assert (added["size"], added["cosigned"]) == (3, ["witness.example/w1"])
    (shown,) = ask("log", "show", "-m", model)["cosigned"]
    assert (shown["name"], shown["at"][:2]) == ("witness.example/w1", "20")
    check = ("log", "check", at, "--key", keys, "--witness", made["vkey"])
    ask(*check)
    append(model, 3)
    failed = ask(*check, code=4)  # the new checkpoint is not cosigned yet
    assert failed["error"]["message"] == "a note is not signed as expected"
    again = ask("log", "cosign", at, *witness)
    assert (again["seen_size"], again["size"]) == (3, 4)
    ask(*add, code=4)  # of the former checkpoint
    ask("log", "cosign", at / "checkpoint", *witness)  # the file alone: nothing new
    append(model, 4)
    failed = ask("log", "cosign", at / "checkpoint", *witness, code=2)
    assert failed["error"]["next_step"][:14] == "name the log's"
    code, request, _ = sisa("log", "request", "-m", model, "--old", 4)
    (tmp_path / "request").write_text(request)
    again = ask("log", "cosign", tmp_path / "request", *witness)  # by somebody without the log
    assert (again["seen_size"], again["size"]) == (4, 5)
    ask("log", "cosign", tmp_path / "request", *witness, code=4)  # it has seen 5 by now
    ask("log", "request", "-m", model, "--old", 6, code=2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check", "absent", "--key", "KEYS"], 2),
        (["check", "LOG", "--key", "absent"], 2),
        (["check", "LOG", "--key", "JUNK"], 4),
        (["check", "LOG", "--key", "KEYS", "--seen", "JUNK"], 4),
        (["check", "LOG", "--key", "KEYS", "--witness", "junk"], 4),
        (["check", "ftp://example.com/log", "--key", "KEYS"], 2),
        (["cosign", "LOG", "--key", "KEYS", "--witness-key", "JUNK", "--state", "absent"], 2),
        (["witness-key", "two words", "absent"], 4),
        (["check", "http://127.0.0.1:9/log", "--key", "KEYS"], 6),
    ],
)
def test_bad_input_is_typed(
    model: Path, ask: Ask, tmp_path: Path, arguments: list[str], code: int
) -> None:
    (tmp_path / "junk").write_bytes(b"\xff{junk")
    paths = {"LOG": model / "log", "KEYS": model / "log/keys.json", "JUNK": tmp_path / "junk"}
    given = [paths.get(each, tmp_path / each if each == "absent" else each) for each in arguments]
    failed = ask("log", *given, code=code)
    error = failed["error"]
    assert error["message"]
    assert error["next_step"] or error["expected"] or error["got"]


def test_usage_is_checked(model: Path, sisa: Sisa) -> None:
    for given in ([], [model / "log"], ["-m", model, model / "log"], ["-m", model, "--key", "k"]):
        assert sisa("log", "check", *given)[0] == 2
