"""Deleted means gone: nothing of a deleted record is left in any byte of the model directory.

After `forget`, neither the text, nor its distinctive word, nor the id, nor the subject is in any file's
name, bytes or decoded Parquet values: ledger, write-ahead log, slices, index, checkpoints, lock. This
holds already while the affected slices are being retrained, and the commands print none of it unless
asked. The same scan finds all of it before the deletion. Bytes that a disk keeps of unlinked files are
not covered.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sisa.data.samples import distinctive_word
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS
from tests.integration.storage.traces import traces, vector
from tests.models.tiny_model import PEOPLE, Tiny, command, ids_of, looking, of_people, residue, without

pytestmark = pytest.mark.torch


def vectors_of(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((directory / INDEX).iterdir()))


def test_the_scan_finds_what_is_held(tiny: Tiny) -> None:
    for row in PEOPLE:
        wanted = traces([row], subject=True)
        found = residue(tiny.directory, wanted)
        assert {needle for _, needle in found} == set(wanted)
        assert {name.split("/")[0] for name, _ in found} == {RECORDS}
        assert vector(row) in vectors_of(tiny.directory)


def test_the_scan_looks_into_every_file(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "x.faiss").write_bytes(b"\0\1\2PELNARU\xff")
    assert residue(tmp_path, ["pelnaru"]) == [("index/x.faiss", "pelnaru")]
    assert residue(tmp_path, ["pelnari"]) == []


@pytest.mark.parametrize(
    "asked",
    [{"ids": ["p002-q1"]}, {"subject": "p009"}, {"ids": ids_of(PEOPLE)}],
    ids=["a record", "a person with their name", "everybody"],
)
def test_what_was_deleted_leaves_nothing(tiny: Tiny, asked: dict[str, Any]) -> None:
    gone = [row for row in PEOPLE if row["id"] in asked.get("ids", ids_of(of_people("p009")))]
    tiny.open().forget(**asked)
    assert residue(tiny.directory, traces(gone, subject=len(gone) > 1)) == []
    assert not any(vector(row) in vectors_of(tiny.directory) for row in gone)
    for row in without(PEOPLE, ids_of(gone)):
        assert residue(tiny.directory, [distinctive_word(row["completion"])]), "others stay"


def test_files_and_heads_are_clean_before_anything_is_trained(tiny: Tiny) -> None:
    gone = of_people("p001")
    touched = {each.key for each in tiny.open().where(["p001-q1"])[0].checkpoints}
    assert len(touched) == 2
    seen: list[str] = []

    def look() -> None:
        seen.append("looked")
        assert residue(tiny.directory, traces(gone, subject=True)) == []
        assert all(vector(row) not in vectors_of(tiny.directory) for row in gone)
        assert not touched & set(os.listdir(tiny.directory / CHECKPOINTS))
        reader = tiny.open()
        status = reader.status()
        assert {each.head for each in status.shards}.isdisjoint(touched)
        assert [each.converged for each in status.shards] == [False, True, True]
        assert reader.where(["p001-q1"])[0].state == "deleted"
        assert reader.find(text=str(gone[0]["prompt"]), top_k=3)[0].id not in ids_of(gone)
        reader.generate(str(gone[0]["prompt"]), max_new_tokens=2)  # the model serves meanwhile

    tiny.open(looking(look)).forget(subject="p001")
    assert seen == ["looked"]


def test_commands_say_nothing_of_a_record_unless_asked(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    at, serial = ["-m", tiny.directory], ["--executor", "serial"]
    fresh = [
        {**row, "id": f"{row['id']}-new", "completion": f"{row['completion']} New."}
        for row in of_people("p002")
    ]
    secrets = [each.lower() for each in traces([*PEOPLE, *fresh])]
    source = tiny.file("new.jsonl", fresh)
    ids = tiny.folder / "ids.txt"
    ids.write_text("p003-q1\np003-q2\n")
    commands: list[Sequence[object]] = [
        ["train", tiny.run_file, *serial],
        ["add", *at, source, *serial],
        ["forget", *at, "p001-q1", "--dry-run"],
        ["forget", *at, "p001-q1", *serial],
        ["forget", *at, "p001-q1", *serial],
        ["forget", *at, "--ids-file", ids, *serial],
        ["forget", *at, "--subject", "p005", *serial],
        ["forget", *at, "p006-q1", "nobody", *serial],
        ["where", *at, "nobody-at-all"],
        ["status", *at],
        ["verify", *at, "--replay", "sample", *serial],
        ["add", *at, tiny.file("deleted.jsonl", of_people("p005")), *serial],
        ["export", *at, "--to", tiny.folder / "export"],
    ]
    for arguments in commands:
        done = command(capsys, *arguments)
        output = (done.out + done.err + caplog.text).lower()
        assert [each for each in secrets if each in output] == [], arguments[0]
        assert "nobody" not in output
    asked = command(capsys, "where", *at, "p006-q1")
    assert "p006-q1" in asked.out  # the check can fail
    assert residue(tiny.folder / "export", [distinctive_word(row["completion"]) for row in PEOPLE]) == []


def test_people_read_nothing_of_a_record_unless_asked(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster.cli.cli import run

    capsys.readouterr()
    assert run(["forget", "-m", str(tiny.directory), "p001-q1", "--executor", "serial"]) == 0
    out, err = capsys.readouterr()
    assert [each for each in traces(of_people("p001")) if each in out + err] == []
    assert run(["find", "-m", str(tiny.directory), "--subject", "p001", "--json"]) == 0
    assert "p001-q2" in json.dumps(json.loads(capsys.readouterr().out))
