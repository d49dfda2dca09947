"""`sisa keys`: what it makes, shows, rotates and refuses, in words, JSON and exit codes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from sisa.audit.doctor import diagnose
from sisa.audit.repair import repair
from sisa.config.config import RunConfig
from sisa.config.paths import state_dir
from sisa.flows.wiring.description import read_description
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.flows.wiring.ledger_place import LOCK
from sisa.model import open_model
from sisa.store.blobs.files import writer_lock
from sisa.verifier.envelope import Refused, parse_keys, verify_envelope
from tests.models.confessing import NAME
from tests.unit.commands import Ask, Sisa


def test_keys_are_made_shown_and_rotated(model: Path, ask: Ask, sisa: Sisa, tmp_path: Path) -> None:
    made = ask("keys", "init", "-m", model)
    (stated,) = (model / "log" / "statements").iterdir()  # what the model holds
    assert Path(made["directory"]) == tmp_path / "state" / "sisa" / "evidence-keys" / NAME
    assert ask("keys", "show", "-m", model) == made
    published = Path(made["published"])
    assert published == model / "log" / "keys.json"
    assert published.read_bytes() == Path(made["public_keys"]).read_bytes()
    assert parse_keys(published.read_bytes()).present.keyid == made["keyid"]
    new = ask("keys", "rotate", "-m", model)
    assert [each["keyid"] for each in new["certificates"]] == [made["keyid"], new["keyid"]]
    assert [(each["since"], each["until"]) for each in new["certificates"]] == [(0, 2), (2, None)]
    assert (new["log"], new["vrf"]) == (made["log"], made["vrf"])
    (handover,) = {*(model / "log" / "statements").iterdir()} - {stated}
    keys = parse_keys(published.read_bytes())
    assert verify_envelope(handover.read_bytes(), keys, 1)["predicate"]["reason"] == "rotated"
    words = sisa("certificate", "show", "-m", model, handover.stem)[1]
    assert f"  rotated: {new['keyid']} signs entries from 2 on" in words.splitlines()
    last = ask("keys", "rotate", "-m", model, "--leaked", "--until", 2)
    assert [each["until"] for each in last["certificates"]] == [2, 2, None]
    with pytest.raises(Refused):
        verify_envelope(handover.read_bytes(), parse_keys(published.read_bytes()), 2)


def test_evidence_begins_anew_with_other_keys_and_another_log(
    model: Path, ask: Ask, tmp_path: Path
) -> None:
    made = ask("keys", "init", "-m", model)
    shutil.rmtree(made["directory"])
    assert "other keys signed" in ask("keys", "init", "-m", model, code=2)["error"]["message"]
    (model / "log").rename(tmp_path / "old-log")
    keys = parse_keys(Path(ask("keys", "init", "-m", model)["published"]).read_bytes())
    (stated,) = (model / "log" / "statements").iterdir()
    predicate = verify_envelope(stated.read_bytes(), keys, 0)["predicate"]
    assert (predicate["sequence"], predicate["previous"]) == (0, "")


def test_an_auditor_follows_the_hand_overs(model: Path, ask: Ask, tmp_path: Path) -> None:
    made = ask("keys", "init", "-m", model)
    old = shutil.copy(made["published"], tmp_path / "old.json")
    ask("keys", "check", made["published"], "--trusted", old)
    for _ in range(2):
        new = ask("keys", "rotate", "-m", model)
    check = ("keys", "check", new["published"], "--trusted", old)
    error = ask(*check, code=4)
    assert error["error"]["type"] == "IntegrityError"
    found = ask(*check, "--log", model / "log")
    assert found == {"ok": True, "model": NAME, "keyid": new["keyid"], "num_keys": 3}


def test_words_name_the_file_and_the_key(model: Path, ask: Ask, sisa: Sisa) -> None:
    made = ask("keys", "init", "-m", model)
    code, words, _ = sisa("keys", "show", "-m", model)
    assert code == 0
    assert made["published"] in words
    assert f"{made['keyid']}, ed25519, entries from 0 on" in words
    words = sisa("keys", "rotate", "-m", model, "--leaked", "--until", "0")[1]
    assert f"{made['keyid']}, ed25519, no entries" in words
    assert "entries 1 to 2\n" in sisa("keys", "rotate", "-m", model)[1]


def test_nothing_secret_is_printed_or_logged(
    model: Path, sisa: Sisa, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    done = [sisa("keys", each, "-m", model, "--json") for each in ("init", "show", "rotate")]
    printed = [out + err for _, out, err in done]
    keys = model.parent / "state" / "sisa" / "evidence-keys" / NAME
    for path in keys.glob("*.key"):
        data = path.read_bytes()
        forms = [data.hex(), data.split(b"\n")[1].decode()] if data.startswith(b"-") else [data.hex()]
        assert not any(each in text for each in forms for text in (*printed, caplog.text))
        assert data not in b"".join(each.read_bytes() for each in model.rglob("*") if each.is_file())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["show"], 2, "sisa keys init"),
        (["rotate"], 2, "sisa keys init"),
        (["rotate", "--until", "3"], 2, "--lost or --leaked"),
        (["init", "--signer", "ssh-agent:"], 2, "--public-key"),
        (["init", "--public-key", "nowhere.pem"], 2, "nowhere.pem"),
    ],
)
def test_bad_usage_changes_nothing(
    model: Path, ask: Ask, arguments: list[str], code: int, says: str
) -> None:
    error = ask("keys", *arguments, "-m", model, code=code)["error"]
    assert says in repr(error)
    assert error["message"]
    assert not (model / "log").exists()
    assert not (model.parent / "state" / "sisa" / "evidence-keys").exists()


def test_another_writer_keeps_keys_from_being_made(model: Path, ask: Ask) -> None:
    with writer_lock(model / LOCK):
        ask("keys", "init", "-m", model, code=5)


def test_the_run_file_names_the_directory(model: Path, tmp_path: Path) -> None:
    config = RunConfig.from_canonical(read_description(model)["config"])
    assert evidence_keys_dir(config, NAME) == state_dir() / "evidence-keys" / NAME
    there = config.model_validate({**config.model_dump(), "signing": {"keys": tmp_path / "there"}})
    assert evidence_keys_dir(there, NAME) == tmp_path / "there" / NAME


def test_the_doctor_finds_keys_that_others_may_read(model: Path, ask: Ask) -> None:
    made = ask("keys", "init", "-m", model)
    assert diagnose(model).healthy
    keys = Path(made["directory"])
    keys.chmod(0o755)
    (keys / "log.key").chmod(0o644)
    found = diagnose(model).findings
    assert {(each.kind, each.where) for each in found} == {
        ("mode", str(each)) for each in (keys, keys / "log.key")
    }
    assert repair(open_model(model)).after.healthy
