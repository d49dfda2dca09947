"""The probe on a base that has learnt some records by heart: it tells them from others, by numbers.

The base is the tiny Llama, trained in full on two people's answers before any shard is; shards are then
trained over it, and one of the two asks to be forgotten.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

import sisa
from approx.probe import MAX_PROBED, BaseProbe
from sisa.domain import Part, Record
from sisa.model.base import base_digest
from tests.integration.patch_bench import KNOWN, STRANGERS
from tests.integration.tiny_model import PEOPLE, Tiny, command, ids_of, of_people, write_run
from tests.knowing_base import record

pytestmark = pytest.mark.torch


def probe_of(directory: Path) -> BaseProbe:
    return BaseProbe(directory, base_digest(directory), threads=1, sequence_len=512)


def test_it_tells_what_the_base_knows_from_what_it_does_not(knowing: Path) -> None:
    probe = probe_of(knowing)
    known, strange = (probe([record(row) for row in rows]) for rows in (KNOWN, STRANGERS))
    assert (known.num_known, strange.num_known) == (len(KNOWN), 0)
    assert known.continuation > 0.9 > 0.8 > strange.continuation  # the phrases are the same
    assert known.extraction_strength > 0.9 > 0.5 > strange.extraction_strength
    assert known.membership_margin > -0.1 > -1 > strange.membership_margin
    assert known.exact_memorisation > strange.exact_memorisation
    mixed = probe([record(row) for row in [*KNOWN, *STRANGERS]])
    assert (mixed.num_known, mixed.num_probed) == (len(KNOWN), len(KNOWN) + len(STRANGERS))


def test_it_repeats_itself_and_changes_nothing(knowing: Path) -> None:
    records, before = [record(row) for row in KNOWN], base_digest(knowing)
    assert probe_of(knowing)(records) == probe_of(knowing)(records)
    assert base_digest(knowing) == before


def test_plain_texts_and_chats_are_asked_for_their_second_half_and_last_turn(tiny_base: Path) -> None:
    text = Record("t", None, "text", (Part("text", "A text of some length, with two halves."),))
    chat = Record("c", None, "chat", (Part("user", "Who?"), Part("assistant", "Nobody in particular.")))
    found = probe_of(tiny_base)([text, chat])
    assert (found.num_records, found.num_probed, found.num_known) == (2, 2, 0)


def test_only_so_many_are_asked_and_it_is_told(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("approx.probe.MAX_PROBED", 3)
    found = probe_of(tiny_base)([record(row) for row in PEOPLE[:5]])
    assert (found.num_records, found.num_probed) == (5, 3)
    assert MAX_PROBED == 32
    monkeypatch.setattr("approx.probe.MAX_SECONDS", 0.0)
    assert probe_of(tiny_base)([record(row) for row in PEOPLE[:5]]).num_probed == 1


def test_a_deletion_tells_what_the_base_knew(knowing: Path, tmp_path: Path) -> None:
    model = Tiny(tmp_path / "sisa", knowing)
    write_run(model.folder, knowing)
    model.train()
    opened = model.open()
    request = opened.forget(ids_of(of_people("p003"))).request
    assert request is not None
    assert request.probed is not None
    assert request.probed.num_known == request.probed.num_probed == len(of_people("p003"))
    stranger = opened.forget(ids_of(of_people("p001"))).request
    assert stranger is not None
    assert stranger.probed is not None
    assert (stranger.probed.num_known, stranger.probed.failure) == (0, "")
    kept = {each.request.request_id: each.request.probed for each in model.open().requests()}
    assert kept == {request.request_id: request.probed, stranger.request_id: stranger.probed}
    assert all(not isinstance(value, str) or value == "" for value in asdict(request.probed).values())
    assert opened.verify(replay="all").ok


def test_the_run_file_can_do_without(tmp_path: Path, tiny_base: Path) -> None:
    model = Tiny(tmp_path / "sisa", tiny_base)
    write_run(model.folder, tiny_base, probe=False)
    model.train()
    request = model.open().forget(["p001-q1"]).request
    assert request is not None
    assert request.probed is None
    assert isinstance(sisa.load_run_file(model.run_file).probe, bool)


@pytest.mark.parametrize("as_records", [True, False])
def test_the_command_asks_the_same_of_any_text(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_records: bool
) -> None:
    model = Tiny(tmp_path / "sisa", knowing)
    write_run(model.folder, knowing)
    model.train()
    file = model.file("known.jsonl", KNOWN)
    if not as_records:
        file = model.folder / "texts.txt"
        file.write_text("\n".join(f"{row['prompt']}{row['completion']}" for row in STRANGERS) + "\n\n")
    done = command(capsys, "approx", "probe", "-m", model.directory, "--file", file)
    assert (done.code, done.json["approximate"]) == (0, True)
    assert done.json["num_probed"] == (len(KNOWN) if as_records else len(STRANGERS))
    assert done.json["num_known"] == (len(KNOWN) if as_records else 0)
    assert not any(row["completion"].strip() in done.out + done.err for row in [*KNOWN, *STRANGERS])
    empty = model.folder / "empty.txt"
    empty.write_text("\n")
    assert command(capsys, "approx", "probe", "-m", model.directory, "--file", empty).code == 2
    gone = command(capsys, "approx", "probe", "-m", model.directory, "--file", tmp_path / "none.txt")
    assert (gone.code, gone.error["type"]) == (2, "InvalidInput")
