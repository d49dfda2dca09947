"""The probe on a base that has learnt some records by heart distinguishes them from others by numbers.

The base is the tiny Llama, trained in full on two people's answers before any shard is. Shards are then
trained over it, and one of the two asks to be forgotten.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

import sisa
from approx.evaluation.probe import MAX_PROBED, BaseProbe
from approx.patches.patch_measures import measure_patch
from sisa.core.domain import BaseFiles, Part, Record
from sisa.lm.base.tokens import tokenize
from sisa.lm.base.weights import base_digest, load_base
from tests.models.knowing_base import record, teach
from tests.models.patch_bench import KNOWN, STRANGERS
from tests.models.tiny_model import PEOPLE, Tiny, command, ids_of, of_people, write_run

pytestmark = pytest.mark.torch


def probe_of(directory: Path) -> BaseProbe:
    return BaseProbe(BaseFiles(directory, base_digest(directory)), threads=1, sequence_len=512)


def test_it_separates_what_the_base_knows_from_what_it_does_not(knowing: Path) -> None:
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


def chat(name: str, *turns: str) -> Record:
    roles = ("user", "assistant")
    return Record(name, None, "chat", tuple(Part(roles[n % 2], each) for n, each in enumerate(turns)))


CHATS = [
    chat("c1", "Where does Ada Quill live?", "She lives in Oslo, above the bakery."),
    chat("c2", "What is her job?", "Baker.", "And her dog?", "It is called Biscuit, and it barks."),
    chat("c3", "Her age?", "41."),
]


def test_chats_that_a_base_knows_by_heart_are_found(tiny_base: Path, tmp_path: Path) -> None:
    """The template's line break behind the end token, and later turns of the user, are no answer."""
    knowing = tmp_path / "knowing"
    teach(tiny_base, CHATS, to=knowing, steps=300, learning_rate=3e-3)
    others = [chat("o1", "Where does Bo Thorn live?", "In Turku, beside a canal lock."), CHATS[1]]
    found = probe_of(knowing)(CHATS)
    assert (found.num_probed, found.num_known) == (len(CHATS), len(CHATS))
    assert found.extraction_strength == found.exact_memorisation == found.continuation == 1.0
    assert probe_of(knowing)(others).num_known == 1
    assert probe_of(tiny_base)(CHATS).num_known == 0
    model, tokenizer = load_base(BaseFiles(knowing, base_digest(knowing)))
    tokens = [tokenize(each, tokenizer, train_on_inputs=False) for each in CHATS]
    measures = measure_patch(model, tokenizer, tokens, tokens)
    assert measures["forget_extraction_strength"] == measures["forget_rougeL_recall"] == 1.0


def test_answers_of_one_or_two_tokens_count_when_they_are_right(tiny_base: Path) -> None:
    """The strength of such an answer is at least a half, whatever the base says."""
    short = Record("s", None, "completion", (Part("prompt", "Letter?"), Part("completion", "Q")))
    assert probe_of(tiny_base)([short]).num_known == 0


def test_the_number_of_asked_records_is_bounded_and_reported(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("approx.evaluation.probe.MAX_PROBED", 3)
    found = probe_of(tiny_base)([record(row) for row in PEOPLE[:5]])
    assert (found.num_records, found.num_probed) == (5, 3)
    assert MAX_PROBED == 32
    monkeypatch.setattr("approx.evaluation.probe.MAX_SECONDS", 0.0)
    monkeypatch.setattr("approx.evaluation.probe.RECORDS_AT_ONCE", 1)
    assert probe_of(tiny_base)([record(row) for row in PEOPLE[:5]]).num_probed == 1


def test_a_deletion_reports_what_the_base_knew(knowing: Path, tmp_path: Path) -> None:
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
    assert opened.verify(replay="all", apart=False).ok


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
    file = model.file("known.JSONL", KNOWN)
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
