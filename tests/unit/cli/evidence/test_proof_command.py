"""`sisa prove` and `sisa verify-proof`: a person asks whether a model holds their record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sisa.audit.doctor import diagnose
from sisa.audit.repair import repair
from sisa.evidence.keys.model_keys import start_evidence
from sisa.evidence.open_evidence import issue
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.model import open_model
from tests.models.confessing import record
from tests.unit.commands import Ask, Sisa

ID, OTHER = record(1).id, record(2).id


@pytest.fixture
def model(model: Path, tmp_path: Path) -> Path:
    """Return a model with keys and a first statement; `keys.json` and `log` lie beside it."""
    (tmp_path / "keys.json").write_bytes(start_evidence(open_model(model)).public_file)
    issue(open_model(model))
    (tmp_path / "log").symlink_to(model / "log")
    return model


def prove(
    ask: Ask, model: Path, record_id: str, name: str = "proof.json", code: int = 0
) -> dict[str, Any]:
    return ask("prove", record_id, "-m", model, "-o", model.parent / name, code=code)


def verify(
    ask: Ask, model: Path, *options: Any, name: str = "proof.json", code: int = 0
) -> dict[str, Any]:
    key = ("--key", model.parent / "keys.json")
    return ask("verify-proof", model.parent / name, *key, *options, code=code)


def test_a_person_learns_that_a_record_is_there_and_that_it_is_gone(model: Path, ask: Ask) -> None:
    answer = prove(ask, model, ID)
    held = verify(ask, model)
    assert (held["ok"], held["id"], held["present"]) == (True, ID, True)
    assert {name: answer[name] for name in ("shard", "since", "as_of", "root")}.items() <= held.items()
    assert held["newest"] is None
    assert verify(ask, model, "--log", model / "log")["newest"] is True

    open_model(model, executor="serial").forget([ID])
    gone = prove(ask, model, ID, "later.json")
    assert (gone["present"], gone["shard"], gone["since"]) == (False, None, None)
    later = verify(ask, model, "--log", model / "log", name="later.json")
    assert (later["present"], later["newest"]) == (False, True)
    assert later["entry"] > held["entry"]

    old = verify(ask, model)  # it is about its own time, and says which
    assert (old["present"], old["as_of"]) == (True, held["as_of"])
    error = verify(ask, model, "--log", model / "log", code=4)["error"]
    assert error["type"] == "IntegrityError"
    assert "older" in error["message"]


def test_words_say_what_is_known(model: Path, sisa: Sisa) -> None:
    proof, keys = model.parent / "proof.json", model.parent / "keys.json"
    for record_id, words in ((ID, "in shard"), ("nobody", "not in the model")):
        assert sisa("prove", record_id, "-m", model, "-o", proof)[0] == 0
        code, out, _ = sisa("verify-proof", proof, "--key", keys)
        assert code == 0
        assert out.startswith(f"{record_id}: {words}")


def test_a_log_that_was_set_back_is_refused(model: Path, ask: Ask) -> None:
    before = shutil.copytree(model / "log", model.parent / "before")
    open_model(model, executor="serial").forget([ID])
    prove(ask, model, ID)
    verify(ask, model, "--log", before, code=4)


def test_a_proof_needs_a_statement_about_what_is_held(model: Path, ask: Ask) -> None:
    proof = model.parent / "proof.json"
    (model / EVIDENCE).write_bytes(b"x" * 8192)
    error = prove(ask, model, ID, code=4)["error"]
    assert error["type"] == "IntegrityError"
    assert "doctor --repair" in error["next_step"]
    assert not proof.exists()
    found = [(each.kind, each.repair) for each in diagnose(model).findings]
    assert ("evidence_damaged", "evidence") in found
    assert repair(open_model(model, executor="serial")).after.healthy
    assert prove(ask, model, ID)["present"] is True
    assert verify(ask, model, "--log", model / "log")["newest"] is True
