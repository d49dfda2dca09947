"""Exports as the commands make and report them, over real directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sisa.core.ports import Change
from sisa.flows.ingest import add
from sisa.flows.wiring.ledger_place import LOCK
from sisa.model import Model
from sisa.store.blobs.files import TEMPORARY_PREFIX, writer_lock
from sisa.store.exports import DirectoryExports
from sisa.store.ledger.ledger import SqlLedger
from tests.crash import Crash
from tests.fakes.ports import fake_record
from tests.models.confessing import DELETED, context_of, record
from tests.unit.commands import Ask

RECORD = record(DELETED).id


def test_the_commands_report_exports(model: Path, tmp_path: Path, ask: Ask) -> None:
    at, out = ("-m", model), tmp_path / "out"
    made = ask("export", *at, "--to", out)["adapters"]
    assert [Path(each).parent for each in made] == [out / "v1"] * 2
    (held,) = ask("where", *at, RECORD)["records"]
    (stale,) = held["exports"]
    assert ask("forget", *at, RECORD, "--dry-run")["would_erase"]["exports"] == 1
    (kept,) = {*made} - {stale}
    outcome = ask("forget", *at, RECORD, "--executor", "serial")
    assert (outcome["exports_erased"], outcome["exports_missing"]) == (1, [])
    assert not Path(stale).exists()
    assert sorted(each.name for each in Path(kept).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [each["path"] for each in ask("status", *at)["exports"]] == [kept]
    found = ask("sweep", *at, RECORD)
    assert found["clean"]
    assert kept in found["places"]


def test_the_commands_report_a_moved_export(model: Path, tmp_path: Path, ask: Ask) -> None:
    at, out, away = ("-m", model), tmp_path / "out", tmp_path / "away"
    ask("export", *at, "--to", out)
    (stale,) = ask("where", *at, RECORD)["records"][0]["exports"]
    out.rename(away)
    ask("request", "submit", *at, RECORD, "--approver", "dpo")
    outcome = ask("run", *at, "--executor", "serial")
    assert outcome["exports_missing"] == [stale]
    assert [each["exports_erased"] for each in outcome["requests"]] == [0]
    standing = {each["path"]: each["standing"] for each in ask("status", *at)["exports"]}
    assert standing[stale] == "gone"
    assert sorted(map(str, standing.values())) == ["None", "gone"]
    assert [each["kind"] for each in ask("sweep", *at, code=4)["residue"]] == ["missing_export"]
    assert [each["kind"] for each in ask("doctor", *at)["findings"]] == ["export"]
    away.rename(out)
    assert [each["kind"] for each in ask("sweep", *at, code=4)["residue"]] == ["stale_adapter"]
    done = ask("run", *at, "--executor", "serial")
    assert (done["exports_missing"], Path(stale).exists()) == ([], False)
    assert ask("sweep", *at)["clean"]
    assert ask("doctor", *at)["healthy"]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_an_export_that_was_killed_is_none_of_a_later_deletion(
    model: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Before its first directory was whole, before its second, and before its last commit."""
    at, out, calls = ("-m", model), tmp_path / "out", 0
    write, commit = DirectoryExports.write, SqlLedger.commit

    def writes(store: DirectoryExports, path: str, content: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > written:
            half = Path(path).with_name(f"{TEMPORARY_PREFIX}half")
            half.mkdir(parents=True)
            (half / "adapter_model.safetensors").write_bytes(b"weights")
            raise Crash
        write(store, path, content)

    def commits(ledger: SqlLedger, change: Change) -> int:
        if any(each.state == "clean" for each in change.exports):
            raise Crash
        return commit(ledger, change)

    with monkeypatch.context() as killed:
        killed.setattr(DirectoryExports, "write", writes)
        killed.setattr(SqlLedger, "commit", commits)
        with pytest.raises(Crash):
            Model(model, executor="serial").export(out)
    outcome = ask("forget", *at, RECORD, "--executor", "serial")
    assert outcome["exports_missing"] == []
    found = ask("sweep", *at, RECORD)
    assert found["clean"]
    left = ask("status", *at)["exports"]
    assert {each["state"] for each in left} <= {"clean"}
    assert sorted(out.rglob("*.safetensors")) == sorted(
        Path(each["path"], "adapter_model.safetensors") for each in left
    )
    assert list(out.rglob(f"{TEMPORARY_PREFIX}*")) == []


def test_a_lost_export_is_given_up_on_a_persons_word(model: Path, tmp_path: Path, ask: Ask) -> None:
    at, out = ("-m", model), tmp_path / "out"
    ask("export", *at, "--to", out)
    (stale,) = ask("where", *at, RECORD)["records"][0]["exports"]
    shutil.rmtree(out)
    request_id = ask("forget", *at, RECORD, "--executor", "serial")["request_id"]
    assert not ask("sweep", *at, code=4)["clean"]
    assert ask("gc", *at)["given_up"] == []
    assert ask("gc", *at, "--lost-exports")["given_up"] == [stale]
    assert ask("sweep", *at)["clean"]
    shown = ask("request", "show", *at, request_id)
    assert shown["state"] == "completed"
    assert shown["events"][-1]["note"] == "1 lost exports were given up"
    assert ask("gc", *at, "--lost-exports")["given_up"] == []


def test_a_clean_export_of_a_retired_checkpoint_is_no_residue(
    model: Path, tmp_path: Path, ask: Ask
) -> None:
    ask("export", "-m", model, "--to", tmp_path / "out")
    with context_of(model) as context:
        add(context, [fake_record(number) for number in range(100, 130)])
    found = ask("sweep", "-m", model)
    assert (found["clean"], len(found["outdated_exports"])) == (True, 2)


def test_an_export_is_refused_while_somebody_writes(model: Path, tmp_path: Path, ask: Ask) -> None:
    with writer_lock(model / LOCK):
        ask("export", "-m", model, "--to", tmp_path / "out", code=5)
    assert not (tmp_path / "out").exists()
