"""Bad input at the command line: it is refused whole, with every problem listed.

A defect in a file of records or a directory ends with exit 2 or 3 and one JSON object, and leaves the
model directory's bytes unchanged. `endurance/test_faults.py` has damage and a failing machine,
`unit/data/test_reader.py` every defect of records, `unit/config/test_config.py` of run files, and
`unit/cli/` what else commands refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa.flows.wiring.keys import PARTITION_KEY
from tests.models.tiny_model import (
    PEOPLE,
    Done,
    Tiny,
    all_files,
    change_run,
    command,
    of_people,
    write_rows,
    write_run,
)

pytestmark = pytest.mark.torch

SERIAL = ("--executor", "serial")
FRESH = [{**row, "id": f"{row['id']}-new"} for row in of_people("p002", "p010")]
Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, model: Tiny, code: int, kind: str, *arguments: object) -> Done:
    """Check that a command fails as it should and leaves every byte as it was."""
    before = all_files(model.directory)
    done = command(capsys, *arguments)
    assert (done.code, done.error["type"]) == (code, kind), done.json
    assert done.error["message"]
    assert all_files(model.directory) == before
    return done


# --- files of records ----------------------------------------------------------------------------


def test_changed_and_deleted_ids_are_not_added(tiny: Tiny, capsys: Capture) -> None:
    tiny.open().forget(["p001-q1"])
    rows = [PEOPLE[0], {**PEOPLE[4], "completion": " Otherwise."}, *FRESH]
    source = tiny.file("mixed.jsonl", rows)
    done = refused(capsys, tiny, 2, "InvalidInput", "add", "-m", tiny.directory, source, *SERIAL)
    assert {where for where, _ in done.problems} == {"mixed.jsonl, line 1", "mixed.jsonl, line 2"}
    assert any("deleted" in what for _, what in done.problems)
    source = tiny.file("mixed.jsonl", [*rows, {**PEOPLE[6], "id": "long", "completion": " long" * 40}])
    done = refused(capsys, tiny, 2, "InvalidInput", "add", "-m", tiny.directory, source, *SERIAL)
    assert {where for where, _ in done.problems} == {
        f"mixed.jsonl, line {n}" for n in (1, 2, len(rows) + 1)
    }
    assert any("more than sequence_len 128" in what for _, what in done.problems)


def test_records_without_subjects_are_not_denied(
    tmp_path: Path, tiny_base: Path, capsys: Capture
) -> None:
    """A subject that no record is known by may be that of a record without one."""
    rows = [{"id": 1000 + n, "customer_id": n, "text": f"Customer {n} likes tea."} for n in range(4)]
    model = Tiny(tmp_path / "new", tiny_base)
    run_file = write_run(model.folder, tiny_base, rows)
    done = command(capsys, "train", run_file, *SERIAL)
    message = "0 of 4 records have a subject (column 'subject_id'); columns not used: customer_id"
    assert (done.code, [where for where, _ in done.problems]) == (2, ["sisa.group_by"])
    assert done.problems[0][1].startswith(message)
    assert not model.directory.exists()

    change_run(run_file, sisa__group_by="customer_id", sisa__shards=1, sisa__slices=1, num_epochs=1)
    write_rows(model.folder / "people.jsonl", [*rows, {"id": "r5", "text": "Somebody likes coffee."}])
    done = command(capsys, "train", run_file, *SERIAL)
    assert done.code == 0
    assert "4 of 5 records have a subject (column 'customer_id')" in done.err
    at = ("-m", model.directory)
    hits = command(capsys, "find", *at, "--subject", "2", "--show-text", "--top", 1).json["hits"]
    assert (hits[0]["id"], hits[0]["subject"], hits[0]["text"]) == (
        *("1002", "2", "Customer 2 likes tea."),
    )
    done = refused(capsys, model, 3, "UnknownRecord", "find", *at, "--subject", "9")
    assert "some have no subject" in done.error["message"]
    assert done.error["got"] == "1 held and 0 deleted records without a subject"
    assert command(capsys, "status", *at).json["records_without_subject"] == 1
    more = model.file("more.jsonl", [{"id": "r6", "text": "x", "customer": "7"}])
    done = refused(capsys, model, 2, "InvalidInput", "add", *at, more, *SERIAL)
    assert "columns not used: customer" in done.problems[0][1]

    command(capsys, "forget", *at, "r5", *SERIAL)
    done = refused(capsys, model, 3, "UnknownRecord", "forget", *at, "--subject", "9", *SERIAL)
    assert done.error["got"] == "0 held and 1 deleted records without a subject"
    assert command(capsys, "forget", *at, "--subject", "2", *SERIAL).json["records"] == 1


# --- run files, directories, executors -----------------------------------------------------------


def test_modules_that_the_base_lacks_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, capsys: Capture
) -> None:
    run_file = write_run(tmp_path / "new", tiny_base, lora_target_modules=["c_attn"])
    done = command(capsys, "train", run_file, *SERIAL)
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert done.error["where"] == "lora_target_modules"
    assert not (run_file.parent / "model").exists()


def test_a_first_training_reports_all_bad_records_before_it_writes(
    tmp_path: Path, tiny_base: Path, capsys: Capture
) -> None:
    bands = {"thresholds": [0.1], "classes": {"trial": 0.3}}
    rows = [*PEOPLE, {**FRESH[0], "completion": " long" * 40}, {**FRESH[2], "deletion_risk": "vip"}]
    run_file = write_run(tmp_path / "new", tiny_base, rows, sisa_block={"bands": bands})
    done = command(capsys, "train", run_file, *SERIAL)
    places = {f"people.jsonl, line {len(PEOPLE) + n}" for n in (1, 2)}
    assert (done.code, {where for where, _ in done.problems}) == (2, places)
    assert not (run_file.parent / "model").exists()


def test_a_missing_partition_key(tmp_path: Path, tiny_base: Path, capsys: Capture) -> None:
    model = Tiny(tmp_path / "own", tiny_base)
    write_run(model.folder, tiny_base, PEOPLE[:4], sisa_block={"partition_key_file": None})
    model.train()
    assert (model.directory / PARTITION_KEY).stat().st_mode & 0o777 == 0o600
    (model.directory / PARTITION_KEY).unlink()
    at: dict[str, list[Any]] = {
        "status": ["-m", model.directory],
        "forget": ["-m", model.directory, "p001-q1", *SERIAL],
        "train": [model.run_file, *SERIAL],
    }
    before = all_files(model.directory)
    for what, arguments in at.items():
        done = command(capsys, what, *arguments)
        assert (done.code, done.error["type"]) in [(2, "InvalidInput"), (4, "IntegrityError")], what
        assert PARTITION_KEY in done.error["where"]
        assert all_files(model.directory) == before


# --- another process -----------------------------------------------------------------------------


def test_a_first_training_does_not_overrun_one_that_was_faster(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process trains the model between this one's look at the directory and its lock."""
    model = Tiny(tmp_path / "new", tiny_base)
    write_run(model.folder, tiny_base, PEOPLE[:4], sisa_block={"partition_key_file": None})

    def overtaken(_directory: Path) -> None:
        monkeypatch.undo()
        model.train()

    monkeypatch.setattr("sisa.train._check_no_foreign_files", overtaken)
    with pytest.raises(sisa.Busy):
        model.train()
    assert model.open().where(["p001-q1"])[0].state == "trained"
