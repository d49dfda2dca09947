"""Commands that outsiders run without the model: what they import, and what they say of bad files."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from tests.models.confessing import DELETED, record
from tests.models.programs.imported import imported_by
from tests.unit.commands import Ask

HEAVY = {"torch", "transformers", "ray", "faiss", "numpy", "scipy", "datasets"}
HEAVY |= {"sqlalchemy", "pydantic", "securesystemslib"}
FILES = {"verify-certificate": "certificate.json", "verify-proof": "proof.json"}
CHECKS = {
    "check-adapter": ("export", "--feed", "log/revocations.json", "--key", "log/keys.json"),
    "keys check": ("log/keys.json", "--trusted", "log/keys.json", "--log", "log"),
    "log check": ("log", "--key", "log/keys.json"),
    **{name: (file, "--key", "log/keys.json", "--log", "log") for name, file in FILES.items()},
}


@pytest.fixture
def outside(model: Path, ask: Ask, tmp_path: Path) -> Path:
    """Return a folder with what outsiders hold after a deletion; the model is away."""
    folder = tmp_path / "outside"
    ask("keys", "init", "-m", model)
    request = ask("forget", "-m", model, record(DELETED).id)["request_id"]
    ask("export", "-m", model, "--to", folder / "export")
    ask("certificate", "export", "-m", model, request, "-o", folder / "certificate.json")
    ask("prove", record(1).id, "-m", model, "-o", folder / "proof.json")
    ask("revocations", "publish", "-m", model)
    shutil.copytree(model / "log", folder / "log")
    model.rename(tmp_path / "away")
    return folder


def test_checks_need_neither_the_model_nor_its_libraries(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outside)
    before = child_seconds()
    loaded = {name: imported_by((*name.split(), *given)) for name, given in CHECKS.items()}
    assert child_seconds() - before < len(CHECKS)
    expected = {name: {"cryptography"} for name in CHECKS} | {"verify-proof": {"cryptography", "nacl"}}
    named = HEAVY | {"cryptography", "nacl"}
    assert {name: found & named for name, found in loaded.items()} == expected


def child_seconds() -> float:
    """Return the processor's time of ended processes, which others hardly change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", FILES)
def test_what_is_refused_names_the_file_and_the_next_step(outside: Path, ask: Ask, command: str) -> None:
    file, keys = outside / FILES[command], outside / "log" / "keys.json"
    check = (command, file, "--key", keys)
    ask(*check)
    for path, other in ((file, keys), (keys, file)):
        whole = path.read_bytes()
        for data in (b"", whole[:-9], other.read_bytes()):
            path.write_bytes(data)
            error = ask(*check, code=4)["error"]
            assert (error["type"], error["where"]) == ("IntegrityError", str(path))
            assert error["message"]
            assert error["next_step"]
            assert error["expected"] or error["got"]
        path.unlink()
        assert ask(*check, code=2)["error"]["type"] == "InvalidInput"
        path.write_bytes(whole)


@pytest.mark.parametrize("command", ["log check", "verify-certificate"])
def test_a_changed_log_is_refused_by_the_file_and_with_a_next_step(
    outside: Path, ask: Ask, command: str
) -> None:
    where, *options = (str(outside / "log"), "--key", outside / "log" / "keys.json")
    check = (*command.split(), where, *options)
    if command == "verify-certificate":
        check = (command, outside / FILES[command], *options, "--log", where)
    statements = sorted((outside / "log" / "statements").iterdir())
    for path in (outside / "log" / "checkpoint", *(statements if "certificate" in command else ())):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        error = ask(*check, code=4)["error"]
        assert error["where"].startswith(where)
        assert error["next_step"]
        path.write_bytes(whole)
    (outside / "log").rename(outside / "moved")
    (outside / "log").mkdir()
    (outside / "moved" / "keys.json").rename(outside / "log" / "keys.json")
    error = ask(*[f"{each}-elsewhere" if each == where else each for each in check], code=2)["error"]
    assert (error["type"], error["where"]) == ("InvalidInput", f"{where}-elsewhere")
