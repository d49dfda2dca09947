"""`sisa revocations` and `sisa check-adapter`: a copy of an export, before and after a deletion."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from sisa.verifier.certificate import EXACT
from tests.models.confessing import DELETED, NAME, record
from tests.unit.commands import Ask


@pytest.fixture
def copies(model: Path, ask: Ask, tmp_path: Path) -> Path:
    """Export the model, and return copies that no deletion reaches."""
    ask("keys", "init", "-m", model)
    ask("export", "-m", model, "--to", tmp_path / "out")
    return Path(shutil.copytree(tmp_path / "out" / "v1", tmp_path / "elsewhere"))


def forget(model: Path, ask: Ask) -> None:
    ask("forget", "-m", model, record(DELETED).id, "--executor", "serial")


def published(model: Path, *options: Any) -> list[Any]:
    log = model / "log"
    return ["--feed", log / "revocations.json", "--key", log / "keys.json", *options]


def test_a_deletion_revokes_a_copy_and_no_other(model: Path, ask: Ask, copies: Path) -> None:
    before = ask("revocations", "publish", "-m", model)
    assert (before["feed"], before["revoked"]) == (str(model / "log" / "revocations.json"), 0)
    checked = ask("check-adapter", copies, *published(model))
    assert (checked["revoked"], checked["model"]) == (False, NAME)
    assert [(each["revoked"], each["signed"]) for each in checked["files"]] == [(False, True)] * 2
    forget(model, ask)
    after = ask("revocations", "publish", "-m", model)
    assert (after["pending"], after["reinstated"]) == (0, 0)
    assert after["revoked"] > 1
    assert after["sequence"] > before["sequence"]
    checked = ask("check-adapter", copies, *published(model), code=7)
    (gone,) = (each for each in checked["files"] if each["revoked"])
    (kept,) = (each for each in checked["files"] if not each["revoked"])
    assert json.loads(Path(gone["path"]).read_text())["touched"].count(record(DELETED).id) == 1
    (certificate,) = statements(model, EXACT)
    assert gone["certificate"] == certificate.stem
    assert (kept["certificate"], kept["date"]) == (None, None)
    assert not ask("check-adapter", kept["path"], *published(model))["revoked"]


def test_of_a_copied_model_adapters_alone_are_judged(model: Path, ask: Ask, copies: Path) -> None:
    whole = shutil.copytree(model, copies.parent / "whole")
    forget(model, ask)
    ask("revocations", "publish", "-m", model)
    checked = ask("check-adapter", whole, *published(model), code=7)
    assert {Path(each["path"]).name for each in checked["files"]} == {"adapter_model.safetensors"}
    skipped = {Path(each).name for each in checked["skipped"]}
    assert "optimizer.safetensors" in skipped


def statements(model: Path, kind: str) -> list[Path]:
    """Return the statements of a type in the log; each is named by its sha256."""
    found = (model / "log" / "statements").iterdir()
    return [
        each for each in found if kind.encode() in b64decode(json.loads(each.read_text())["payload"])
    ]


def test_an_older_feed_is_refused(model: Path, ask: Ask, copies: Path, tmp_path: Path) -> None:
    old = tmp_path / "feeds" / "old.json"
    number = ask("revocations", "publish", "-m", model, "-o", old)["sequence"]
    forget(model, ask)
    ask("revocations", "publish", "-m", model)
    held = (copies, "--feed", old, "--key", model / "log" / "keys.json", "--not-older-than")
    ask("check-adapter", *held, number)
    for seen in (number + 1, model / "log" / "revocations.json"):
        error = ask("check-adapter", *held, seen, code=4)["error"]
        assert error["message"] == "the feed is behind one seen before"
        assert error["next_step"] == "get the newest feed"
    ask("check-adapter", copies, *published(model, "--not-older-than", old), code=7)


def test_what_is_no_feed_of_the_model_is_refused(
    model: Path, ask: Ask, copies: Path, tmp_path: Path
) -> None:
    feed, key = model / "log" / "revocations.json", model / "log" / "keys.json"
    forget(model, ask)
    ask("revocations", "publish", "-m", model)
    (certificate,) = statements(model, EXACT)
    for wrong in (key, certificate, copies / "shard-00000" / "README.md"):
        assert ask("check-adapter", copies, "--feed", wrong, "--key", key, code=4)["error"]["message"]
    error = ask("check-adapter", copies, "--feed", feed, "--key", feed, code=4)["error"]
    assert error["type"] == "IntegrityError"
    for absent in (tmp_path / "absent", copies):
        ask("check-adapter", copies, "--feed", absent, "--key", key, code=2)
    ask("check-adapter", tmp_path / "absent", *published(model), code=2)


def test_changed_weights_are_refused(model: Path, ask: Ask, copies: Path) -> None:
    """No feed knows their digest, so nothing can be said of them."""
    ask("revocations", "publish", "-m", model)
    weights = copies / "shard-00000" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    error = ask("check-adapter", copies, *published(model), code=4)["error"]
    assert error["message"] == "these weights are not those that were exported"
    (weights.parent / "model.sig").unlink()
    checked = ask("check-adapter", copies, *published(model))
    assert [each["signed"] for each in checked["files"]] == [False, True]


def test_a_model_without_keys_signs_nothing(model: Path, ask: Ask, tmp_path: Path) -> None:
    error = ask("revocations", "publish", "-m", model, code=2)["error"]
    assert "sisa keys init" in error["next_step"]
    (made, _) = ask("export", "-m", model, "--to", tmp_path / "out")["adapters"]
    assert "model.sig" not in {each.name for each in Path(made).iterdir()}
    assert "check-adapter" not in (Path(made) / "README.md").read_text()


def test_a_deletion_erases_the_signature_with_its_export(model: Path, ask: Ask, copies: Path) -> None:
    out = copies.parent / "out" / "v1"
    assert all((each / "model.sig").is_file() for each in out.iterdir())
    forget(model, ask)
    (kept,) = out.iterdir()
    assert (kept / "model.sig").is_file()
    assert ask("doctor", "-m", model)["healthy"]
    assert ask("sweep", "-m", model, record(DELETED).id, "--also", out)["clean"]


def test_model_signing_verifies_an_export_with_the_published_key(model: Path, copies: Path) -> None:
    verifying = pytest.importorskip("model_signing").verifying
    client = verifying.Config().use_elliptic_key_verifier(public_key=model / "log" / "exports.pem")
    for folder in copies.iterdir():
        (folder / ".gitattributes").write_text("*.safetensors lfs")  # a hub's own
        client.verify(folder, folder / "model.sig")
    (copies / "shard-00000" / "README.md").write_text("another card")
    with pytest.raises(ValueError, match=r"Hash mismatch for .*README"):
        client.verify(copies / "shard-00000", copies / "shard-00000" / "model.sig")
