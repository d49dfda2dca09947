"""`sisa doctor`: a healthy model has no finding, every defect is found, repairs restore the bytes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serve.tokens import Tokens
from sisa.audit.doctor import Diagnosis, diagnose
from sisa.audit.repair import RepairOutcome, repair_opened
from sisa.audit.verify import check_files
from sisa.config.config import RunConfig
from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.digest import Keyed
from sisa.core.domain import Chain, Head, Identity
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.events import Report, silent
from sisa.core.ports import Change, Executor, OnStage
from sisa.flows.context.served import model_digest
from sisa.flows.reconcile import reconcile
from sisa.flows.wiring.keys import PARTITION_KEY, witness_of
from sisa.flows.wiring.ledger_place import LEDGER, LOCK
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS, REPLAYS
from sisa.store.blobs.files import write_atomic, writer_lock
from sisa.store.blobs.keyring import write_secret
from sisa.store.ledger.sqlite import COMMIT_LOCK
from tests.crash import Fuse
from tests.fakes.ports import SECRET, changed
from tests.models.confessing import NAME, THEN, built_pair, content, context_of, use_fake_resources
from tests.unit.commands import Ask

Defect = Callable[[Path], object]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model after a deletion; tests must not change it."""
    return built_pair(tmp_path_factory.mktemp("pair"))[1]


@pytest.fixture
def model(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "model"))


def kinds(found: Diagnosis) -> list[str]:
    return sorted({each.kind for each in found.findings})


def repaired(model: Path, **options: Any) -> RepairOutcome:
    before = diagnose(model)
    with writer_lock(model / LOCK), context_of(model, **options) as context:
        done = repair_opened(context, model)
    return RepairOutcome(tuple(done), before, diagnose(model))


def state(model: Path) -> tuple[str, list[Head]]:
    with context_of(model) as context:
        return model_digest(context), context.stores.ledger.heads()


def checkpoint(model: Path, slice_: int) -> Path:
    """Return the directory of a checkpoint of shard 0."""
    with context_of(model) as context:
        held = [each for each in context.stores.ledger.checkpoints(0) if each.slice == slice_]
    return model / CHECKPOINTS / held[0].key


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def commit(model: Path, change: Change) -> None:
    with context_of(model) as context:
        context.stores.ledger.commit(change)


def execute(model: Path, statement: str) -> None:
    with closing(sqlite3.connect(model / LEDGER)) as connection:
        connection.execute(statement)
        connection.commit()


def test_a_ledger_on_a_network_file_system_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mounts(all: bool) -> list[SimpleNamespace]:
        there = [("/", "ext4"), (str(model.parent), "nfs4")] if all else []
        return [SimpleNamespace(mountpoint=at, fstype=kind) for at, kind in there]

    monkeypatch.setattr("psutil.disk_partitions", mounts)
    (found,) = diagnose(model).findings
    assert (found.kind, found.severity) == ("network_disk", "warning")
    assert "nfs4" in found.what


def test_a_deletion_that_is_dated_back_is_damage(model: Path) -> None:
    """Somebody forges the row and its checksum, but lacks the key of the witness."""
    with context_of(model) as context:
        tombstones = context.stores.ledger.tombstones()
        witness = witness_of(
            RunConfig.from_canonical(context.stores.ledger.meta()["config"]), Keyed(SECRET), NAME
        )
        witness.append(context.stores.ledger.event_head(), tombstones, ())
        (only,) = tombstones
        commit(model, Change(tombstones=[replace(only, deleted_at="2001-01-01T00:00:00+00:00")]))
    assert "recorded differently" in diagnose(model).findings[0].what
    with context_of(model) as context:
        (request,) = context.stores.ledger.requests()
        commit(
            model, Change(tombstones=tombstones, requests=[replace(request, committed_at="2001-01-01")])
        )
    assert "do not form one chain" in diagnose(model).findings[0].what


def test_modes_that_are_too_open_are_reported_by_room(model: Path) -> None:
    """Whoever can write to the directory can replace what is in it; weights may recite the text."""
    loose_modes(model)
    found = diagnose(model).findings
    messages = {each.where: each.what for each in found if not each.where.startswith(f"{LEDGER}-")}
    rooms = {RECORDS, INDEX, CHECKPOINTS}
    assert messages.keys() == {".", PARTITION_KEY, LEDGER, LOCK, COMMIT_LOCK, *rooms}
    assert messages["."] == "others may write to it (mode 777)"
    num_held = sum(1 for _ in (model / CHECKPOINTS).rglob("*"))
    assert f"others may use {1 + num_held} files and directories" in messages[CHECKPOINTS]
    assert repaired(model).after.healthy
    assert {path for path in model.rglob("*") if path.stat().st_mode & 0o077} == set()


def test_modes_of_a_services_files_are_reported_and_repaired(
    model: Path, service_files: tuple[str, ...]
) -> None:
    """A reader of these files learns a token or the requests; a writer can admit anybody."""
    assert diagnose(model).healthy
    for name in service_files:
        (model / name).chmod(0o666)
    found = diagnose(model)
    findings = {(each.where, each.kind, each.repair) for each in found.findings}
    assert findings == {(name, "mode", "mode") for name in service_files}
    with pytest.raises(IntegrityError, match="tokens can't be used"):
        Tokens(model).listed()
    assert repaired(model).after.healthy
    assert {(model / name).stat().st_mode & 0o777 for name in service_files} == {0o600}
    assert [each.name for each, _ in Tokens(model).listed()] == ["anna"]


# --- a healthy model, and none ---------------------------------------------------------------------


def test_a_healthy_model_has_no_finding_and_no_repair(model: Path, healthy: Path) -> None:
    done = repaired(model)
    assert (done.before.findings, done.before.ok, done.before.healthy) == ((), True, True)
    assert (done.done, done.after.healthy) == ((), True)
    assert content(model) == content(healthy)
    assert state(model) == state(healthy)


def test_a_directory_that_never_was_a_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        diagnose(tmp_path)


# --- what can be derived again ---------------------------------------------------------------------


def lose_first_stage(model: Path) -> None:
    shutil.rmtree(checkpoint(model, 0))


def lose_target(model: Path) -> None:
    shutil.rmtree(checkpoint(model, 2))


def lose_two_stages(model: Path) -> None:
    shutil.rmtree(checkpoint(model, 0))
    flip(checkpoint(model, 2) / ADAPTER_FILE)


def lose_index(model: Path) -> None:
    shutil.rmtree(model / INDEX)


def tamper_index(model: Path) -> None:
    flip(min((model / INDEX).iterdir()))


def surplus_vector(model: Path) -> None:
    with context_of(model) as context:
        (base,) = context.stores.ledger.indexes(0)
        wanted: dict[int, Any] = {row.vector_id: None for row in context.stores.ledger.rows(0)}
        wanted[1] = context.compute.embedder().embed(["of no record"])
        context.stores.ledger.commit(
            Change(indexes=[context.stores.index.build(0, base.root, base, wanted)])
        )


def change_head(model: Path, shard: int, **fields: Any) -> None:
    _, heads = state(model)
    commit(model, Change(heads=[replace(heads[shard], **fields)]))


def wrong_head(model: Path) -> None:
    stage = checkpoint(model, 0).name
    change_head(model, 0, key=stage, target=stage, depth=1)


def unknown_files(model: Path) -> None:
    write_atomic(model / RECORDS / ".tmp-a", b"half")
    write_atomic(checkpoint(model, 1) / "surplus", b"x")
    (model / REPLAYS).mkdir(0o700)


def loose_modes(model: Path) -> None:
    for path in (model, *model.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)


DERIVABLE: dict[str, tuple[Defect, list[str]]] = {
    "first stage lost": (lose_first_stage, ["checkpoint"]),
    "target lost": (lose_target, ["checkpoint"]),
    "adapter changed": (lambda model: flip(checkpoint(model, 1) / ADAPTER_FILE), ["checkpoint"]),
    "manifest cut": (
        lambda model: os.truncate(checkpoint(model, 2) / MANIFEST_FILE, 20),
        ["checkpoint"],
    ),
    "optimizer lost": (
        lambda model: (checkpoint(model, 1) / "optimizer.safetensors").unlink(),
        ["checkpoint"],
    ),
    "two stages lost": (lose_two_stages, ["checkpoint"]),
    "all lost": (lambda model: shutil.rmtree(model / CHECKPOINTS), ["checkpoint"]),
    "index lost": (lose_index, ["index"]),
    "index changed": (tamper_index, ["index"]),
    "index unknown": (lambda model: commit(model, Change(unindexed=[1])), ["index", "unknown"]),
    "surplus vector": (surplus_vector, ["index", "unknown"]),
    "head of a stage": (wrong_head, ["head"]),
    "head of nothing": (lambda model: change_head(model, 1, key="0" * 64), ["head"]),
    "head on the base": (lambda model: change_head(model, 1, key=None, depth=0), ["head"]),
    "wrong depth": (lambda model: change_head(model, 1, depth=1), ["head"]),
    "missing head": (lambda model: commit(model, Change(headless=[1])), ["head"]),
    "surplus head": (lambda model: commit(model, Change(heads=[Head(5, None, 0, None)])), ["head"]),
    "unknown files": (unknown_files, ["unknown"]),
}


@pytest.mark.parametrize(("spoil", "expected"), DERIVABLE.values(), ids=DERIVABLE)
def test_what_can_be_derived_comes_back_byte_for_byte(
    model: Path, healthy: Path, spoil: Defect, expected: list[str]
) -> None:
    spoil(model)
    done = repaired(model)
    found = done.before
    assert kinds(found) == expected
    assert found.ok == (not {"checkpoint", "index", "head"} & set(expected))
    assert all(each.repair and "--repair" in each.next_step for each in found.findings)
    assert done.done
    assert (done.after.findings, done.after.healthy) == ((), True)
    assert content(model) == content(healthy)
    assert state(model) == state(healthy)
    with context_of(model) as context:
        assert check_files(context)[1] == []


@pytest.mark.parametrize("number", range(1, 7))
def test_a_repair_that_is_cut_short_is_finished_by_the_next(
    model: Path, healthy: Path, number: int
) -> None:
    lose_two_stages(model)
    tamper_index(model)
    with context_of(model) as context, Fuse(number).on((context.stores.ledger, "commit")):
        repair_opened(context, model)
    with context_of(model) as context:
        repair_opened(context, model)
    assert content(model) == content(healthy)
    assert state(model) == state(healthy)


def test_the_served_model_is_never_a_damaged_one(model: Path) -> None:
    """The head leaves the damaged checkpoint in the commit that gives it up."""
    lose_target(model)
    with context_of(model) as context:
        heads: list[str | None] = []
        real = context.stores.ledger.commit

        def looking(change: Change) -> int:
            seq = real(change)
            heads.append(context.stores.ledger.heads()[0].key)
            assert {head.key for head in context.stores.ledger.heads()} <= {
                None,
                *(each.key for each in context.stores.ledger.checkpoints()),
            }
            return seq

        context.stores.ledger.commit = looking  # type: ignore[method-assign]
        repair_opened(context, model)
    assert heads[0] == checkpoint(model, 1).name
    assert heads[-1] == checkpoint(model, 2).name


def test_a_gap_is_trained_on_top_of_the_stage_before_it(model: Path) -> None:
    lose_middle = checkpoint(model, 1)
    shutil.rmtree(lose_middle)
    seen: list[Chain] = []

    class Looking:
        def __init__(self, inner: Executor) -> None:
            self.inner = inner

        def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
            seen.extend(chains)
            self.inner.run(chains, report, on_stage)

    with context_of(model) as context:
        real = context.compute.executor_for
        repair_opened(changed(context, executor_for=lambda store: Looking(real(store))), model)
    (chain,) = seen
    assert chain.parent is not None
    assert chain.parent.key == checkpoint(model, 0).name
    assert [job.key for job in chain.jobs] == [lose_middle.name]


def test_without_the_key_changed_rows_are_still_found(model: Path) -> None:
    change_row(model)
    lose_key(model)
    assert kinds(diagnose(model)) == ["key", "slice"]


def test_a_gap_that_was_trained_in_another_environment_is_reported(model: Path) -> None:
    lose_first_stage(model)
    done = repaired(model, numerics="another")
    assert any("another environment" in each for each in done.done)
    assert done.after.ok
    assert kinds(done.after) == ["gap"]
    with context_of(model) as context:
        assert check_files(context)[1] == []
        assert all(head.converged for head in context.stores.ledger.heads())


def test_a_left_over_log_is_reported_and_emptied(model: Path, healthy: Path) -> None:
    code = (
        "import os, sqlite3, sys\nc = sqlite3.connect(sys.argv[1])\n"
        "c.execute('PRAGMA journal_mode=WAL')\nc.execute(\"INSERT INTO meta VALUES ('a', 'b', 0)\")\n"
        "c.execute(\"DELETE FROM meta WHERE key = 'a'\")\nc.commit()\nos._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(model / LEDGER)], check=False)
    found = diagnose(model)
    assert (kinds(found), found.ok) == (["log"], True)
    repaired(model)
    assert diagnose(model).healthy
    assert content(model) == content(healthy)


# --- what can't ------------------------------------------------------------------------------------


def tamper_slice(model: Path) -> None:
    flip(min((model / RECORDS).iterdir()))


def change_row(model: Path) -> None:
    """Change a row and its checksum, so that the ledger has other content."""
    with context_of(model) as context:
        rows = context.stores.ledger.rows(0)
    changed = [replace(row, record_digest="x") for row in rows[::2]]
    commit(model, Change(removed=rows[::2], added=changed))


def lose_key(model: Path) -> None:
    (model / PARTITION_KEY).unlink()


def change_key(model: Path) -> None:
    write_secret(model / PARTITION_KEY, b"x" * 32)


def damage_ledger(model: Path) -> None:
    path = model / LEDGER
    data = bytearray(path.read_bytes())
    data[4096 : 4096 * 3] = b"\xff" * (4096 * 2)
    path.write_bytes(bytes(data))


def garble_schema(model: Path) -> None:
    """Damage the schema so that SQLite's own error message is not UTF-8."""
    path = model / LEDGER
    data = path.read_bytes()
    assert b"CREATE TABLE records" in data
    path.write_bytes(data.replace(b"CREATE TABLE records", b"CREATE TABLE re \xffrds"))


LOST: dict[str, tuple[Defect, str]] = {
    "slice lost": (lambda model: min((model / RECORDS).iterdir()).unlink(), "slice"),
    "slice changed": (tamper_slice, "slice"),
    "row of another content": (change_row, "slice"),
    "key lost": (lose_key, "key"),
    "another key": (change_key, "key"),
    "ledger lost": (lambda model: (model / LEDGER).unlink(), "ledger_missing"),
    "pages damaged": (damage_ledger, "ledger_damaged"),
    "schema garbled": (garble_schema, "ledger_damaged"),
    "rows damaged": (
        lambda model: execute(model, "UPDATE records SET record_digest = 'x' WHERE vector_id % 2 = 0"),
        "ledger_damaged",
    ),
    "another schema": (lambda model: execute(model, "PRAGMA user_version = 99"), "ledger_schema"),
    "ledger emptied": (lambda model: os.truncate(model / LEDGER, 0), "ledger_empty"),
}


@pytest.mark.parametrize(("spoil", "kind"), LOST.values(), ids=LOST)
def test_what_can_not_be_derived_is_said_and_left_alone(
    model: Path, spoil: Defect, kind: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(model)
    unknown = model / RECORDS / "perhaps-the-missing-piece"
    unknown.write_bytes(b"?")
    found = diagnose(model)
    assert kind in kinds(found)
    assert not found.ok
    lost = [each for each in found.findings if each.kind == kind]
    assert all(each.lost and each.next_step for each in lost)
    use_fake_resources(monkeypatch)
    held = content(model)
    answer = ask("doctor", "-m", model, "--repair", code=4)
    assert not answer["ok"]
    assert kind in {each["kind"] for each in answer["findings"]}
    assert content(model) == held


# --- surroundings ----------------------------------------------------------------------------------


def test_a_writer_at_work_is_reported_and_nothing_is_judged(model: Path) -> None:
    lose_index(model)
    with writer_lock(model / LOCK):
        found = diagnose(model)
    assert (kinds(found), found.ok) == (["writer"], True)


def test_a_clock_that_ran_backwards_is_reported(model: Path) -> None:
    early = datetime.fromisoformat("2019-12-31T00:00:00+00:00")
    found = diagnose(model, early)
    assert (kinds(found), found.ok) == (["clock"], True)
    assert "86,400 s" in found.findings[0].what
    assert diagnose(model, datetime.fromisoformat(THEN)).healthy


def test_a_full_disk_is_reported(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sisa.audit.doctor.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert kinds(diagnose(model)) == ["disk"]


def test_a_directory_that_can_not_be_written_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**_: Any) -> Any:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("sisa.audit.doctor.tempfile.TemporaryFile", refuses)
    found = diagnose(model)
    assert (kinds(found), found.ok) == (["read_only"], False)


def test_a_shard_that_waits_to_be_trained_is_no_defect(model: Path) -> None:
    """A crash in training leaves a state that the next command finishes: nothing is damaged."""
    target = checkpoint(model, 2)
    with context_of(model) as context:
        head = context.stores.ledger.heads()[0]
        before = checkpoint(model, 1).name
        context.stores.ledger.commit(
            Change(dropped=[target.name], heads=[replace(head, key=before, depth=2)])
        )
    shutil.rmtree(target)
    assert diagnose(model).healthy
    with context_of(model) as context:
        reconcile(context)
    assert diagnose(model).healthy
    assert target.exists()


def test_messages_hold_no_secret(model: Path) -> None:
    change_key(model)
    loose_modes(model)
    tamper_slice(model)
    text = repr(diagnose(model))
    assert (b"x" * 32).hex() not in text
    assert "id-0" not in text
    assert Keyed(b"x" * 32).name not in text


# --- the command line ------------------------------------------------------------------------------


def test_doctor_on_the_command_line(
    ask: Ask, model: Path, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ask("doctor", "-m", model)
    assert (found["ok"], found["healthy"], found["findings"]) == (True, True, [])
    lose_two_stages(model)
    tamper_index(model)
    found = ask("doctor", "-m", model, code=4)
    assert not found["ok"]
    assert {each["repair"] for each in found["findings"]} == {"reindex", "retrain"}
    use_fake_resources(monkeypatch)
    found = ask("doctor", "-m", model, "--repair", "--executor", "serial")
    assert (found["healthy"], found["findings"]) == (True, [])
    assert found["done"]
    assert len(found["findings_before"]) == 3
    (model / "notes.txt").write_text("mine")
    found = ask("doctor", "-m", model, "--repair")
    assert (found["ok"], found["done"]) == (True, [])
    assert [each["kind"] for each in found["findings"]] == ["stray"]
    assert (model / "notes.txt").read_text() == "mine"
    assert content(model) == content(healthy)


def test_an_unknown_executor_is_refused_before_anything_is_repaired(ask: Ask, model: Path) -> None:
    loose_modes(model)
    lose_index(model)
    ask("doctor", "-m", model, "--repair", "--executor", "none", code=2)
    assert kinds(diagnose(model)) == ["index", "mode"]


def test_identities_of_records_that_are_not_held_are_found_and_removed(model: Path, ask: Ask) -> None:
    """Whoever was deleted may be found by them: a deletion erases them, a repair what it left."""
    with context_of(model) as context:
        ledger = context.stores.ledger
        held, gone = ledger.rows(0)[0].id_digest, ledger.tombstones()[0].id_digest
        pairs = [Identity(f"{n}" * 64, each) for n, each in enumerate((held, gone, "f" * 64))]
        ledger.commit(Change(identities=pairs))
    (found,) = diagnose(model).findings
    assert (found.kind, found.severity) == ("identities", "error")
    assert "of 2 records" in found.what
    swept = ask("sweep", "-m", model, code=4)
    assert [each["kind"] for each in swept["residue"]] == ["identities"]
    assert repaired(model).after.healthy
    with context_of(model) as context:
        assert context.stores.ledger.identities() == pairs[:1]
