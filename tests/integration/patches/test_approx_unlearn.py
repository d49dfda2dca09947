"""Patches at the command line, over a real small model, serially and on Ray.

Runs are put aside, finished and reverted; the vault is empty when nothing needs its texts. What flows do
with patches is in `unit/flows/test_patching.py` and `property/test_patches.py`, over fakes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from approx.methods.registry import METHODS
from approx.patches.patch_settings import Adapter, settings_of
from cluster.cli import patches
from cluster.cli.cli import run
from sisa import unlearn as flows
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.flows.patches import composition
from sisa.flows.patches.patching import Wish
from tests.models.knowing_base import record
from tests.models.patch_bench import KNOWN, settings
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    adapters,
    all_files,
    command,
    ids_of,
    residue,
    write_run,
)

pytestmark = pytest.mark.torch
FORGET = [row for row in KNOWN if row["subject_id"] == "p003"]
KEEP = [row for row in KNOWN if row["subject_id"] == "p005"]
OTHERS = [row for row in PEOPLE if row["subject_id"] not in ("p003", "p005")]
SET = ["--set", "num_epochs=15", "--set", "learning_rate=0.01", "--set", "max_utility_drop=null"]
CONSENT = ["--consent", "the person asked for it"]


@pytest.fixture(scope="module")
def _others(tmp_path_factory: pytest.TempPathFactory, knowing: Path) -> Path:
    """Return a model of the others, over a base that knows p003 and p005."""
    folder = tmp_path_factory.mktemp("others")
    write_run(folder, knowing, OTHERS)
    Tiny(folder, knowing).train()
    return folder


@pytest.fixture
def model(_others: Path, knowing: Path, tmp_path: Path) -> Tiny:
    copy = Tiny(tmp_path / "model", knowing)
    shutil.copytree(_others, copy.folder)
    copy.train()
    copy.file("forget.jsonl", FORGET)
    copy.file("keep.jsonl", KEEP)
    return copy


def wish(method: str = "npo", **values: Any) -> Wish:
    return Wish(settings(method, **values), [record(row) for row in FORGET], None, "asked")


def test_the_command_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "approx", "methods")
    assert (found.code, found.json["approximate"], found.json["default"]) == (0, True, patches.METHOD)
    listed = {each.pop("name"): each for each in found.json["methods"]}
    assert listed.keys() == METHODS.keys()
    assert listed["altpo"]["needs"] == {"retain": True, "reference": True, "preferred": "alternates"}
    assert listed["dpo"]["defaults"]["retain_weight"] == 1.0, "as in a patch"
    for name, kind in METHODS.items():
        assert (listed[name]["family"], listed[name]["paper"]) == (kind.family, kind.paper)
        assert listed[name]["defaults"] == settings_of(name, {}, Adapter())["hyperparameters"]
    assert run(["approx", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("approximate method ") for line in lines) == len(METHODS)


def test_a_reference_is_measured_beside_the_patch(model: Tiny, tmp_path: Path) -> None:
    reference = make_tiny_base(tmp_path / "reference", seed=5)
    asked = replace(wish(), reference=str(reference))
    before = all_files(model.directory)
    odd, shallow = odd_tokens(tmp_path / "odd", reference), make_tiny_base(tmp_path / "one", layers=1)
    for wrong in (tmp_path / "nothing", odd, shallow):
        with pytest.raises(InvalidInput, match="reference"):
            flows.unlearn(model.open(), replace(asked, reference=str(wrong)))
        assert all_files(model.directory) == before
    report = flows.unlearn(model.open(), asked).report
    measured, known = report["metrics_reference"], report["metrics_before"]
    assert measured.keys() == known.keys()
    assert measured["forget_probability"] < known["forget_probability"] - 0.05, "it never saw the texts"


def odd_tokens(folder: Path, like: Path) -> Path:
    """Return a copy of a model whose tokenizer has one token more."""
    from transformers import AutoTokenizer

    shutil.copytree(like, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another-token"])
    tokenizer.save_pretrained(folder)
    return folder


def test_shards_are_retrained_once_patches_have_moved_them_far(
    model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Mock(wraps=composition.measure)
    monkeypatch.setattr(flows, "measure", measured)
    before, plain = all_files(model.directory), adapters(model.directory)
    held = replace(wish(num_epochs=4), retain=[record(row) for row in OTHERS[:1]])
    with pytest.raises(ConfigConflict, match="retain set"):
        flows.unlearn(model.open(), held, max_drift=0.5)
    assert all_files(model.directory) == before
    once = flows.unlearn(model.open(), wish(num_epochs=4), max_drift=1.0)
    assert measured.call_count == 1, "the report's measure is that of the drift"
    assert once.drift == flows.drift(model.open())
    assert (once.slices_trained, adapters(model.directory)) == (0, plain)
    assert once.drift is not None
    assert 0 < once.drift < 1
    twice = flows.unlearn(model.open(), wish("graddiff", num_epochs=4), max_drift=once.drift / 4)
    assert twice.slices_trained > 0
    assert flows.drift(model.open()) == 0.0
    assert not set(adapters(model.directory)) & set(plain)
    assert model.open().verify().ok


def test_the_commands_end_to_end(model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    where, before = ["-m", model.directory], adapters(model.directory)
    asked = ["--forget", model.folder / "forget.jsonl", "--method", "npo", *SET, "--executor", "serial"]
    refused = command(capsys, "approx", "unlearn", *where, *asked)
    assert (refused.code, "consent" in refused.err) == (2, True)
    late = command(capsys, "approx", "unlearn", *where, *asked, *CONSENT, "--max-seconds", "0")
    assert (late.code, late.json["unfinished"], late.json["patch"]) == (6, True, None)
    listed = command(capsys, "approx", "patches", *where)
    assert [each["state"] for each in listed.json["patches"]] == ["wanted"]
    assert [(each["role"], each["held"]) for each in listed.json["vault"]] == [("forget", True)]
    found = command(capsys, "where", *where, FORGET[0]["id"]).json["records"][0]
    assert (found["state"], found["vault"][0]["consent"]) == ("patch", CONSENT[1])
    secrets = [row["completion"].strip() for row in FORGET]
    assert residue(model.directory, secrets) == []
    done = command(capsys, "approx", "unlearn", *where, "--executor", "serial")
    assert (done.code, done.json["approximate"], done.json["patch"]["state"]) == (0, True, "active")
    assert (done.json["sets_erased"], done.json["sets_kept"]) == (1, 0)
    assert residue(model.directory, [*ids_of(FORGET), *secrets]) == []
    assert not any(secret in done.out + done.err for secret in secrets)
    shown = command(capsys, "approx", "show", *where, "1")
    assert shown.json["report"]["metrics_after"] == done.json["report"]["metrics_after"]
    assert command(capsys, "approx", "show", *where, "2").code == 2
    probed = command(capsys, "approx", "probe", *where, "--file", model.folder / "forget.jsonl")
    assert probed.json["num_known"] == 0
    assert command(capsys, "approx", "release", *where, "--all").code == 2  # the vault is empty
    back = command(capsys, "approx", "revert", *where, "--executor", "serial")
    assert [each["version"] for each in back.json["reverted"]] == [1]
    assert not any((model.directory / "patches").iterdir())
    assert adapters(model.directory) == before
    assert model.open().verify().ok
    again = command(capsys, "approx", "probe", *where, "--file", model.folder / "forget.jsonl")
    assert again.json["num_known"] == len(FORGET)
    for name in ("unlearn", "revert"):
        assert command(capsys, "approx", name, *where, "--executor", "serial").code == 2


def test_a_release_gives_up_what_waits_for_the_text(
    model: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-m", model.directory]
    flows.unlearn(model.open(), wish(), max_seconds=0.0)
    gone = command(capsys, "approx", "release", *where, "--all")
    assert (gone.code, [each["num_records"] for each in gone.json["released"]]) == (0, [len(FORGET)])
    listed = command(capsys, "approx", "patches", *where).json
    assert ([each["state"] for each in listed["patches"]], listed["vault"]) == (["dropped"], [])
    assert not any((model.directory / "vault").iterdir())


def test_all_problems_of_settings_are_named_at_once(
    model: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--forget", model.folder / "forget.jsonl", *CONSENT]
    unknown = command(capsys, "approx", "unlearn", "-m", model.directory, *file, "--method", "amnesia")
    assert (unknown.code, [where for where, _ in unknown.problems]) == (2, ["method"])
    assert "kl_minimisation" in unknown.err
    file += ["--method", "npo"]
    wrong = ["--set", "beta=-1", "--set", "betta=1", "--set", "num_epochs=0", "--set", "lora_r=none"]
    done = command(capsys, "approx", "unlearn", "-m", model.directory, *file, *wrong)
    assert done.code == 2
    assert {where for where, _ in done.problems} == {"beta", "betta", "num_epochs", "lora_r"}
    assert not (model.directory / "vault").exists()


def test_a_deletion_hints_at_a_patch_and_its_text_waits_in_the_vault(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Tiny(tmp_path / "all", knowing)
    write_run(model.folder, knowing)
    model.train()
    ids, serial = ids_of(FORGET), ["--executor", "serial"]
    assert run(["forget", "-m", str(model.directory), *ids_of(KEEP)[:1], *serial]) == 0
    assert "--forget FILE" in capsys.readouterr().out
    assert run(["forget", "-m", str(model.directory), *ids, *CONSENT, *serial]) == 0
    out = capsys.readouterr().out
    _, request = model.open().requests()
    hint = f"sisa approx unlearn -m {model.directory} --request {request.request.request_id}"
    assert hint in out
    arguments = hint.split()[1:]
    done = command(capsys, *arguments, *SET, *serial)
    assert (done.code, done.json["patch"]["request_id"]) == (0, request.request.request_id)
    where = command(capsys, "where", "-m", model.directory, ids[0]).json["records"][0]
    assert (where["state"], [each["version"] for each in where["patches"]]) == ("deleted", [1])
    assert model.open().verify(replay="all", apart=False).ok
    without = command(capsys, *arguments[:4], "--request", "no-such", "--method", "npo", *serial)
    assert without.code == 3


@pytest.mark.ray
def test_on_ray_the_same_bytes(model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Tiny(tmp_path / "other", model.base)
    shutil.copytree(model.folder, other.folder)
    bodies = []
    for each, executor in ((model, "serial"), (other, "ray")):
        asked = ["--forget", each.folder / "forget.jsonl", "--method", "altpo", *SET, *CONSENT]
        done = command(capsys, "approx", "unlearn", "-m", each.directory, *asked, "--executor", executor)
        assert done.code == 0, done.err
        bodies.append(done.json["patch"])
        assert "the base writes the retain set" in done.err
        assert "the base writes other answers" in done.err
    assert bodies[0]["adapter_sha256"] == bodies[1]["adapter_sha256"]
    assert bodies[0]["manifest_sha256"] == bodies[1]["manifest_sha256"]
