"""The JSON contract, key by key, and the same results in words that are safe for a terminal: those of
training, asking and checking."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.asking import all_answered, answered, hits_listed, located, routing_check, status_shown
from cluster.cli.maintenance import verified
from cluster.cli.quickstart import Start, Story
from cluster.cli.training import exported, taken
from cluster.render.result import Result
from sisa.audit.verify import ShardProof, Verification
from sisa.core.errors import Problem
from sisa.core.patches import VaultSet
from sisa.core.requests import Request
from sisa.flows.answers.ask import Answer
from sisa.flows.answers.routing import HeldPrompts
from sisa.flows.candidates import Candidate
from sisa.flows.ingest import Taken
from sisa.flows.locations import Location, PatchTouch, Touch
from sisa.flows.requests import RequestView
from sisa.flows.status import ExportStatus, ShardStatus, Status

ESCAPES = "\x1b[31mred\x1b[0m \x07\x9b31m \u202egnp.exe\u202c"


def read(result: Result) -> dict[str, Any]:
    """Return what a script would read: only JSON's own types survive."""
    found: dict[str, Any] = json.loads(json.dumps(result.json))
    return found


def shard(number: int, head: str | None) -> ShardStatus:
    path = f"checkpoints/{head}/adapter_model.safetensors" if head else None
    return ShardStatus(
        number, head, 3 if head else 0, 3, 4, (1, 3, 0), True, path, "a" if head else None
    )


STATUS = Status(
    "model", 8, 2, "digest", "base", "b" * 64, "hashing", "cumulative",
    (shard(0, "k" * 64), shard(1, None)),
    (RequestView(Request("req-1", "2026-01-01", "2026-02-01", 2, external_id="T-1"), -3, ()),),
    {"records": 2048},
)  # fmt: skip


def test_status() -> None:
    found = read(status_shown(STATUS))
    assert found.keys() >= {"records", "model_digest", "shards", "requests", "sizes_bytes"}
    assert (found["records"], found["model_digest"]) == (8, "digest")
    served, empty = found["shards"]
    assert served.keys() >= {
        *("shard", "head", "depth", "num_slices", "records", "adapter_path", "adapter_sha256")
    }
    assert served["adapter_path"] == f"checkpoints/{'k' * 64}/adapter_model.safetensors"
    assert (empty["head"], empty["adapter_path"], empty["adapter_sha256"]) == (None, None, None)


def test_status_in_words_shows_what_waits() -> None:
    assert "to be trained" not in status_shown(STATUS).text
    waiting = replace(STATUS, shards=(replace(shard(0, "k"), converged=False),))
    assert "(clean; the base is to be trained)" in status_shown(waiting).text
    late = "req-1 (T-1): received, 2 records, due 2026-02-01, overdue by 3 days, entered at 2026-01-01\n"
    assert f"request {late}" in status_shown(STATUS).text
    assert status_shown(STATUS).json["requests"][0]["days_left"] == -3
    assert "order" not in status_shown(STATUS).text
    ordered = replace(STATUS, num_orders=2, record_epochs_others=3)
    assert "in order 0, 3 more in 1 other order\n" in status_shown(ordered).text


def test_status_in_words_shows_a_merged_export_once_with_its_shards() -> None:
    one = ExportStatus("/e", 0, "k", "a" * 64, "2026-01-01", "clean", "", None, (0,))
    found = status_shown(replace(STATUS, exports=(one, replace(one, path="/m", shards=(0, 2)))))
    assert "export /e: clean\nexport /m (shards 0, 2): clean\n" in found.text


def test_where() -> None:
    held = Location("r1", "trained", 2, 1, (Touch("k1", 1, False), Touch("k2", 2, True)))
    gone = Location("r2", "deleted", 0, 1, (), "2026-01-01", "req-1", 3)
    result = located([held, gone])
    one, other = read(result)["records"]
    assert one.keys() >= {"id", "state", "shard", "slice", "checkpoints"}
    assert (one["id"], one["state"], one["shard"], one["slice"]) == ("r1", "trained", 2, 1)
    assert one["checkpoints"][1] == {"key": "k2", "slice": 2, "is_head": True}
    assert (other["state"], other["deleted_at"], other["request_id"]) == (
        "deleted",
        "2026-01-01",
        "req-1",
    )
    assert result.text.count("<- served head") == 1
    assert "r2: deleted at 2026-01-01 by req-1" in result.text


def test_where_shows_patches_and_what_the_vault_holds() -> None:
    kept = VaultSet("s" * 64, "forget", 2, "asked", "now", "sha", 9)
    touch = PatchTouch(3, "k", "active", "retain")
    given = Location("r3", "patch", -1, -1, (), patches=(touch,), vault=(kept,))
    gone = Location("r2", "deleted", 0, 1, (), "2026-01-01", "req-1", 3, patches=(touch,))
    result = located([given, gone])
    one, other = read(result)["records"]
    assert (one["state"], one["vault"][0]["consent"], other["patches"][0]["version"]) == (
        "patch",
        "asked",
        3,
    )
    assert "r3: never a record of the model" in result.text
    assert result.text.count("approximate patch 3 (active), made to retain it") == 2
    assert "in the vault, encrypted, to forget" in result.text


def test_find() -> None:
    result = hits_listed(
        [Candidate("r1", 0.91234, 2, 1, "content"), Candidate("r2", 1.0, 0, 0, "subject")]
    )
    assert read(result)["hits"][0] == {
        "id": "r1", "score": 0.91234, "shard": 2, "slice": 1, "match": "content",
        "subject": None, "text": None,
    }  # fmt: skip
    assert [line.split()[0] for line in result.text.splitlines()] == ["0.9123", "1.0000"]
    assert read(hits_listed([])) == {"hits": []}
    assert hits_listed([]).text


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 4)])
def test_verify(ok: bool, code: int) -> None:
    proofs = (
        ShardProof(0, "k", True, ok, 3),
        ShardProof(1, None, False, None, 0, "the shard holds no records"),
    )
    findings = () if ok else (Problem("shard 0", "the replay's bytes differ"),)
    result = verified(Verification(ok, 9, findings, proofs))
    found = read(result)
    assert found["ok"] is ok
    assert [(each["shard"], each["replayed"], each["equal"]) for each in found["shards"]] == [
        (0, True, ok),
        (1, False, None),
    ]
    assert result.exit_code == code
    assert result.text.splitlines()[-1] == ("ok" if ok else "NOT OK")
    assert ("DIFFERENT" in result.text) is not ok
    assert "not replayed (the shard holds no records)" in result.text


def test_shards_that_were_not_to_be_replayed_are_counted_in_one_line() -> None:
    left = tuple(ShardProof(shard, "k", False, None, 0, "not requested") for shard in range(3))
    proofs = (ShardProof(3, "k", True, True, 1), *left)
    text = verified(Verification(True, 1, (), proofs)).text
    assert "1 file checked" in text
    assert "shard 3: 1 stage trained from scratch: equal" in text
    assert text.count("not requested") == text.count("3 shards not replayed (not requested)") == 1


def test_train_shows_what_was_not_taken() -> None:
    result = taken(Taken(10, 0, 7, 2, 1, 0, 0, "digest"), Path("model"))
    assert read(result) == {
        "records": 10, "added": 0, "already_held": 7, "deleted_not_taken": 2, "new_not_taken": 1,
        "record_epochs_trained": 0, "slices_trained": 0, "model_digest": "digest",
            "record_epochs_others": 0, "generation": None, "prompts": None,
    }  # fmt: skip
    assert "skipped: 2 records that a request deleted before" in result.text
    assert "not added: 1 new record; use `sisa add -m model FILE`" in result.text
    assert result.text.splitlines()[-1].startswith("next: ")


def test_held_prompts_that_are_turned_away_are_counted() -> None:
    assert routing_check(None) == []
    assert routing_check(HeldPrompts(57, 0, 0))[0].endswith("0 of 57 stored prompts are turned away")
    (line,) = routing_check(HeldPrompts(57, 17, 2))
    assert "17 of 57 stored prompts are turned away, 2 answered by another shard (see min_score" in line
    trained = Taken(10, 0, 7, 0, 0, 0, 0, "digest", prompts=HeldPrompts(57, 17, 2))
    assert line in taken(trained, Path("model")).text
    status = replace(STATUS, form="chat", prompts=HeldPrompts(57, 17, 2))
    assert line in status_shown(status).text
    assert "in the form: chat" in status_shown(status).text


def test_the_small_results() -> None:
    assert read(answered(Answer("In Tessaly.", (2,)))) == {"answer": "In Tessaly.", "shards": [2]}
    assert answered(Answer("", (2,))).text == "(the model ended at once)"
    assert "the base model alone" in answered(Answer("", ())).text.splitlines()[1]
    several = all_answered([Answer("In Tessaly.", (2,)), Answer("", ())])
    assert read(several)["answers"][0] == {"answer": "In Tessaly.", "shards": [2]}
    assert several.text.splitlines()[:2] == ["1: In Tessaly.", "2: (the model ended at once)"]
    assert read(exported([Path("out/shard-00000")])) == {"adapters": ["out/shard-00000"]}
    assert exported([]).text
    start = read(Start(Path("m/run.yaml"), Path("m/people.jsonl"), 100).result)
    assert start == {"run_file": "m/run.yaml", "data_file": "m/people.jsonl", "records": 100}


def test_a_quickstart_that_proves_nothing_fails() -> None:
    story = Story(equal=True, record_epochs_retrained=10, record_epochs_full=40)
    assert read(story.result)["share_of_full_training"] == 0.25
    assert story.result.exit_code == 0
    assert Story(equal=False).result.exit_code == 4


def test_text_of_records_reaches_no_terminal_raw() -> None:
    shown = [
        located([Location(ESCAPES, "trained", 0, 0, ())]),
        hits_listed([Candidate(ESCAPES, 1.0, 0, 0, "content")]),
        answered(Answer(ESCAPES, ())),
        Story(question=ESCAPES, answer_before=ESCAPES, answer_after=ESCAPES).result,
    ]
    for result in shown:
        assert not set(result.text) & set("\x1b\x07\x9b\u202e\u202c")


def test_an_answer_can_stand_alone() -> None:
    """The shards that answered reveal whether a person's records are held."""
    for shards in ((), (1,)):
        found = Answer("In Gadmode.", shards)
        alone = answered(found, answer_only=True)
        assert (alone.json, alone.text) == ({"answer": "In Gadmode."}, "In Gadmode.")
        assert all_answered([found], answer_only=True).json == {"answers": [{"answer": "In Gadmode."}]}
