"""`sisa train` over fakes: changed sources and run files, and what is known of earlier deletions.

A source's deleted and new records are counted and never added. A changed run file, or another partition
key, is refused whole. That `--reconfigure` ends in the bytes of training from scratch is tested with the
real trainer, in `integration/exactness/test_resume.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput
from sisa.flows.rights.access import row_of
from sisa.model import open_model
from sisa.train import train_model
from tests.fakes.ports import fake_record
from tests.models.confessing import content, use_fake_resources
from tests.models.tiny_model import all_files
from tests.unit.commands import Ask, Sisa

RECORDS = [fake_record(number, f"p{number}") for number in range(12)]
ONE, TWO = RECORDS[1].id, RECORDS[2].id


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)


def write_run(
    folder: Path, records: Sequence[Record] = RECORDS, key: str = "4" * 64, **settings: Any
) -> Path:
    """Write a run file with its records and its partition key beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "people.jsonl").write_text("".join(f"{json.dumps(row_of(e))}\n" for e in records))
    (folder / "shared.key").write_text(key)
    block = {"shards": 2, "slices": 3, "embedder": "hashing", "partition_key_file": "shared.key"}
    block |= settings.pop("sisa", {})
    given = {"datasets": [{"path": "people.jsonl"}], "output_dir": "model", "sisa": block, **settings}
    (folder / "run.yaml").write_text(json.dumps(given))  # which is YAML, too
    return folder / "run.yaml"


@pytest.fixture
def model(tmp_path: Path, ask: Ask) -> Path:
    """Return a model whose run file lies beside it."""
    ask("train", write_run(tmp_path / "first"))
    return tmp_path / "first" / "model"


def states(model: Path, *records: str) -> list[str]:
    return [each.state for each in open_model(model).where(records)]


def test_two_records_of_one_id_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A reader of sources refuses them, too; these come from Python."""
    run_file = write_run(tmp_path / "first")
    twice = [*RECORDS, replace(RECORDS[0], subject_id="p9"), RECORDS[1]]
    with pytest.raises(InvalidInput) as caught:
        train_model(run_file, records=twice, executor="serial")
    found = [(each.where, each.what) for each in caught.value.problems]
    assert found == [(f"record {n}", f"it has the id of record {n - 12}") for n in (13, 14)]
    assert not (tmp_path / "first" / "model").exists()


def refused(ask: Ask, model: Path, *options: str, code: int = 2) -> dict[str, Any]:
    """Train by the run file beside a model; return the error, which leaves every byte as it was."""
    before = all_files(model)
    error: dict[str, Any] = ask("train", model.parent / "run.yaml", *options, code=code)["error"]
    assert all_files(model) == before
    return error


def with_other_texts(*numbers: int) -> list[Record]:
    """Return the records, some of them with another answer."""
    other = (Part("prompt", "question"), Part("completion", "another answer"))
    return [replace(e, parts=other) if at in numbers else e for at, e in enumerate(RECORDS)]


# --- a first training ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"encrypt": True}, {"storage": "elsewhere"}])
def test_a_first_training_that_ended_before_its_commit_is_done_again_under_one_key(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    run_file = write_run(tmp_path / "new", sisa={"partition_key_file": None}, **settings)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sisa.train.train", killed)
        ask("train", run_file, code=130)
    ask("train", run_file)
    assert states(run_file.parent / "model", ONE) == ["trained"]


def test_a_first_training_says_which_shards_have_no_record(tmp_path: Path, sisa: Sisa) -> None:
    run_file = write_run(tmp_path / "new", RECORDS[:1], sisa={"shards": 3})
    assert "2 of 3 shards have no record" in sisa("train", run_file, "--executor", "serial")[2]


@pytest.mark.parametrize(
    ("name", "next_step"), [("partition.key", "partition_key_file"), ("thesis.txt", "a new directory")]
)
def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, ask: Ask, name: str, next_step: str
) -> None:
    run_file = write_run(tmp_path / "new", sisa={"partition_key_file": None})
    model = run_file.parent / "model"
    model.mkdir()
    (model / name).write_text("6" * 64)
    error = refused(ask, model)
    assert (error["type"], error["got"]) == ("InvalidInput", name)
    assert next_step in error["next_step"]


def test_an_unknown_executor_starts_no_model(tmp_path: Path, ask: Ask) -> None:
    run_file = write_run(tmp_path / "new")
    assert ask("train", run_file, "--executor", "spark", code=2)["error"]["type"] == "InvalidInput"
    assert not (run_file.parent / "model").exists()


# --- a changed source ----------------------------------------------------------------------------


def test_deleted_records_of_the_source_are_counted_and_never_taken(model: Path, ask: Ask) -> None:
    ask("forget", "-m", model, ONE, TWO)
    before = content(model)
    taken = ask("train", model.parent / "run.yaml")
    assert (taken["deleted_not_taken"], taken["already_held"]) == (2, len(RECORDS) - 2)
    assert (taken["records"], taken["slices_trained"]) == (len(RECORDS) - 2, 0)
    assert content(model) == before
    assert states(model, ONE, TWO) == ["deleted"] * 2


def test_new_records_of_the_source_are_counted_and_left_to_add(model: Path, ask: Ask) -> None:
    new, before = fake_record(20, "p20"), content(model)
    taken = ask("train", write_run(model.parent, [*RECORDS, new]))
    assert (taken["new_not_taken"], taken["added"], taken["slices_trained"]) == (1, 0, 0)
    assert content(model) == before
    ask("where", "-m", model, new.id, code=3)


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0.02}])
def test_changed_records_of_the_source_are_refused_all_of_them(
    model: Path, ask: Ask, settings: dict[str, Any]
) -> None:
    write_run(model.parent, with_other_texts(3, 8), **settings)
    error = refused(ask, model, *(["--reconfigure"] if settings else []))
    assert error["type"] == "InvalidInput"
    assert [each["where"] for each in error["problems"]] == [
        "people.jsonl, line 4",
        "people.jsonl, line 9",
    ]


# --- a changed run file --------------------------------------------------------------------------


def test_a_changed_run_file_is_refused_with_all_differences(model: Path, ask: Ask) -> None:
    block, cluster = {"shards": 3}, {"num_workers": 1}
    write_run(model.parent, learning_rate=0.02, lora_r=2, sisa=block, cluster=cluster)
    error = refused(ask, model)
    assert error["type"] == "ConfigConflict"
    problems = {each["where"]: each["what"] for each in error["problems"]}
    assert list(problems) == ["lora_r", "learning_rate", "sisa.shards"]
    assert "retrain" in problems["lora_r"]
    assert "reset" in problems["sisa.shards"]


def test_another_subject_column_is_refused_whole(model: Path, ask: Ask) -> None:
    """The held records lack the other column, so nothing shows where they would go."""
    write_run(model.parent, sisa={"group_by": "team"})
    rows = [{**row_of(each), "team": "a"} for each in RECORDS]
    (model.parent / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refused(ask, model, "--reconfigure")["type"] == "ConfigConflict"


@pytest.mark.parametrize("options", [[], ["--reconfigure"]])
def test_another_partition_key_is_refused_whatever_is_accepted(
    model: Path, ask: Ask, options: list[str]
) -> None:
    write_run(model.parent, sisa={"partition_key_file": "other.key"})
    (model.parent / "other.key").write_text("5" * 64)
    error = refused(ask, model, *options)
    assert (error["type"], error["where"]) == ("ConfigConflict", "sisa.partition_key_file")


def test_another_content_of_the_partition_key_is_an_integrity_error(model: Path, ask: Ask) -> None:
    write_run(model.parent, key="5" * 64)
    error = refused(ask, model, code=4)
    assert error["type"] == "IntegrityError"
    assert "5" * 64 not in str(error)


# --- earlier deletions ---------------------------------------------------------------------------


def test_a_first_training_refuses_what_was_deleted_under_its_key(
    model: Path, ask: Ask, tmp_path: Path
) -> None:
    """The model directory is lost and the sources still hold every record: none returns unnoticed."""
    ask("forget", "-m", model, ONE, TWO)
    copied = Record("another-id", None, RECORDS[1].kind, RECORDS[1].parts)
    again = write_run(tmp_path / "again", [*RECORDS, copied])
    problems = ask("train", again, code=2)["error"]["problems"]
    assert [each["where"] for each in problems] == [f"people.jsonl, line {n}" for n in (2, 3, 13)]
    assert all("by request req-" in each["what"] for each in problems)
    assert "has the text of a record that was deleted" in problems[-1]["what"]
    assert not (tmp_path / "again" / "model").exists()
    assert ask("train", again, "--allow-deleted")["records"] == len(RECORDS) + 1


def test_another_key_knows_of_no_deletion(model: Path, ask: Ask, tmp_path: Path) -> None:
    ask("forget", "-m", model, ONE)
    assert ask("train", write_run(tmp_path / "other", key="5" * 64))["records"] == len(RECORDS)


def test_a_witness_that_cannot_be_written_stops_a_first_training(ask: Ask, tmp_path: Path) -> None:
    run_file = write_run(tmp_path / "a", witness="in-the-way/witness")
    (tmp_path / "a" / "in-the-way").touch()
    assert ask("train", run_file, code=6)["error"]["type"] == "EnvironmentFault"
    assert not (tmp_path / "a" / "model").exists()


def test_a_witness_that_is_lost_is_replaced_by_another(model: Path, ask: Ask, sisa: Sisa) -> None:
    first, second = model.parent / "first", model.parent / "second"
    ask("train", write_run(model.parent, witness="first"))
    ask("forget", "-m", model, ONE)
    assert len(list(first.iterdir())) == 1
    shutil.rmtree(first)
    first.touch()  # what was a directory can't be one any more
    before = content(model)
    error = ask("forget", "-m", model, TWO, code=6)["error"]
    assert error["type"] == "EnvironmentFault"
    assert "`witness:`" in error["next_step"]
    assert content(model) == before
    code, _, err = sisa("train", write_run(model.parent, witness="second"))
    assert (code, "the former witness is not compared" in err) == (0, True)
    assert len(list(second.iterdir())) == 1
    assert open_model(model).status().witness[1] == "current"
    ask("forget", "-m", model, TWO)


def test_a_restored_backup_with_another_witness_obeys_the_one_it_had(model: Path, ask: Ask) -> None:
    backup = shutil.copytree(model, model.parent / "backup")
    ask("forget", "-m", model, ONE)
    shutil.rmtree(model)
    backup.rename(model)
    ask("train", write_run(model.parent, witness="elsewhere"))
    assert states(model, ONE) == ["deleted"]
