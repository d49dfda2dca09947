"""Interrupted training, and run files and bases that changed under a model.

Whatever stopped a training, `train` continues at the last stored slice and ends with the same bytes. A
source's deleted and new records are counted and never added. A run file is followed only when its
consequences are accepted, and the model is then that of the new file. A base that differs from the
record stops every command that would use it.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import sisa
from tests.models.programs.forked import run_forked
from tests.models.tiny_model import (
    PEOPLE,
    Cut,
    Tiny,
    all_files,
    change_run,
    command,
    cut_short,
    held_files,
    identities,
    ids_of,
    of_people,
    train_scratch,
    without,
    write_rows,
    write_run,
)

pytestmark = pytest.mark.torch

NUM_STAGES = 6
KILLED = (
    "import os, signal, sys, sisa\n"
    "from sisa.core.events import SliceProgress\n"
    "places = []\n"
    "def report(event):\n"
    "    if isinstance(event, SliceProgress):\n"
    "        places.append((event.shard, event.slice))\n"
    "        if len(set(places)) == 3 and event.tokens < event.total_tokens:\n"
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    "sisa.train_model(sys.argv[1], executor='serial', report=report)\n"
)


def scratch_of(tmp_path: Path, base: Path, rows: Any = PEOPLE, **options: Any) -> dict[str, str]:
    return held_files(train_scratch(tmp_path / "scratch", base, rows, **options).directory)


# --- cut short -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_slices", "recorded"), [(1, False), (4, True), (6, False)])
def test_a_first_training_goes_on_where_it_was_cut(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, num_slices: int, recorded: bool
) -> None:
    cut = Tiny(tmp_path / "cut", tiny_base)
    write_run(cut.folder, tiny_base)
    with pytest.raises(Cut):
        cut.train(cut_short(num_slices, recorded=recorded))
    stored = identities(cut.directory / "checkpoints")
    taken = cut.train()
    assert taken.slices_trained == NUM_STAGES - num_slices
    assert taken.already_held == len(PEOPLE)
    after = identities(cut.directory / "checkpoints")
    assert {name: after[name] for name in stored} == stored
    assert held_files(cut.directory) == held_files(tiny.directory)
    assert cut.open().verify().ok


def test_a_first_training_goes_on_after_sigkill_in_the_middle_of_a_slice(
    tmp_path: Path, tiny_base: Path, tiny: Tiny
) -> None:
    killed = Tiny(tmp_path / "killed", tiny_base)
    run_file = write_run(killed.folder, tiny_base)
    assert run_forked(KILLED, run_file) == -signal.SIGKILL
    assert len(os.listdir(killed.directory / "checkpoints")) == 2
    assert killed.train().slices_trained == NUM_STAGES - 2
    assert held_files(killed.directory) == held_files(tiny.directory)


GONE = ["p001-q1", "p003-q1"]


@pytest.fixture(scope="module")
def files_without_gone(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, str]:
    return scratch_of(tmp_path_factory.mktemp("without"), tiny_base, without(PEOPLE, GONE))


@pytest.mark.parametrize(("next_command", "recorded"), [("train", True), ("forget", False)])
def test_a_deletion_that_was_cut_is_finished_by_the_next_command(
    tiny: Tiny, files_without_gone: dict[str, str], next_command: str, recorded: bool
) -> None:
    """An interrupted user types the same command again, or trains."""
    with pytest.raises(Cut):
        tiny.open(cut_short(1, recorded=recorded)).forget(GONE)
    assert [each.state for each in tiny.open().status().requests] == ["erased"]
    if next_command == "train":
        assert tiny.train().slices_trained == 3
    else:
        outcome = tiny.open().forget(GONE)
        assert outcome.request is None
        assert len(outcome.already_deleted) == 2
    assert [each.state for each in tiny.open().status().requests] == ["completed"]
    assert held_files(tiny.directory) == files_without_gone


def test_an_addition_that_was_cut_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    later = of_people("p006", "p008")
    model = Tiny(tmp_path / "a", tiny_base)
    write_run(model.folder, tiny_base, without(PEOPLE, ids_of(later)))
    model.train()
    source = model.file("later.jsonl", later)
    with pytest.raises(Cut):
        model.open(cut_short(1)).add(source)
    taken = model.open().add(source)
    assert (taken.added, taken.already_held, taken.slices_trained) == (0, len(later), 1)
    assert held_files(model.directory) == scratch_of(tmp_path, tiny_base)


# --- again, with the same run file ---------------------------------------------------------------


def test_training_again_trains_nothing_and_rewrites_nothing(tiny: Tiny) -> None:
    before = identities(tiny.directory / "checkpoints"), all_files(tiny.directory)
    taken = tiny.train()
    assert (taken.slices_trained, taken.record_epochs_trained, taken.added) == (0, 0, 0)
    assert (identities(tiny.directory / "checkpoints"), all_files(tiny.directory)) == before


def test_deleted_records_of_the_source_are_counted_and_never_taken(tiny: Tiny) -> None:
    tiny.open().forget(["p001-q1", "p006-q2"])
    before = held_files(tiny.directory)
    taken = tiny.train()
    assert (taken.deleted_not_taken, taken.already_held) == (2, len(PEOPLE) - 2)
    assert (taken.records, taken.slices_trained) == (len(PEOPLE) - 2, 0)
    assert held_files(tiny.directory) == before
    assert [each.state for each in tiny.open().where(["p001-q1", "p006-q2"])] == ["deleted"] * 2


def test_new_records_of_the_source_are_counted_and_left_to_add(tiny: Tiny) -> None:
    fresh = [{**row, "id": f"{row['id']}-new"} for row in of_people("p002")]
    write_rows(tiny.folder / "people.jsonl", [*PEOPLE, *fresh])
    before = held_files(tiny.directory)
    taken = tiny.train()
    assert (taken.new_not_taken, taken.added, taken.slices_trained) == (2, 0, 0)
    assert held_files(tiny.directory) == before
    with pytest.raises(sisa.UnknownRecord):
        tiny.open().where(ids_of(fresh))


def test_changed_records_of_the_source_are_refused_all_of_them(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [
        {**row, "completion": " Otherwise."} if n in (3, 8) else row for n, row in enumerate(PEOPLE)
    ]
    write_rows(tiny.folder / "people.jsonl", changed)
    before = all_files(tiny.directory)
    done = command(capsys, "train", tiny.run_file, "--executor", "serial")
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert [where for where, _ in done.problems] == ["people.jsonl, line 4", "people.jsonl, line 9"]
    assert all_files(tiny.directory) == before


# --- a changed run file --------------------------------------------------------------------------


def test_a_changed_run_file_is_refused_with_all_differences(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    change_run(tiny.run_file, learning_rate=0.02, lora_r=2, sisa__shards=2, cluster__num_workers=1)
    before = all_files(tiny.directory)
    done = command(capsys, "train", tiny.run_file, "--executor", "serial")
    assert (done.code, done.error["type"]) == (2, "ConfigConflict")
    assert [where for where, _ in done.problems] == ["lora_r", "learning_rate", "sisa.shards"]
    assert "retrain" in done.problems[0][1]
    assert "reset" in done.problems[2][1]
    assert all_files(tiny.directory) == before


@pytest.mark.parametrize(
    "change",
    [
        {"num_epochs": 1, "lora_dropout": 0.0, "weight_decay": 0.1},
        {"sisa__schedule": "sequential"},
        {"sisa__shards": 2},
        {"sisa__shards": 4, "sisa__slices": 3, "learning_rate": 0.02},
    ],
    ids=lambda change: "+".join(change),
)
def test_reconfigure_moves_to_the_model_of_the_new_run_file(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, change: dict[str, Any]
) -> None:
    tiny.open().forget(["p007-q1"])
    change_run(tiny.run_file, **change)
    taken = tiny.train(accept_differences=True)
    assert taken.slices_trained > 0
    assert (taken.deleted_not_taken, taken.records) == (1, len(PEOPLE) - 1)

    scratch = Tiny(tmp_path / "scratch", tiny_base)
    change_run(write_run(scratch.folder, tiny_base, without(PEOPLE, ["p007-q1"])), **change)
    scratch.train()
    assert held_files(tiny.directory) == held_files(scratch.directory)
    assert tiny.train().slices_trained == 0
    assert tiny.open().verify().ok


def test_a_reconfiguration_that_was_cut_goes_on(tmp_path: Path, tiny_base: Path, tiny: Tiny) -> None:
    change_run(tiny.run_file, learning_rate=0.02)
    with pytest.raises(Cut):
        tiny.train(cut_short(2), accept_differences=True)
    assert all(each.head for each in tiny.open().status().shards)  # older heads serve meanwhile
    assert tiny.train().slices_trained == NUM_STAGES - 2
    assert held_files(tiny.directory) == scratch_of(tmp_path, tiny_base, learning_rate=0.02)


def test_a_change_that_reaches_no_bit_needs_no_leave(tiny: Tiny) -> None:
    before = identities(tiny.directory / "checkpoints")
    change_run(tiny.run_file, cluster__num_workers=2, sisa__aggregation="mean_prob")
    assert tiny.train().slices_trained == 0
    assert identities(tiny.directory / "checkpoints") == before
    assert tiny.open().config.sisa.aggregation.method == "mean_prob"


def test_a_refused_reconfiguration_changes_nothing(tiny: Tiny) -> None:
    """The held records no longer fit: neither the index nor the stored run file may move before that."""
    change_run(tiny.run_file, sequence_len=16, sisa__embedder=str(tiny.base))
    before = all_files(tiny.directory)
    with pytest.raises(sisa.InvalidInput):
        tiny.train(accept_differences=True)
    assert all_files(tiny.directory) == before


def test_a_reconfiguration_with_a_changed_source_changes_nothing(tiny: Tiny) -> None:
    write_rows(tiny.folder / "people.jsonl", [{**PEOPLE[0], "completion": " Otherwise."}, *PEOPLE[1:]])
    change_run(tiny.run_file, learning_rate=0.02)
    before = all_files(tiny.directory)
    with pytest.raises(sisa.InvalidInput, match="nothing was changed"):
        tiny.train(accept_differences=True)
    assert all_files(tiny.directory) == before


def test_another_subject_column_is_refused_whole(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The held records lack the other column, so nothing shows where they would go."""
    write_rows(tiny.folder / "people.jsonl", [{**row, "team": row["id"][:3]} for row in PEOPLE])
    change_run(tiny.run_file, sisa__group_by="team")
    before = all_files(tiny.directory)
    done = command(capsys, "train", tiny.run_file, "--executor", "serial", "--reconfigure")
    assert (done.code, done.error["type"]) == (2, "ConfigConflict")
    assert all_files(tiny.directory) == before


def test_another_partition_key_is_refused_whatever_is_accepted(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.folder / "other.key").write_text("5" * 64)
    change_run(tiny.run_file, sisa__partition_key_file="other.key")
    before = all_files(tiny.directory)
    for flags in ([], ["--reconfigure"]):
        done = command(capsys, "train", tiny.run_file, "--executor", "serial", *flags)
        assert (done.code, done.error["type"]) == (2, "ConfigConflict")
        assert done.error["where"] == "sisa.partition_key_file"
    assert all_files(tiny.directory) == before


def test_another_content_of_the_partition_key_is_an_integrity_error(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.folder / "shared.key").write_text("5" * 64)
    before = all_files(tiny.directory)
    done = command(capsys, "train", tiny.run_file, "--executor", "serial")
    assert (done.code, done.error["type"]) == (4, "IntegrityError")
    assert "5" * 64 not in done.out + done.err
    assert all_files(tiny.directory) == before


# --- a changed base ------------------------------------------------------------------------------


@pytest.fixture
def rebased(tmp_path: Path, tiny_base: Path) -> Tiny:
    """Return a model whose base directory has other weights by now."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "own-base"
    shutil.copytree(tiny_base, base)
    model = Tiny(tmp_path / "rebased", base)
    write_run(model.folder, base)
    model.train()
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "new", metadata={"format": "pt"})
    os.replace(base / "new", weights)
    return model


def test_a_changed_base_stops_every_command(rebased: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = [{**row, "id": f"{row['id']}-new"} for row in of_people("p002")]
    source = rebased.file("new.jsonl", fresh)
    at, serial = ["-m", rebased.directory], ["--executor", "serial"]
    arguments: dict[str, list[Any]] = {
        "train": [rebased.run_file, *serial],
        "add": [*at, source, *serial],
        "forget": [*at, "p001-q1", *serial],
        "verify": [*at, "--replay", "all", *serial],
        "generate": [*at, "--prompt", "Where?"],
    }
    before = all_files(rebased.directory)
    for what, given in arguments.items():
        done = command(capsys, what, *given)
        assert (done.code, done.error["type"]) == (4, "IntegrityError"), what
        assert done.error["expected"] != done.error["got"]
        assert "--reconfigure" in done.error["next_step"]
        assert all_files(rebased.directory) == before
        assert not (rebased.directory / "scratch").exists()


def test_a_restored_base_goes_on(rebased: Tiny, tiny_base: Path) -> None:
    shutil.copy(tiny_base / "model.safetensors", rebased.base / "restored")
    os.replace(rebased.base / "restored", rebased.base / "model.safetensors")
    assert rebased.train().slices_trained == 0
    assert rebased.open().verify(replay="all", apart=False).ok


def test_reconfigure_moves_to_the_changed_base(rebased: Tiny, tmp_path: Path) -> None:
    """As the message of a changed base advises."""
    rebased.train(accept_differences=True)
    scratch = train_scratch(tmp_path / "scratch", rebased.base, PEOPLE)
    assert held_files(rebased.directory) == held_files(scratch.directory)
    assert rebased.open().verify().ok


# --- deleted records and a first training --------------------------------------------------------


def test_a_first_training_refuses_what_was_deleted_under_its_key(
    tiny: Tiny, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model directory is lost and the sources still hold every record: none returns unnoticed."""
    tiny.open().forget(["p001-q1", "p003-q2"])
    copied = {**PEOPLE[0], "id": "another-id"}
    assert copied["completion"] == next(r for r in PEOPLE if r["id"] == "p001-q1")["completion"]
    again = write_run(tmp_path / "again", tiny_base, [*PEOPLE, copied])
    done = command(capsys, "train", again, "--executor", "serial")
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    problems = {each["where"]: each["what"] for each in done.error["problems"]}
    assert len(problems) == 3
    assert all("by request req-" in what for what in problems.values())
    assert (
        "has the text of a record that was deleted" in problems[f"people.jsonl, line {len(PEOPLE) + 1}"]
    )
    assert not (tmp_path / "again" / "model").exists()
    done = command(capsys, "train", again, "--executor", "serial", "--allow-deleted")
    assert (done.code, done.json["records"]) == (0, len(PEOPLE) + 1)


def test_another_key_knows_of_no_deletion(tiny: Tiny, tmp_path: Path, tiny_base: Path) -> None:
    tiny.open().forget(["p001-q1"])
    other = write_run(tmp_path / "other", tiny_base)
    (tmp_path / "other" / "shared.key").write_text("5" * 64)
    assert sisa.train_model(other, executor="serial")[1].records == len(PEOPLE)


# --- the place of the witness --------------------------------------------------------------------


def test_a_witness_that_cannot_be_written_stops_a_first_training(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path / "a", tiny_base, witness="in-the-way/witness")
    (tmp_path / "a" / "in-the-way").touch()
    done = command(capsys, "train", run_file, "--executor", "serial")
    assert (done.code, done.error["type"]) == (6, "EnvironmentFault")
    assert not (tmp_path / "a" / "model").exists()


def test_a_witness_that_is_lost_is_replaced_by_another(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tiny.folder / "first", tiny.folder / "second"
    change_run(tiny.run_file, witness="first")
    tiny.train()
    tiny.open().forget(["p001-q1"])
    assert len(list(first.iterdir())) == 1
    shutil.rmtree(first)
    first.touch()  # what was a directory can't be one any more
    before = held_files(tiny.directory)
    done = command(capsys, "forget", "-m", tiny.directory, "p002-q1", "--executor", "serial")
    assert (done.code, done.error["type"]) == (6, "EnvironmentFault")
    assert "`witness:`" in done.error["next_step"]
    assert held_files(tiny.directory) == before
    change_run(tiny.run_file, witness="second")
    done = command(capsys, "train", tiny.run_file, "--executor", "serial")
    assert (done.code, "the former witness is not compared" in done.err) == (0, True)
    assert len(list(second.iterdir())) == 1
    assert tiny.open().status().witness[1] == "current"
    assert command(capsys, "forget", "-m", tiny.directory, "p002-q1", "--executor", "serial").code == 0


def test_a_restored_backup_with_another_witness_obeys_the_one_it_had(tiny: Tiny) -> None:
    backup = shutil.copytree(tiny.directory, tiny.folder / "backup")
    tiny.open().forget(["p001-q1"])
    shutil.rmtree(tiny.directory)
    backup.rename(tiny.directory)
    change_run(tiny.run_file, witness="elsewhere")
    tiny.train()
    assert [each.state for each in tiny.open().where(["p001-q1"])] == ["deleted"]
