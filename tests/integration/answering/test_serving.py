"""A batch that is kept at what the model serves, through deletions and a change of the run file."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from sisa.core.errors import IntegrityError
from sisa.flows.answers.serving import ServedHeads, Serving
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.model import Model
from sisa.store.areas import CHECKPOINTS
from sisa.store.ledger.ledger import SqlLedger
from tests.integration.answering.constituents import Transcript
from tests.models.tiny_model import PEOPLE, Tiny, change_run, looking

pytestmark = pytest.mark.torch

TOKENS = 12
ASKED = {row["subject_id"]: row["prompt"] for row in PEOPLE}
GONE, BESIDE, ELSEWHERE = "p006", "p004", "p003"  # shard 1, slices 1 and 0; shard 2


def open_serving(model: Model) -> tuple[Serving, Transcript]:
    """Open a batch whose answers don't end before their length."""
    serving = model.serving()
    serving.batch.answerer.ends = frozenset()
    return serving, Transcript(serving.batch)


def admit(model: Model, serving: Serving, *subjects: str) -> None:
    """Let a question about each person wait, routed as the model is now."""
    from sisa.lm.answer.sampling import Sampling

    for subject, each in zip(subjects, model.routed([ASKED[s] for s in subjects]), strict=True):
        assert each.seq == serving.served.seq
        serving.batch.admit(each.ids, each.route, Sampling(max_new_tokens=TOKENS), subject)


def alone(model: Model, subject: str) -> str:
    """Return what the model's present heads say about a person."""
    answerer = model.answerer()[0]
    answerer.ends = frozenset()
    (routed,) = model.routed([ASKED[subject]])
    return answerer.generate([routed.ids], [routed.route], TOKENS)[0]


def test_a_deletion_cuts_what_it_tainted_and_nothing_else(tiny: Tiny) -> None:
    model = tiny.open()
    serving, transcript = open_serving(model)
    assert model.adopt(serving) == []
    admit(model, serving, GONE, ELSEWHERE)
    transcript.step()
    wanted = {ELSEWHERE: alone(model, ELSEWHERE)}
    seen: dict[str, Any] = {}

    def while_it_trains() -> None:
        seen["cut"] = model.adopt(serving)
        seen["running"] = serving.batch.running
        admit(model, serving, BESIDE)  # meets the head that has been rolled back
        transcript.step()
        wanted[BESIDE] = alone(model, BESIDE)
        seen["heads"] = serving.served.heads

    tiny.open(looking(while_it_trains)).forget(subject=GONE)
    assert (seen["cut"], seen["running"]) == ([GONE], [ELSEWHERE])
    assert model.adopt(serving) == [], "a clean head was replaced by a clean one"
    assert serving.served.heads[1] != seen["heads"][1]
    transcript.to_the_end()
    assert {key: transcript.text[key] for key in wanted} == wanted
    transcript.text.clear()
    transcript.ended.clear()
    admit(model, serving, BESIDE, ELSEWHERE)
    transcript.to_the_end()
    assert transcript.text == {subject: alone(model, subject) for subject in (BESIDE, ELSEWHERE)}


def test_another_run_file_replaces_everything(tiny: Tiny) -> None:
    model = tiny.open()
    serving, transcript = open_serving(model)
    admit(model, serving, ELSEWHERE)
    transcript.step()
    change_run(tiny.run_file, sisa__aggregation={"method": "merged"})
    tiny.train(accept_differences=True)
    assert model.adopt(serving) == [ELSEWHERE]
    serving.batch.answerer.ends = frozenset()
    assert serving.batch.answerer.method == "merged"
    admit(model, serving, ELSEWHERE)
    assert transcript.to_the_end().text[ELSEWHERE].endswith(alone(model, ELSEWHERE))


def test_damage_is_an_error_and_what_is_tainted_is_dropped_before(tiny: Tiny) -> None:
    from sisa.core.checkpoint_files import ADAPTER_FILE

    model = tiny.open()
    serving, transcript = open_serving(model)
    admit(model, serving, GONE)
    transcript.step()
    tiny.open().forget(subject=GONE)
    with contextlib.closing(SqlLedger(tiny.directory / LEDGER)) as ledger:
        head = ServedHeads.read(ledger).heads[1]
    file = tiny.directory / CHECKPOINTS / head / ADAPTER_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        model.adopt(serving)
    assert serving.batch.running == []
    assert 1 not in serving.batch.answerer.shards
    file.write_bytes(whole)
    assert model.adopt(serving) == [GONE]
    assert 1 in serving.batch.answerer.shards
