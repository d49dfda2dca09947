"""Bad input, damage and a failing machine: each is refused whole, with every problem listed.

At the command line, a defect in a file of records, ids, a run file or a directory ends with exit 2 or 3
and one JSON object. Bytes that differ from the record stop every command that builds on them with exit
4. A second writer gets 5 and a full disk 6, after which the same command continues. Every refusal
leaves the model directory's bytes unchanged.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sisa
from sisa.data.samples import to_jsonl
from sisa.flows.wiring.wiring import CHECKPOINTS, INDEX, KEY, LEDGER, RECORDS
from tests.examples import by_turns
from tests.models.tiny_model import (
    PEOPLE,
    Done,
    Row,
    Tiny,
    all_files,
    change_run,
    command,
    held_files,
    of_people,
    train_scratch,
    without,
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


def jsonl(*lines: str | bytes) -> bytes:
    return b"".join((each if isinstance(each, bytes) else each.encode()) + b"\n" for each in lines)


GOOD = '{"id": "n1", "text": "fine"}'
BAD_LINES: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "duplicate ids": (
        jsonl(
            GOOD, '{"id": "n2", "text": "b"}', '{"id": "n1", "text": "c"}', '{"id": "n2", "text": "d"}'
        ),
        [("line 3", "again"), ("line 4", "again")],
    ),
    "empty text": (
        jsonl('{"id": "n1", "text": ""}', '{"id": "n2", "prompt": "p", "completion": " "}', GOOD),
        [("line 1", "'text' is empty"), ("line 2", "'completion' is empty"), ("line 3", "again")],
    ),
    "missing id": (
        jsonl('{"text": "a"}', '{"id": null, "text": "b"}'),
        [("line 1", "id"), ("line 2", "id")],
    ),
    "wrong types": (
        jsonl('{"id": 7.5, "text": "a"}', '{"id": "n2", "text": ["b"]}', "[1]", '{"id": "n4"}'),
        [("line 1", "a number"), ("line 2", "a list"), ("line 3", "a list"), ("line 4", "no body")],
    ),
    "invalid UTF-8": (
        jsonl(GOOD, b'{"id": "n2", "text": "\xff"}', b'{"id": "\xc3(", "text": "c"}'),
        [("line 2", "UTF-8"), ("line 3", "UTF-8")],
    ),
    "broken lines": (
        jsonl(GOOD, '{"id": "n2", "text": ', "", '{"id": "n4", "text": "d"}', "no json"),
        [("line 2", "broken JSON"), ("line 5", "broken JSON")],
    ),
    "an empty file": (b"", [("", "holds no record")]),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_records_are_not_added(tiny: Tiny, capsys: Capture, what: str) -> None:
    content, expected = BAD_LINES[what]
    source = tiny.folder / "bad.jsonl"
    source.write_bytes(content)
    done = refused(capsys, tiny, 2, "InvalidInput", "add", "-m", tiny.directory, source, *SERIAL)
    assert len(done.problems) == len(expected)
    for (where, found), (place, message) in zip(done.problems, expected, strict=True):
        assert where == (f"bad.jsonl, {place}" if place else "bad.jsonl")
        assert message in found


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_records_are_not_trained_on(
    tmp_path: Path, tiny_base: Path, capsys: Capture, what: str
) -> None:
    content, expected = BAD_LINES[what]
    run_file = write_run(tmp_path / "new", tiny_base)
    (run_file.parent / "people.jsonl").write_bytes(content)
    done = command(capsys, "train", run_file, *SERIAL)
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert len(done.problems) == len(expected)
    assert not (run_file.parent / "model").exists()


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def spoil_pages(data: bytes) -> bytes:
    return data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :]


@pytest.mark.parametrize(
    "damage", [truncate, spoil_pages, lambda _: b"PAR1"], ids=["cut", "pages", "stub"]
)
def test_damaged_parquet_is_not_added(
    tiny: Tiny, capsys: Capture, damage: Callable[[bytes], bytes]
) -> None:
    source = tiny.folder / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(FRESH), source)
    source.write_bytes(damage(source.read_bytes()))
    done = refused(capsys, tiny, 2, "InvalidInput", "add", "-m", tiny.directory, source, *SERIAL)
    assert [where for where, _ in done.problems] == ["bad.parquet"]
    assert "truncated" in done.problems[0][1]


def test_the_same_parquet_undamaged_is_added(tiny: Tiny, capsys: Capture) -> None:
    source = tiny.folder / "good.parquet"
    pq.write_table(pa.Table.from_pylist(FRESH), source)
    done = command(capsys, "add", "-m", tiny.directory, source, *SERIAL)
    assert (done.code, done.json["added"]) == (0, len(FRESH))


def test_records_too_long_are_refused_all_of_them(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, capsys: Capture
) -> None:
    rows = [{**row, "completion": " long" * 40} if n in (1, 2) else row for n, row in enumerate(FRESH)]
    source = tiny.file("long.jsonl", rows)
    done = refused(capsys, tiny, 2, "InvalidInput", "add", "-m", tiny.directory, source, *SERIAL)
    assert [where for where, _ in done.problems] == ["long.jsonl, line 2", "long.jsonl, line 3"]
    assert all("more than sequence_len 128" in what for _, what in done.problems)

    run_file = write_run(tmp_path / "new", tiny_base, rows)
    done = command(capsys, "train", run_file, *SERIAL)
    assert (done.code, len(done.problems)) == (2, 2)
    assert not (run_file.parent / "model").exists()


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


# --- ids -----------------------------------------------------------------------------------------


def test_unknown_ids_delete_nothing(tiny: Tiny, capsys: Capture) -> None:
    at = ("-m", tiny.directory)
    arguments = ("nobody", "p001-q1", "p001-q9", *SERIAL)
    done = refused(capsys, tiny, 3, "UnknownRecord", "forget", *at, *arguments)
    assert [where for where, _ in done.problems] == ["id 1 of 3", "id 3 of 3"]
    done = refused(capsys, tiny, 3, "UnknownRecord", "forget", *at, *arguments, "--dry-run")
    assert len(done.problems) == 2
    refused(capsys, tiny, 3, "UnknownRecord", "forget", *at, "--subject", "nobody", *SERIAL)
    refused(capsys, tiny, 3, "UnknownRecord", "where", *at, "nobody")


def test_an_already_deleted_id_is_reported_as_done(tiny: Tiny, capsys: Capture) -> None:
    at = ("-m", tiny.directory)
    first = command(capsys, "forget", *at, "p001-q1", *SERIAL)
    before = all_files(tiny.directory)
    done = command(capsys, "forget", *at, "p001-q1", *SERIAL)
    assert (done.code, done.json["records"], done.json["already_deleted"]) == (0, 0, 1)
    assert done.json["already_deleted_by"] == [first.json["request_id"]]
    assert all_files(tiny.directory) == before


def test_an_already_deleted_id_does_not_keep_a_live_one(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, capsys: Capture
) -> None:
    at = ("-m", tiny.directory)
    command(capsys, "forget", *at, "p001-q1", *SERIAL)
    done = command(capsys, "forget", *at, "p001-q1", "p002-q1", "p002-q1", *SERIAL)
    assert (done.code, done.json["records"], done.json["already_deleted"]) == (0, 1, 1)
    scratch = train_scratch(tmp_path / "scratch", tiny_base, without(PEOPLE, ["p001-q1", "p002-q1"]))
    assert held_files(tiny.directory) == held_files(scratch.directory)


@pytest.mark.parametrize(
    "arguments", [(), ("p001-q1", "--subject", "p001"), ("--ids-file", "missing.txt")], ids=str
)
def test_a_forget_that_names_nothing_or_too_much(
    tiny: Tiny, capsys: Capture, arguments: tuple[str, ...]
) -> None:
    before = all_files(tiny.directory)
    done = command(capsys, "forget", "-m", tiny.directory, *arguments, *SERIAL)
    assert (done.code, done.error["type"]) in [(2, "UsageError"), (2, "InvalidInput")]
    assert all_files(tiny.directory) == before


# --- run files, directories, executors -----------------------------------------------------------


def test_a_bad_run_file_is_refused_with_all_of_its_problems(tiny: Tiny, capsys: Capture) -> None:
    change_run(tiny.run_file, lora_rank=4, learning_rate="fast", sisa__shards=0, sisa__slice=1)
    done = refused(capsys, tiny, 2, "InvalidInput", "train", tiny.run_file, *SERIAL)
    keys = " ".join(where for where, _ in done.problems)
    assert len(done.problems) == 4
    for key in ("lora_rank", "learning_rate", "sisa.shards", "sisa.slice"):
        assert key in keys
    assert all(where.startswith("line ") for where, _ in done.problems)


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


def test_a_generation_leaves_no_trace_of_a_layerwise_model(
    tmp_path: Path, tiny_base: Path, capsys: Capture
) -> None:
    rows = [{**row, "generation": n} if (n := number % 2) else row for number, row in enumerate(FRESH)]
    run_file = write_run(tmp_path / "new", tiny_base, rows, sisa_block={"layerwise": True})
    done = command(capsys, "train", run_file, *SERIAL)
    assert (done.code, done.error["type"], done.error["where"]) == (
        2,
        "ConfigConflict",
        "sisa.layerwise",
    )
    assert [where for where, _ in done.problems] == ["people.jsonl, line 2", "people.jsonl, line 4"]
    assert not (run_file.parent / "model").exists()


@pytest.mark.parametrize("what", ["add", "forget"])
def test_an_unknown_executor_changes_nothing(tiny: Tiny, capsys: Capture, what: str) -> None:
    target = tiny.file("new.jsonl", FRESH) if what == "add" else "p001-q1"
    arguments = (what, "-m", tiny.directory, target, "--executor", "spark")
    refused(capsys, tiny, 2, "InvalidInput", *arguments)


def test_an_unknown_executor_starts_no_model(tmp_path: Path, tiny_base: Path, capsys: Capture) -> None:
    run_file = write_run(tmp_path / "new", tiny_base)
    done = command(capsys, "train", run_file, "--executor", "spark")
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert not (run_file.parent / "model").exists()


@pytest.mark.parametrize(
    "what", ["status", "verify", "where", "forget", "add", "generate", "export", "find"]
)
def test_no_model_in_the_directory(tmp_path: Path, capsys: Capture, what: str) -> None:
    rest: dict[str, list[Any]] = {
        "where": ["p001-q1"],
        "forget": ["p001-q1"],
        "add": [write_rows(tmp_path / "new.jsonl", FRESH)],
        "generate": ["--prompt", "x"],
        "export": ["--to", tmp_path / "out"],
        "find": ["--text", "x"],
    }
    empty = tmp_path / "empty"
    for directory in (empty, tmp_path / "absent"):
        empty.mkdir(exist_ok=True)
        done = command(capsys, what, "-m", directory, *rest.get(what, []))
        assert (done.code, done.error["type"]) == (2, "InvalidInput")
        assert "sisa train" in done.error["next_step"]
    assert list(empty.iterdir()) == []
    assert not (tmp_path / "absent").exists()


def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, tiny_base: Path, capsys: Capture
) -> None:
    run_file = write_run(tmp_path / "new", tiny_base)
    foreign = run_file.parent / "model"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    done = command(capsys, "train", run_file, *SERIAL)
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert list(all_files(foreign)) == ["thesis.txt"]


def test_a_missing_partition_key(tmp_path: Path, tiny_base: Path, capsys: Capture) -> None:
    model = Tiny(tmp_path / "own", tiny_base)
    write_run(model.folder, tiny_base, PEOPLE[:4], sisa_block={"partition_key_file": None})
    model.train()
    assert (model.directory / KEY).stat().st_mode & 0o777 == 0o600
    (model.directory / KEY).unlink()
    at: dict[str, list[Any]] = {
        "status": ["-m", model.directory],
        "forget": ["-m", model.directory, "p001-q1", *SERIAL],
        "train": [model.run_file, *SERIAL],
    }
    before = all_files(model.directory)
    for what, arguments in at.items():
        done = command(capsys, what, *arguments)
        assert (done.code, done.error["type"]) in [(2, "InvalidInput"), (4, "IntegrityError")], what
        assert KEY in done.error["where"]
        assert all_files(model.directory) == before


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(bytes(data))


def checkpoint_of(model: Tiny, record_id: str, *, head: bool) -> Path:
    touched = model.open().where([record_id])[0].checkpoints
    (key,) = [each.key for each in touched if each.is_head is head]
    return model.directory / CHECKPOINTS / key


def verify_finds(capsys: Capture, model: Tiny, where: str) -> None:
    before = all_files(model.directory)
    done = command(capsys, "verify", "-m", model.directory, "--replay", "all", *SERIAL)
    assert (done.code, done.json["ok"]) == (4, False)
    assert [each["where"] for each in done.json["findings"]] == [where]
    assert not any(each["replayed"] for each in done.json["shards"])
    assert all_files(model.directory) == before


FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "trainer_state.json",
)


# The store itself meets all pairs in `contract/storage/test_checkpoint_store.py`.
@pytest.mark.parametrize(("name", "damage"), by_turns(FILES, ("missing", "flipped")))
def test_a_tampered_checkpoint_stops_who_would_use_it(
    tiny: Tiny, capsys: Capture, name: str, damage: str
) -> None:
    """Shard 0's head is damaged (for verify, generate, export), and the stage below it, which a
    deletion or an addition in slice 1 would build on."""
    at = ("-m", tiny.directory)
    head = checkpoint_of(tiny, "p009-q1", head=True)
    below = checkpoint_of(tiny, "p001-q1", head=False)
    assert sorted(each.name for each in head.iterdir()) == sorted(FILES)
    whole = (head / name).read_bytes()
    hurt = flip if damage == "flipped" else Path.unlink
    hurt(head / name)
    verify_finds(capsys, tiny, f"{CHECKPOINTS}/{head.name}")
    refused(capsys, tiny, 4, "IntegrityError", "generate", *at, "--prompt", PEOPLE[0]["prompt"])
    done = refused(capsys, tiny, 4, "IntegrityError", "export", *at, "--to", tiny.folder / "out")
    assert head.name in done.error["where"]

    (head / name).write_bytes(whole)
    assert command(capsys, "verify", *at).json["ok"]
    hurt(below / name)
    verify_finds(capsys, tiny, f"{CHECKPOINTS}/{below.name}")
    done = refused(capsys, tiny, 4, "IntegrityError", "forget", *at, "p009-q1", *SERIAL)
    assert below.name in done.error["where"]
    source = tiny.file("new.jsonl", SAME_SLICE)
    refused(capsys, tiny, 4, "IntegrityError", "add", *at, source, *SERIAL)


def test_a_tampered_checkpoint_does_not_stop_the_deletion_that_erases_it(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, capsys: Capture
) -> None:
    flip(checkpoint_of(tiny, "p001-q1", head=False) / "adapter_model.safetensors")
    done = command(capsys, "forget", "-m", tiny.directory, "p001-q1", *SERIAL)
    assert done.code == 0
    scratch = train_scratch(tmp_path / "scratch", tiny_base, without(PEOPLE, ["p001-q1"]))
    assert held_files(tiny.directory) == held_files(scratch.directory)


def test_a_file_too_many_in_a_checkpoint(tiny: Tiny, capsys: Capture) -> None:
    head = checkpoint_of(tiny, "p009-q1", head=True)
    (head / "adapter_model.bin").write_bytes(b"a pickle, perhaps")
    verify_finds(capsys, tiny, f"{CHECKPOINTS}/{head.name}")


@pytest.mark.parametrize(
    "hurt", [flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["bit", "gone", "cut"]
)
def test_a_tampered_slice_file(tiny: Tiny, capsys: Capture, hurt: Callable[[Path], Any]) -> None:
    at = ("-m", tiny.directory)
    (path,) = (tiny.directory / RECORDS).glob("shard-00000-slice-00001-*")
    hurt(path)
    verify_finds(capsys, tiny, f"{RECORDS}/{path.name}")
    done = refused(capsys, tiny, 4, "IntegrityError", "forget", *at, "p009-q1", *SERIAL)
    assert path.name in done.error["where"]
    # p001 lies in slice 0 of that shard: its slice file is whole, but slice 1 must be trained again
    refused(capsys, tiny, 4, "IntegrityError", "forget", *at, "p001-q1", *SERIAL)


@pytest.mark.parametrize("hurt", [flip, Path.unlink], ids=["bit", "gone"])
def test_a_tampered_index_file(tiny: Tiny, capsys: Capture, hurt: Callable[[Path], Any]) -> None:
    at = ("-m", tiny.directory)
    (path,) = (tiny.directory / INDEX).glob("shard-00000-*")
    hurt(path)
    verify_finds(capsys, tiny, f"{INDEX}/{path.name}")
    refused(capsys, tiny, 4, "IntegrityError", "find", *at, "--text", "Where?")
    refused(capsys, tiny, 4, "IntegrityError", "forget", *at, "p009-q1", *SERIAL)


def test_a_file_that_the_ledger_does_not_know(tiny: Tiny, capsys: Capture) -> None:
    (tiny.directory / RECORDS / "smuggled.parquet").write_bytes(b"x")
    verify_finds(capsys, tiny, f"{RECORDS}/smuggled.parquet")
    tiny.train()
    assert command(capsys, "verify", "-m", tiny.directory).json["ok"]


@pytest.mark.parametrize("damage", ["header", "pages", "cut"])
def test_a_damaged_ledger_stops_every_command(tiny: Tiny, capsys: Capture, damage: str) -> None:
    path = tiny.directory / LEDGER
    data = path.read_bytes()
    path.write_bytes(
        {
            "header": b"\0" * 100 + data[100:],
            "pages": data[:100] + b"\xff" * (len(data) - 100),
            "cut": data[: len(data) // 2],
        }[damage]
    )
    at = ("-m", tiny.directory)
    arguments: dict[str, tuple[Any, ...]] = {
        "status": at,
        "verify": at,
        "train": (tiny.run_file, *SERIAL),
        "forget": (*at, "p001-q1", *SERIAL),
        "generate": (*at, "--prompt", "Where?"),
    }
    for what, given in arguments.items():
        done = refused(capsys, tiny, 4, "IntegrityError", what, *given)
        assert done.error["where"].endswith(LEDGER)


SHALLOWER = "UPDATE heads SET key = {0}, target = {0} WHERE shard = 0"
FIRST_STAGE = "(SELECT key FROM checkpoints AS c WHERE c.shard = heads.shard AND c.prefix = '[0]')"
SPOIL = "UPDATE {0} SET {1} = replace({1}, substr({1}, 1, 4), 'ffff')"


@pytest.mark.parametrize(
    "change",
    [
        SPOIL.format("checkpoints", "manifest_sha256"),
        SPOIL.format("slices", "sha256"),
        SPOIL.format("indexes", "sha256"),
        SPOIL.format("records", "record_digest"),
        "DELETE FROM records WHERE shard = 0",
        "DELETE FROM checkpoints WHERE shard = 0",
        "DELETE FROM slices WHERE shard = 0",
        SHALLOWER.format(FIRST_STAGE),
        "UPDATE heads SET key = NULL, target = NULL WHERE shard = 0",
    ],
    ids=lambda change: " ".join(change.split()[:6]),
)
def test_a_ledger_that_was_edited_is_found(tiny: Tiny, capsys: Capture, change: str) -> None:
    connection = sqlite3.connect(tiny.directory / LEDGER)
    with connection:
        connection.execute(change)
    connection.close()
    done = command(capsys, "verify", "-m", tiny.directory)
    assert done.code == 4
    assert not done.json["ok"]


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Return a function that makes the disk full after a given number of flushes."""
    flush = os.fsync

    def fill_after(calls: int) -> None:
        left = calls

        def fsync(handle: int) -> None:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= 1
            flush(handle)

        monkeypatch.setattr("sisa.store.blobs.files.os.fsync", fsync)

    yield fill_after
    monkeypatch.undo()


SAME_SLICE = [{**row, "id": f"{row['id']}-new"} for row in of_people("p009")]


@pytest.fixture(scope="module")
def files_from_scratch(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Callable[[str], dict[str, str]]:
    """Return the files of a model that was trained on what a change leaves, once for each change."""
    left: dict[str, list[Row]] = {
        "add": [*PEOPLE, *SAME_SLICE],
        "forget": without(PEOPLE, ["p009-q1"]),
    }

    @cache
    def files(what: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp(f"scratch-{what}")
        return held_files(train_scratch(folder, tiny_base, left[what]).directory)

    return files


# A forget of p009-q1 flushes slice file and index (2 each), commits, then trains one stage; an addition
# to the same slice flushes as often.
@pytest.mark.parametrize(("calls", "what"), by_turns((0, 1, 2, 3, 4, 5, 7, 9), ("forget", "add")))
def test_a_full_disk_breaks_nothing_and_the_same_command_goes_on(
    tiny: Tiny,
    files_from_scratch: Callable[[str], dict[str, str]],
    capsys: Capture,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    calls: int,
) -> None:
    target = tiny.file("new.jsonl", SAME_SLICE) if what == "add" else "p009-q1"
    arguments = (what, "-m", tiny.directory, target, *SERIAL)
    full_disk(calls)
    done = command(capsys, *arguments)
    monkeypatch.undo()
    assert (done.code, done.error["type"]) == (6, "EnvironmentFault")
    assert "free disk space" in done.error["next_step"]

    assert command(capsys, *arguments).code == 0
    assert command(capsys, "verify", "-m", tiny.directory).json["ok"]
    assert held_files(tiny.directory) == files_from_scratch(what)


@pytest.mark.parametrize("calls", [0, 3, 12, 40])
def test_a_disk_that_fills_in_the_first_training(
    tmp_path: Path,
    tiny_base: Path,
    tiny: Tiny,
    capsys: Capture,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
) -> None:
    model = Tiny(tmp_path / "new", tiny_base)
    write_run(model.folder, tiny_base)
    full_disk(calls)
    done = command(capsys, "train", model.run_file, *SERIAL)
    monkeypatch.undo()
    assert (done.code, done.error["type"]) == (6, "EnvironmentFault")
    assert command(capsys, "train", model.run_file, *SERIAL).code == 0
    assert held_files(model.directory) == held_files(tiny.directory)


# --- two writers ---------------------------------------------------------------------------------

HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from sisa.store.blobs.files import writer_lock\n"
    "with writer_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


@pytest.fixture
def other_writer(tiny: Tiny) -> Iterator[None]:
    arguments = [sys.executable, "-c", HOLD, str(tiny.directory / "lock")]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()
        assert process.wait(timeout=20) == 0


@pytest.mark.usefixtures("other_writer")
def test_a_second_writer_learns_that_the_model_is_busy(tiny: Tiny, capsys: Capture) -> None:
    at = ("-m", tiny.directory)
    source = tiny.file("new.jsonl", FRESH)
    refused(capsys, tiny, 5, "Busy", "forget", *at, "p001-q1", *SERIAL)
    refused(capsys, tiny, 5, "Busy", "add", *at, source, *SERIAL)
    refused(capsys, tiny, 5, "Busy", "verify", *at, "--replay", "all", *SERIAL)
    refused(capsys, tiny, 5, "Busy", "train", tiny.run_file, *SERIAL)
    change_run(tiny.run_file, learning_rate=0.02)
    refused(capsys, tiny, 5, "Busy", "train", tiny.run_file, "--reconfigure", *SERIAL)


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


@pytest.mark.usefixtures("other_writer")
def test_readers_are_served_while_another_process_writes(tiny: Tiny, capsys: Capture) -> None:
    at = ("-m", tiny.directory)
    assert command(capsys, "status", *at).json["records"] == len(PEOPLE)
    assert command(capsys, "where", *at, "p001-q1").code == 0
    assert command(capsys, "verify", *at).json["ok"]
    assert command(capsys, "forget", *at, "p001-q1", "--dry-run").code == 0


# --- the form of a failure -----------------------------------------------------------------------


def test_a_failure_is_one_json_object_and_exit_codes_hold_in_a_real_process(tiny: Tiny) -> None:
    arguments = ["forget", "-m", str(tiny.directory), "nobody", "--json", *SERIAL]
    code = "import sys; from cluster.cli.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == sisa.UnknownRecord.exit_code == 3
    assert done.stdout.lstrip().startswith('{\n  "error"')
    assert "Traceback" not in done.stderr
    assert "nobody" not in done.stdout + done.stderr


def test_samples_are_good_input(tiny: Tiny, capsys: Capture) -> None:
    """The refusals above are of the defects alone: the same records without them are taken."""
    source = tiny.folder / "good.jsonl"
    source.write_text(to_jsonl(FRESH))
    done = command(capsys, "add", "-m", tiny.directory, source, *SERIAL)
    assert (done.code, done.json["added"], done.json["records"]) == (0, 4, len(PEOPLE) + 4)
    assert done.json["slices_trained"] == 2
