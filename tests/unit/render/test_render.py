"""The JSON contract, key by key, and the same results in words that are safe for a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli import requests
from cluster.cli.quickstart import Start, Story
from cluster.render import render
from cluster.render.render import Result, printable
from sisa.audit.verify import ShardProof, Verification
from sisa.core.domain import RecordRow, Tombstone
from sisa.core.errors import Problem
from sisa.core.patches import VaultSet
from sisa.core.requests import Probed, Request
from sisa.flows.ask import Answer
from sisa.flows.deletion import ForgetOutcome, ForgetPlan, plan_forget
from sisa.flows.ingest import Taken, train
from sisa.flows.query import Candidate, Location, PatchTouch, Touch
from sisa.flows.routing import HeldPrompts
from sisa.flows.status import ExportStatus, ShardStatus, Status
from tests.fakes.ports import fake_model, fake_record

ESCAPES = "\x1b[31mred\x1b[0m \x07\x9b31m \u202egnp.exe\u202c"
REQUEST = Request(
    request_id="req-1",
    created_at="2026-01-01",
    due="2026-02-01",
    num_records=2,
    state="completed",
    shards=((0, 1, 2), (3, 0, 3)),
    record_epochs_retrained=18,
    record_epochs_full=90,
    model_digest_before="before",
    seconds=1.5,
    model_digest_after="after",
)
TOMBSTONE = Tombstone("i", None, "t", 0, 1, "req-0", "2025-12-31", 4)


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
    (shard(0, "k" * 64), shard(1, None)), (REQUEST,), {"records": 2048},
)  # fmt: skip


def forget_plan() -> ForgetPlan:
    model = fake_model()
    train(model.context, [fake_record(number) for number in range(12)])
    rows = [row for head in model.ledger.heads() for row in model.ledger.rows(head.shard)]
    return plan_forget(model.context, rows[:2], [TOMBSTONE])


def test_status() -> None:
    found = read(render.status(STATUS))
    assert found.keys() >= {"records", "model_digest", "shards", "requests", "sizes_bytes"}
    assert (found["records"], found["model_digest"]) == (8, "digest")
    served, empty = found["shards"]
    assert served.keys() >= {
        *("shard", "head", "depth", "num_slices", "records", "adapter_path", "adapter_sha256")
    }
    assert served["adapter_path"] == f"checkpoints/{'k' * 64}/adapter_model.safetensors"
    assert (empty["head"], empty["adapter_path"], empty["adapter_sha256"]) == (None, None, None)


def test_status_in_words_shows_what_waits() -> None:
    assert "to be trained" not in render.status(STATUS).text
    waiting = replace(STATUS, shards=(replace(shard(0, "k"), converged=False),))
    assert "(clean; the base is to be trained)" in render.status(waiting).text
    assert "req-1" in render.status(STATUS).text
    assert "order" not in render.status(STATUS).text
    ordered = replace(STATUS, num_orders=2, record_epochs_others=3)
    assert "in order 0, 3 more in 1 other order\n" in render.status(ordered).text


def test_status_in_words_shows_a_merged_export_once_with_its_shards() -> None:
    one = ExportStatus("/e", 0, "k", "a" * 64, "2026-01-01", "clean", "", None, (0,))
    found = render.status(replace(STATUS, exports=(one, replace(one, path="/m", shards=(0, 2)))))
    assert "export /e: clean\nexport /m (shards 0, 2): clean\n" in found.text


def test_where() -> None:
    held = Location("r1", "trained", 2, 1, (Touch("k1", 1, False), Touch("k2", 2, True)))
    gone = Location("r2", "deleted", 0, 1, (), "2026-01-01", "req-1", 3)
    result = render.where([held, gone])
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
    result = render.where([given, gone])
    one, other = read(result)["records"]
    assert (one["state"], one["vault"][0]["consent"], other["patches"][0]["version"]) == (
        "patch",
        "asked",
        3,
    )
    assert "r3: never a record of the model" in result.text
    assert result.text.count("approximate patch 3 (active), made to retain it") == 2
    assert "in the vault, encrypted, to forget" in result.text


@pytest.mark.parametrize("vaulted", ["", "s" * 64])
def test_a_deletion_says_how_to_make_the_base_say_less(vaulted: str) -> None:
    known = replace(REQUEST, probed=Probed(2, 2, 1, 0.5, 0.5, 0.0, 0.5), vaulted=vaulted)
    for text in (
        render.forgotten(ForgetOutcome(known, (), "after"), "my model").text,
        requests.ran([known], directory="my model").text,
    ):
        assert "sisa approx unlearn -m my model" in text
        assert ("--request req-1" in text) is bool(vaulted)
        assert ("--consent WHO" in text) is not bool(vaulted)
    output = render.forgotten(ForgetOutcome(known, (), "after"), "my model").text
    assert "still known to the base alone: 1 of 2" in output
    unknown = replace(known, probed=Probed(2, 2))
    assert "unlearn" not in render.forgotten(ForgetOutcome(unknown, (), "after")).text
    assert "unlearn" not in requests.ran([replace(known, probed=None)]).text


def test_find() -> None:
    result = render.found(
        [Candidate("r1", 0.91234, 2, 1, "content"), Candidate("r2", 1.0, 0, 0, "subject")]
    )
    assert read(result)["hits"][0] == {
        "id": "r1", "score": 0.91234, "shard": 2, "slice": 1, "match": "content",
        "subject": None, "text": None,
    }  # fmt: skip
    assert [line.split()[0] for line in result.text.splitlines()] == ["0.9123", "1.0000"]
    assert read(render.found([])) == {"hits": []}
    assert render.found([]).text


FORGET_KEYS = {
    *("request_id", "records", "shards", "record_epochs_retrained", "record_epochs_full", "seconds"),
    *("model_digest_before", "model_digest_after"),
}


def test_forget() -> None:
    found = read(render.forgotten(ForgetOutcome(REQUEST, (TOMBSTONE,), "after")))
    assert found.keys() >= FORGET_KEYS
    assert found["request_id"] == "req-1"
    assert found["records"] == 2
    assert found["shards"] == [
        {"shard": 0, "first_slice": 1, "slices_retrained": 2},
        {"shard": 3, "first_slice": 0, "slices_retrained": 3},
    ]
    assert (found["record_epochs_retrained"], found["record_epochs_full"]) == (18, 90)
    assert (found["seconds"], found["already_deleted"]) == (1.5, 1)
    assert (found["model_digest_before"], found["model_digest_after"]) == ("before", "after")


def test_forget_of_what_is_gone_says_so_under_the_same_keys() -> None:
    result = render.forgotten(ForgetOutcome(None, (TOMBSTONE, TOMBSTONE), "same"))
    found = read(result)
    done = read(render.forgotten(ForgetOutcome(REQUEST, (), "after")))
    assert found.keys() == done.keys()
    assert (found["request_id"], found["records"], found["shards"]) == (None, 0, [])
    assert (found["already_deleted"], found["already_deleted_by"]) == (2, ["req-0"])
    assert (found["model_digest_before"], found["model_digest_after"]) == ("same", "same")
    assert (result.exit_code, result.text) == (0, "2 of the named records were already deleted")


def test_a_dry_run() -> None:
    planned = forget_plan()
    result = render.forget_plan(replace(planned, estimated_seconds=1.25))
    found = read(result)
    assert found["dry_run"] is True
    assert (found["records"], found["already_deleted"]) == (2, 1)
    assert found["record_epochs_retrained"] == sum(plan.record_epochs for plan in planned.plans) > 0
    assert found["record_epochs_full"] >= found["record_epochs_retrained"]
    assert found["would_erase"] == {
        "checkpoints": len(planned.tainted), "slice_files": 2, "index_rows": 2, "exports": 0
    }  # fmt: skip
    assert [each["slices_retrained"] for each in found["shards"]] == [
        len(plan.train) for plan in planned.plans
    ]
    assert "nothing was changed" in result.text
    assert result.text.endswith("next: the same command without --dry-run")
    unknown = render.forget_plan(planned)
    assert (read(unknown)["estimated_seconds"], "unknown" in unknown.text) == (None, True)


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 4)])
def test_verify(ok: bool, code: int) -> None:
    proofs = (
        ShardProof(0, "k", True, ok, 3),
        ShardProof(1, None, False, None, 0, "the shard holds no records"),
    )
    findings = () if ok else (Problem("shard 0", "the replay's bytes differ"),)
    result = render.verified(Verification(ok, 9, findings, proofs))
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
    text = render.verified(Verification(True, 1, (), proofs)).text
    assert "1 file checked" in text
    assert "shard 3: 1 stage trained from scratch: equal" in text
    assert text.count("not requested") == text.count("3 shards not replayed (not requested)") == 1


def test_train_shows_what_was_not_taken() -> None:
    result = render.taken(Taken(10, 0, 7, 2, 1, 0, 0, "digest"), Path("model"))
    assert read(result) == {
        "records": 10, "added": 0, "already_held": 7, "deleted_not_taken": 2, "new_not_taken": 1,
        "record_epochs_trained": 0, "slices_trained": 0, "model_digest": "digest",
            "record_epochs_others": 0, "generation": None, "prompts": None,
    }  # fmt: skip
    assert "skipped: 2 records that a request deleted before" in result.text
    assert "not added: 1 new record; use `sisa add -m model FILE`" in result.text
    assert result.text.splitlines()[-1].startswith("next: ")


def test_held_prompts_that_are_turned_away_are_counted() -> None:
    assert render.prompts(None) == []
    assert render.prompts(HeldPrompts(57, 0, 0))[0].endswith("0 of 57 stored prompts are turned away")
    (line,) = render.prompts(HeldPrompts(57, 17, 2))
    assert "17 of 57 stored prompts are turned away, 2 answered by another shard (see min_score" in line
    taken = Taken(10, 0, 7, 0, 0, 0, 0, "digest", prompts=HeldPrompts(57, 17, 2))
    assert line in render.taken(taken, Path("model")).text
    status = replace(STATUS, form="chat", prompts=HeldPrompts(57, 17, 2))
    assert line in render.status(status).text
    assert "in the form: chat" in render.status(status).text


def test_the_small_results() -> None:
    assert read(render.answer(Answer("In Tessaly.", (2,)))) == {"answer": "In Tessaly.", "shards": [2]}
    assert render.answer(Answer("", (2,))).text == "(the model ended at once)"
    assert "the base model alone" in render.answer(Answer("", ())).text.splitlines()[1]
    several = render.answers([Answer("In Tessaly.", (2,)), Answer("", ())])
    assert read(several)["answers"][0] == {"answer": "In Tessaly.", "shards": [2]}
    assert several.text.splitlines()[:2] == ["1: In Tessaly.", "2: (the model ended at once)"]
    assert read(render.exported([Path("out/shard-00000")])) == {"adapters": ["out/shard-00000"]}
    assert render.exported([]).text
    start = read(Start(Path("m/run.yaml"), Path("m/people.jsonl"), 100).result)
    assert start == {"run_file": "m/run.yaml", "data_file": "m/people.jsonl", "records": 100}


def test_a_quickstart_that_proves_nothing_fails() -> None:
    story = Story(equal=True, record_epochs_retrained=10, record_epochs_full=40)
    assert read(story.result)["share_of_full_training"] == 0.25
    assert story.result.exit_code == 0
    assert Story(equal=False).result.exit_code == 4


def test_share() -> None:
    assert (render.share(1, 3), render.share(0, 5), render.share(0, 0)) == ("33.3%", "0.0%", "0%")


@given(st.text())
def test_printable_text_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert all(ord(c) >= 0x20 and not 0x7F <= ord(c) < 0xA0 for c in shown if c not in "\n\t")
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b")
    assert printable(shown) == shown


def test_printable_text_is_still_text() -> None:
    assert printable("Zoë\tsaid:\n“¿Qué?” 日本 🙂") == "Zoë\tsaid:\n“¿Qué?” 日本 🙂"


def test_text_of_records_reaches_no_terminal_raw() -> None:
    shown = [
        render.where([Location(ESCAPES, "trained", 0, 0, ())]),
        render.found([Candidate(ESCAPES, 1.0, 0, 0, "content")]),
        render.answer(Answer(ESCAPES, ())),
        Story(question=ESCAPES, answer_before=ESCAPES, answer_after=ESCAPES).result,
    ]
    for result in shown:
        assert not set(result.text) & set("\x1b\x07\x9b\u202e\u202c")


def test_no_row_is_printed_by_a_dry_run() -> None:
    planned = forget_plan()
    text = render.forget_plan(planned)
    for row in planned.removed:
        assert isinstance(row, RecordRow)
        assert row.id_digest not in text.text + json.dumps(text.json)


def test_a_deferred_deletion_shows_what_is_served_and_what_is_still_to_be_trained() -> None:
    request = replace(
        REQUEST, state="erased", served=((0, 1, 3), (3, 2, 3)), serving_depth=0.5, record_epochs_others=7
    )
    result = render.forgotten(ForgetOutcome(request, (), "after", deferred=True))
    found = read(result)
    assert found["served"][1] == {"shard": 3, "slices_served": 2, "of": 3}
    assert (found["deferred"], found["serving_depth"], found["record_epochs_others"]) == (True, 0.5, 7)
    assert "2 slices to be retrained from slice 1 on" in result.text
    assert "meanwhile served: shard 0: 1 of 3 slices, shard 3: 2 of 3 slices; 50.0%" in result.text
    assert "other orders: 7 record-epochs more" in result.text
    assert "next: `sisa run -m DIR`" in result.text
    done = render.forgotten(ForgetOutcome(REQUEST, (), "after")).text
    assert "2 slices retrained" in done
    assert done.endswith("next: `sisa verify -m DIR --replay sample` proves it by retraining")


def test_an_answer_can_stand_alone() -> None:
    """The shards that answered reveal whether a person's records are held."""
    for shards in ((), (1,)):
        found = Answer("In Gadmode.", shards)
        alone = render.answer(found, answer_only=True)
        assert (alone.json, alone.text) == ({"answer": "In Gadmode."}, "In Gadmode.")
        assert render.answers([found], answer_only=True).json == {"answers": [{"answer": "In Gadmode."}]}
