"""Deletions as JSON, key by key, and the same in words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cluster.cli.requests import ran
from cluster.render import deletions
from cluster.render.deletions import forgotten
from cluster.render.result import Result
from sisa.core.domain import RecordRow, Tombstone
from sisa.core.requests import Probed, Request
from sisa.flows.deletion import ForgetOutcome, ForgetPlan, plan_forget
from tests.fakes.ports import fake_trained

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


def forget_plan() -> ForgetPlan:
    model = fake_trained(range(12))
    rows = [row for head in model.ledger.heads() for row in model.ledger.rows(head.shard)]
    return plan_forget(model.context, rows[:2], [TOMBSTONE])


@pytest.mark.parametrize("vaulted", ["", "s" * 64])
def test_a_deletion_says_how_to_make_the_base_say_less(vaulted: str) -> None:
    known = replace(REQUEST, probed=Probed(2, 2, 1, 0.5, 0.5, 0.0, 0.5), vaulted=vaulted)
    for text in (
        forgotten(ForgetOutcome(known, (), "after"), "my model").text,
        ran([known], directory="my model").text,
    ):
        assert "sisa approx unlearn -m 'my model'" in text
        assert ("--request req-1" in text) is bool(vaulted)
        assert ("--consent WHO" in text) is not bool(vaulted)
    output = forgotten(ForgetOutcome(known, (), "after"), "my model").text
    assert "still known to the base alone: 1 of 2" in output
    unknown = replace(known, probed=Probed(2, 2))
    assert "unlearn" not in forgotten(ForgetOutcome(unknown, (), "after")).text
    assert "unlearn" not in ran([replace(known, probed=None)]).text


FORGET_KEYS = {
    *("request_id", "records", "shards", "record_epochs_retrained", "record_epochs_full", "seconds"),
    *("model_digest_before", "model_digest_after"),
}


def test_forget() -> None:
    found = read(forgotten(ForgetOutcome(REQUEST, (TOMBSTONE,), "after")))
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
    result = forgotten(ForgetOutcome(None, (TOMBSTONE, TOMBSTONE), "same"))
    found = read(result)
    done = read(forgotten(ForgetOutcome(REQUEST, (), "after")))
    assert found.keys() == done.keys()
    assert (found["request_id"], found["records"], found["shards"]) == (None, 0, [])
    assert (found["already_deleted"], found["already_deleted_by"]) == (2, ["req-0"])
    assert (found["model_digest_before"], found["model_digest_after"]) == ("same", "same")
    assert (result.exit_code, result.text) == (0, "already deleted before: 2 records, by req-0")


def test_a_dry_run() -> None:
    planned = forget_plan()
    result = deletions.forget_plan(replace(planned, estimated_seconds=1.25))
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
    unknown = deletions.forget_plan(planned)
    assert (read(unknown)["estimated_seconds"], "unknown" in unknown.text) == (None, True)


def test_no_row_is_printed_by_a_dry_run() -> None:
    planned = forget_plan()
    text = deletions.forget_plan(planned)
    for row in planned.removed:
        assert isinstance(row, RecordRow)
        assert row.id_digest not in text.text + json.dumps(text.json)


def test_a_deferred_deletion_shows_what_is_served_and_what_is_still_to_be_trained() -> None:
    request = replace(
        REQUEST, state="erased", served=((0, 1, 3), (3, 2, 3)), serving_depth=0.5, record_epochs_others=7
    )
    result = forgotten(ForgetOutcome(request, (), "after", deferred=True))
    found = read(result)
    assert found["served"][1] == {"shard": 3, "slices_served": 2, "of": 3}
    assert (found["deferred"], found["serving_depth"], found["record_epochs_others"]) == (True, 0.5, 7)
    assert "2 slices to be retrained from slice 1 on" in result.text
    assert "meanwhile served: shard 0: 1 of 3 slices, shard 3: 2 of 3 slices; 50.0%" in result.text
    assert "other orders: 7 record-epochs more" in result.text
    assert "next: `sisa run -m DIR`" in result.text
    done = forgotten(ForgetOutcome(REQUEST, (), "after")).text
    assert "2 slices retrained" in done
    assert done.endswith("next: `sisa verify -m DIR --replay sample` proves it by retraining")
