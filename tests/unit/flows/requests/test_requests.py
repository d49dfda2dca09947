"""Requests over a model of fakes: taken in once, run only when approved, finished whatever breaks.

The trainer's weights confess what touched them, so `clean` can look at everything that is held. At the
end of any history the held bytes are those of a model that was trained on what remains.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any, NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.domain import Part, Record, RecordRow
from sisa.core.errors import ConfigConflict, EnvironmentFault, InvalidInput, SisaError, UnknownRecord
from sisa.core.requests import Request, RequestState
from sisa.flows.context.areas import unlisted
from sisa.flows.context.context import Context
from sisa.flows.context.served import model_digest
from sisa.flows.context.slices import ids_of
from sisa.flows.ingest import add, train
from sisa.flows.locations import where
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import (
    Terms,
    carry_out,
    copies,
    decide,
    extend,
    find_request,
    forget_at_once,
    new_request,
    plan_run,
    ready,
    submit,
    view_of,
    views,
)
from sisa.store.areas import CHECKPOINTS, INDEX, METRICS, RECORDS
from tests.fakes.ports import FakeModel, changed, fake_model, fake_record

NUM_RECORDS = 12
DAY = "2026-01-01T00:00:00+00:00"
WHOLE_LIFE = ["received", "approved", "committed", "rolled_back", "erased", "retrained", "completed"]
APPROVED = Terms(approver="dpo")


def record(number: int) -> Record:
    return fake_record(number, f"subject-{number % 5}")


def trained(numbers: Collection[int]) -> FakeModel:
    fake = fake_model()
    train(fake.context, [record(number) for number in sorted(numbers)])
    return fake


@pytest.fixture
def fake() -> FakeModel:
    return trained(range(NUM_RECORDS))


def asked(fake: FakeModel, *numbers: int, terms: Terms = APPROVED) -> Request:
    """Submit as the API does: held records, and tombstones of records deleted before."""
    digests = [digest(fake, record(number).id) for number in numbers]
    dead = [each for each in fake.ledger.tombstones() if each.id_digest in digests]
    return submit(fake.context, fake.rows(*numbers), dead, terms)


def held_numbers(fake: FakeModel) -> set[int]:
    return {number for number in range(NUM_RECORDS) if fake.rows(number)}


def run_all(fake: FakeModel) -> tuple[Request, ...]:
    return carry_out(fake.context, ready(fake.context))


def state(fake: FakeModel, request: Request) -> RequestState:
    return find_request(fake.context, request.request_id).state


def states(fake: FakeModel, request: Request) -> list[RequestState]:
    return [each.state for each in view_of(fake.context, request).events]


def held_bytes(fake: FakeModel) -> tuple[Any, ...]:
    stores = (fake.checkpoints.stored, fake.records.stored, fake.index.stored)
    return (*stores, fake.ledger.heads(), model_digest(fake.context))


def served(fake: FakeModel) -> set[str]:
    """Return the ids of all records that the heads know."""
    keys = [head.key for head in fake.ledger.heads() if head.key is not None]
    adapters = [json.loads(fake.checkpoints.stored[key][ADAPTER_FILE]) for key in keys]
    return {each for adapter in adapters for each in adapter["touched"]}


def ids(numbers: Collection[int]) -> set[str]:
    return {record(number).id for number in numbers}


# --- submit


def test_a_request_waits_and_changes_nothing_held(fake: FakeModel) -> None:
    before = held_bytes(fake)
    request = asked(fake, 3, 4, terms=Terms(reason="asked by letter", external_id="T-1"))
    assert (request.state, request.num_records, request.due) == ("received", 2, "2026-02-01")
    assert (request.external_id, request.reason, request.approver) == ("T-1", "asked by letter", None)
    assert held_bytes(fake) == before
    assert states(fake, request) == ["received"]
    assert view_of(fake.context, request).days_left == 31


def test_one_request_is_shown_without_the_events_of_others(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of thousands of requests takes a second to read."""
    other, request = asked(fake, 3), asked(fake, 4)
    decide(fake.context, other.request_id, "held", "court order")
    everything = {each.request.request_id: each for each in views(fake.context)}
    monkeypatch.setattr(fake.ledger, "events", None)
    denied = decide(fake.context, request.request_id, "denied", "of another person")
    seen = view_of(fake.context, denied)
    assert seen.events[:-1] == everything[request.request_id].events
    assert [each.state for each in seen.events][-1] == "denied"


def test_no_plain_id_or_subject_waits_in_the_ledger(fake: FakeModel) -> None:
    asked(fake, 3, 4)
    assert not any(each in repr(fake.ledger.tables) for each in (*ids({3, 4}), "subject-"))


def test_an_approver_approves_at_once(fake: FakeModel) -> None:
    request = asked(fake, 3)
    found = view_of(fake.context, request)
    assert (request.state, request.approver) == ("approved", "dpo")
    assert [(each.state, each.note) for each in found.events] == [("received", ""), ("approved", "dpo")]


@pytest.mark.parametrize("due", ["", "soon", "2026-02-30", "2025-12-31"])
def test_a_due_date_does_not_precede_the_receipt(fake: FakeModel, due: str) -> None:
    what = "before the day of receipt" if due == "2025-12-31" else "is not a date"
    with pytest.raises(InvalidInput, match=what):
        asked(fake, 3, terms=Terms(due=due))
    assert fake.ledger.requests() == []


@pytest.mark.parametrize("received_on", ["", "soon", "2026-02-30", "2026-01-02", "2018-05-24"])
def test_a_day_of_receipt_has_come_under_the_law(fake: FakeModel, received_on: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        asked(fake, 3, terms=Terms(received_on=received_on))
    assert refused.value.next_step
    assert fake.ledger.requests() == []


def test_the_term_counts_from_the_day_of_receipt_though_it_has_passed(fake: FakeModel) -> None:
    late = asked(fake, 3, terms=Terms(received_on="2025-11-27", approver="dpo"))
    assert (late.received_on, late.due) == ("2025-11-27", "2025-12-27")
    assert view_of(fake.context, late).days_left == -5
    assert asked(fake, 4, terms=Terms(received_on="2026-01-01")).due == "2026-02-01"
    own = asked(fake, 5, terms=Terms(received_on="2025-11-27", due="2025-11-30"))
    assert (own.received_on, own.due) == ("2025-11-27", "2025-11-30")
    with pytest.raises(InvalidInput, match="before the day of receipt"):
        asked(fake, 6, terms=Terms(received_on="2025-11-27", due="2025-11-26"))
    assert plan_run(fake.context).why == "a request is overdue"


@pytest.mark.parametrize("reason", ["sisa rectify", "California DROP", "OpenDSR"])
def test_nobody_gives_a_reason_that_the_program_reads_again(fake: FakeModel, reason: str) -> None:
    """Else a rectification could bring a deleted record back, and OpenDSR would report other times."""
    with pytest.raises(InvalidInput, match="the program gives this reason"):
        asked(fake, 3, terms=Terms(reason=reason, approver="dpo"))
    assert fake.ledger.requests() == []


def test_a_due_date_of_ones_own_replaces_the_regimes(fake: FakeModel) -> None:
    assert asked(fake, 3, terms=Terms(due="2026-01-01")).due == "2026-01-01"
    assert asked(fake, 4, terms=Terms(regime="delete-act")).due == "2026-02-15"


def test_an_unknown_request_is_unknown(fake: FakeModel) -> None:
    asked(fake, 3)
    with pytest.raises(UnknownRecord):
        find_request(fake.context, "req-none")
    with pytest.raises(UnknownRecord):
        extend(fake.context, "T-1", "complex")


# --- external ids


def test_the_same_external_id_with_the_same_records_is_the_same_request(fake: FakeModel) -> None:
    terms = Terms(external_id="T-1", approver="dpo")
    first = asked(fake, 3, 4, terms=terms)
    assert asked(fake, 4, 3, terms=terms) == first
    (done,) = run_all(fake)
    assert asked(fake, 3, 4, terms=terms) == done  # after its completion, too
    assert len(fake.ledger.requests()) == 1
    assert states(fake, first) == WHOLE_LIFE
    assert find_request(fake.context, "T-1") == find_request(fake.context, first.request_id) == done


def test_an_approver_who_comes_later_approves_the_same_request(fake: FakeModel) -> None:
    first = asked(fake, 3, terms=Terms(external_id="T-1"))
    again = asked(fake, 3, terms=Terms(external_id="T-1", approver="dpo"))
    assert (again.request_id, again.state, again.approver) == (first.request_id, "approved", "dpo")
    assert asked(fake, 3, terms=Terms(external_id="T-1", approver="another")) == again
    assert states(fake, first) == ["received", "approved"]


@pytest.mark.parametrize("others", [(3,), (3, 4, 5), (5, 6)])
def test_the_same_external_id_with_other_records_is_refused(
    fake: FakeModel, others: tuple[int, ...]
) -> None:
    terms = Terms(external_id="T-1", approver="dpo")
    first = asked(fake, 3, 4, terms=terms)
    for _ in range(2):  # the second time after its completion
        with pytest.raises(ConfigConflict) as caught:
            asked(fake, *others, terms=terms)
        assert caught.value.where == first.request_id
        run_all(fake)
    assert len(fake.ledger.requests()) == 1
    assert held_numbers(fake) == set(range(NUM_RECORDS)) - {3, 4}


def test_without_external_ids_requests_are_each_their_own(fake: FakeModel) -> None:
    assert asked(fake, 3).request_id != asked(fake, 3).request_id


def test_an_external_id_is_no_other_requests_id(fake: FakeModel) -> None:
    """Else a decision that is meant for one request is taken on the other."""
    first = asked(fake, 3, terms=Terms())
    with pytest.raises(ConfigConflict):
        asked(fake, 4, terms=Terms(external_id=first.request_id))


# --- batches


def test_a_whole_life_in_order(fake: FakeModel) -> None:
    before = model_digest(fake.context)
    request = asked(fake, 3)
    (done,) = run_all(fake)
    assert states(fake, request) == WHOLE_LIFE
    assert (done.state, done.committed_at, done.cause) == ("completed", DAY, "")
    assert (done.model_digest_before, done.model_digest_after) == (before, model_digest(fake.context))
    (row,) = trained(range(NUM_RECORDS)).rows(3)
    assert [shard[:2] for shard in done.shards] == [(row.shard, row.slice)]
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {3}))


def test_requests_that_overlap_retrain_their_union_once(fake: FakeModel) -> None:
    one, other = asked(fake, 1, 2, 3), asked(fake, 3, 4)
    fake.trained.clear()
    done = run_all(fake)
    keys = [job.key for job in fake.trained]
    assert len(keys) == len(set(keys))
    assert len(keys) == sum(number for _, _, number in {*done[0].shards, *done[1].shards})
    assert {each.request_id: each.state for each in done} == {
        one.request_id: "completed",
        other.request_id: "completed",
    }
    assert {each.num_records for each in done} == {3, 2}
    dead = fake.ledger.tables.tombstones
    by = {number: dead[digest(fake, record(number).id)].request_id for number in (1, 2, 3, 4)}
    assert (by[1], by[2], by[4]) == (one.request_id, one.request_id, other.request_id)
    assert by[3] in (one.request_id, other.request_id)
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {1, 2, 3, 4}))


def test_a_request_whose_records_were_deleted_meanwhile_is_completed(fake: FakeModel) -> None:
    late = asked(fake, 3, terms=Terms())
    asked(fake, 3)
    run_all(fake)
    before = held_bytes(fake)
    fake.trained.clear()
    decide(fake.context, late.request_id, "approved", by="dpo")
    (done,) = run_all(fake)
    assert (done.state, done.num_records, done.shards, fake.trained) == ("completed", 0, (), [])
    assert states(fake, late) == WHOLE_LIFE
    assert held_bytes(fake) == before
    (tombstone,) = fake.ledger.tables.tombstones.values()
    assert tombstone.request_id != late.request_id


@pytest.mark.parametrize("decision", ["held", "denied", "cancelled", None])
def test_what_is_not_approved_never_runs(fake: FakeModel, decision: RequestState | None) -> None:
    request = asked(fake, 3, terms=APPROVED if decision else Terms())
    if decision:
        request = decide(fake.context, request.request_id, decision, "a reason")
    before = held_bytes(fake)
    assert carry_out(fake.context, [request]) == (request,)
    assert run_all(fake) == ()
    reconcile(fake.context)
    assert held_bytes(fake) == before
    assert state(fake, request) == (decision or "received")
    fresh = asked(fake, 4)  # one that is approved beside it does not take it along
    assert [each.request_id for each in run_all(fake)] == [fresh.request_id]
    assert held_numbers(fake) == set(range(NUM_RECORDS)) - {4}


def test_a_request_runs_as_the_ledger_holds_it(fake: FakeModel) -> None:
    """What was decided since the caller looked is kept."""
    stale = asked(fake, 3, terms=Terms())
    decide(fake.context, stale.request_id, "approved", by="dpo")
    extend(fake.context, stale.request_id, "complex")
    (done,) = carry_out(fake.context, [stale])
    assert (done.state, done.approver, done.extension) == ("completed", "dpo", "complex")
    assert done.due == "2026-04-01"


def test_the_most_urgent_comes_first(fake: FakeModel) -> None:
    """By due date first, then by receipt."""
    dues = ["2026-03-01", "2026-01-05", "2026-02-01", "2026-01-05"]
    received = []
    for number, due in enumerate(dues):
        moment = f"2026-01-0{number + 1}T00:00:00+00:00"
        context = changed(fake.context, now=partial(str, moment))
        received.append(submit(context, fake.rows(number), (), replace(APPROVED, due=due)))
    found = ready(fake.context)
    assert [received.index(each) for each in found] == [1, 3, 2, 0]


# --- decisions


@pytest.mark.parametrize(
    ("decision", "note"), [("held", "court"), ("denied", "no"), ("approved", "dpo")]
)
def test_decisions_need_their_reason_or_approver(
    fake: FakeModel, decision: RequestState, note: str
) -> None:
    request = asked(fake, 3, terms=Terms())
    with pytest.raises(InvalidInput):
        decide(fake.context, request.request_id, decision, " ", by=" ")
    assert states(fake, request) == ["received"]
    own = {"by": note} if decision == "approved" else {"note": note}
    decided = decide(fake.context, request.request_id, decision, **own)
    assert decided == find_request(fake.context, request.request_id)
    last = view_of(fake.context, request).events[-1]
    assert (decided.state, last.state, last.note) == (decision, decision, note)


def test_no_one_decides_that_a_request_is_completed(fake: FakeModel) -> None:
    request = asked(fake, 3)
    with pytest.raises(SisaError):
        decide(fake.context, request.request_id, "completed", by="dpo")


def test_an_extension_moves_the_due_date_and_is_reported(fake: FakeModel) -> None:
    request = asked(fake, 3)
    found = extend(fake.context, request.request_id, "complex")
    assert (found.due, found.state) == ("2026-04-01", "approved")
    seen = view_of(fake.context, found)
    assert seen.days_left == 90
    assert "2026-04-01" in seen.events[-1].note
    assert "complex" in seen.events[-1].note


# --- copies


def copy_of(number: int, name: str) -> Record:
    """Return a record with the text of another, under another id and subject, spelled differently."""
    return Record(
        name, "somebody", "text", (Part("text", f" Question\u00a0{number}\tANSWER {number}\n"),)
    )


def digest(fake: FakeModel, name: str) -> str:
    return fake.context.settings.assigner.id_digest(name)


@pytest.fixture
def with_copies(fake: FakeModel) -> FakeModel:
    add(fake.context, [copy_of(3, "copy-1"), copy_of(3, "copy-2"), copy_of(4, "copy-3")])
    return fake


def test_copies_are_counted_and_kept(with_copies: FakeModel) -> None:
    request = asked(with_copies, 3)
    assert (request.num_records, request.num_copies, request.copies_included) == (1, 2, False)
    same = copies(with_copies.context, with_copies.rows(3), full_scan=True)
    found = ids_of(with_copies.context, same)
    assert found == ["copy-1", "copy-2"]
    (done,) = run_all(with_copies)
    assert (done.num_records, done.num_copies) == (1, 2)
    assert {"copy-1", "copy-2", "copy-3"} <= served(with_copies)
    assert "id-0003" not in served(with_copies)


def test_copies_are_deleted_when_the_caller_says_so(with_copies: FakeModel) -> None:
    request = asked(with_copies, 3, terms=replace(APPROVED, include_copies=True))
    assert (request.num_records, request.num_copies, request.copies_included) == (3, 2, True)
    (done,) = run_all(with_copies)
    assert (done.state, done.num_records) == ("completed", 3)
    assert served(with_copies) == ids(set(range(NUM_RECORDS)) - {3}) | {"copy-3"}
    tombstones = with_copies.ledger.tables.tombstones
    assert {digest(with_copies, each) for each in ("id-0003", "copy-1", "copy-2")} == set(tombstones)


def test_records_that_are_copies_of_each_other_are_no_further_copies(with_copies: FakeModel) -> None:
    names = ("id-0003", "copy-1", "copy-2")
    held = with_copies.ledger.lookup(digest(with_copies, each) for each in names).values()
    live = [each for each in held if isinstance(each, RecordRow)]
    assert submit(with_copies.context, live, (), APPROVED).num_copies == 0


@pytest.mark.parametrize("between", ["completed", "another copy came"])
def test_a_request_with_copies_is_the_same_request_later(with_copies: FakeModel, between: str) -> None:
    terms = Terms(external_id="T-1", approver="dpo", include_copies=True)
    first = asked(with_copies, 3, terms=terms)
    if between == "completed":
        run_all(with_copies)
    else:
        add(with_copies.context, [copy_of(3, "copy-9")])
    assert asked(with_copies, 3, terms=terms).request_id == first.request_id


def test_a_request_with_copies_repeated_at_once_is_the_same_request(with_copies: FakeModel) -> None:
    terms = Terms(external_id="T-1", include_copies=True)
    assert asked(with_copies, 3, terms=terms) == asked(with_copies, 3, terms=terms)
    with pytest.raises(ConfigConflict):
        asked(with_copies, 3, terms=replace(terms, include_copies=False))


# --- what was deleted does not come back


COMEBACKS = [record(3), replace(record(3), subject_id="somebody else"), copy_of(3, "new-id")]
COMEBACKS += [Record("id-0003", None, "text", (Part("text", "quite another text"),))]


@pytest.mark.parametrize("comeback", COMEBACKS, ids=["same", "other subject", "same text", "same id"])
def test_what_was_deleted_is_refused_unless_allowed(fake: FakeModel, comeback: Record) -> None:
    request = asked(fake, 3)
    run_all(fake)
    before, seq = held_bytes(fake), fake.ledger.seq()
    with pytest.raises(InvalidInput) as caught:
        add(fake.context, [fake_record(50), comeback, record(4)])
    (problem,) = caught.value.problems
    assert (problem.where, request.request_id in problem.what) == ("record 2", True)
    assert comeback.id not in str(caught.value)
    assert (held_bytes(fake), fake.ledger.seq()) == (before, seq)
    taken = add(fake.context, [comeback], allow_deleted=True)
    assert taken.added == 1
    assert [each.state for each in where(fake.context, [comeback.id])] == ["trained"]
    assert comeback.id in served(fake)


def test_a_record_that_came_back_can_be_deleted_again(fake: FakeModel) -> None:
    asked(fake, 3)
    run_all(fake)
    add(fake.context, [record(3)], allow_deleted=True)
    second = asked(fake, 3)
    (done,) = run_all(fake)
    assert (done.request_id, done.state, done.num_records) == (second.request_id, "completed", 1)
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {3}))
    assert [each.state for each in where(fake.context, ["id-0003"])] == ["deleted"]


def test_a_request_that_only_waits_does_not_guard(fake: FakeModel) -> None:
    asked(fake, 3)
    assert add(fake.context, [copy_of(3, "new")]).added == 1


# --- failures


class Broken:
    """An executor, or any effect, that fails with a text that must not be kept."""

    def __init__(self) -> None:
        self.error: SisaError = EnvironmentFault("the text of Ada's record")

    def run(self, *_: Any) -> NoReturn:
        raise self.error

    __call__ = run


def failing(fake: FakeModel, context: Context | None = None) -> None:
    """Run what is approved and see it fail."""
    context = context or fake.context
    with pytest.raises(EnvironmentFault):
        carry_out(context, ready(context))


def untrainable(fake: FakeModel) -> Context:
    return changed(fake.context, executor_for=lambda _store: Broken())


def test_a_failed_training_leaves_clean_heads_and_is_finished_later(fake: FakeModel) -> None:
    request = asked(fake, 0, 1, 2, 3)
    failing(fake, untrainable(fake))
    found = view_of(fake.context, find_request(fake.context, request.request_id))
    assert (found.request.state, found.request.cause) == ("failed", "EnvironmentFault")
    assert found.request.committed_at == DAY
    assert (found.events[-1].state, found.events[-1].note) == ("failed", "EnvironmentFault")
    assert "Ada" not in repr(fake.ledger.tables)
    assert not served(fake) & ids({0, 1, 2, 3})
    for decision in ("approved", "held", "denied", "cancelled"):
        with pytest.raises(ConfigConflict):
            decide(fake.context, request.request_id, decision, "too late", by="dpo")
    assert ready(fake.context) == []  # it is not deleted twice, only finished
    meanwhile: list[Request] = []
    fake.before_run.append(lambda: meanwhile.append(find_request(fake.context, request.request_id)))
    reconcile(fake.context)
    assert [(each.state, each.cause) for each in meanwhile] == [("erased", "")]
    done = find_request(fake.context, request.request_id)
    assert (done.state, done.cause) == ("completed", "")
    assert states(fake, request) == [
        *WHOLE_LIFE[:5],
        "failed",
        "erased",
        "retrained",
        "completed",
    ]
    assert held_bytes(fake) == held_bytes(trained(range(4, NUM_RECORDS)))


@pytest.mark.parametrize("part", [RECORDS, CHECKPOINTS, INDEX, METRICS])
def test_a_failed_erasure_is_a_state_of_its_own_and_is_finished_later(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    request = asked(fake, 3)
    with monkeypatch.context() as patch:
        effect = "keep_losses" if part == METRICS else "erase"
        patch.setattr(getattr(fake.context.stores, part), effect, Broken())
        failing(fake)
        found = find_request(fake.context, request.request_id)
        assert (found.state, found.cause) == ("erasure_failed", "EnvironmentFault")
        assert states(fake, request) == [*WHOLE_LIFE[:4], "erasure_failed"]
        assert "id-0003" not in served(fake)
        for area, left in unlisted(fake.context).items():  # no other is kept from its erasure
            assert bool(left) == (area == part)
        (gone,) = where(fake.context, ["id-0003"])
        assert set(gone.not_erased) == {part} - {METRICS}
        with pytest.raises(EnvironmentFault):
            reconcile(fake.context)  # it is said as often as it is tried
        assert "Ada" not in repr(fake.ledger.tables)
    reconcile(fake.context)
    assert (state(fake, request), states(fake, request)[-3:]) == ("completed", WHOLE_LIFE[4:])
    assert where(fake.context, ["id-0003"])[0].not_erased == {}
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {3}))


def fails_before_the_commit(fake: FakeModel, patch: pytest.MonkeyPatch) -> Request:
    before = held_bytes(fake)
    request = asked(fake, 3)
    patch.setattr(fake.records, "write", Broken())
    failing(fake)
    patch.undo()
    found = find_request(fake.context, request.request_id)
    assert (found.state, found.cause, found.committed_at) == ("failed", "EnvironmentFault", "")
    assert states(fake, request) == ["received", "approved", "failed"]
    reconcile(fake.context)  # which has nothing to finish
    assert held_bytes(fake) == before
    assert state(fake, request) == "failed"
    return found


def test_what_failed_before_the_commit_runs_again(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = fails_before_the_commit(fake, monkeypatch)
    (done,) = run_all(fake)
    assert (done.request_id, done.state, done.cause) == (request.request_id, "completed", "")
    assert states(fake, request) == ["received", "approved", "failed", *WHOLE_LIFE[2:]]


@pytest.mark.parametrize("decision", ["held", "denied", "cancelled"])
def test_what_failed_before_the_commit_can_be_stopped(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, decision: RequestState
) -> None:
    request = fails_before_the_commit(fake, monkeypatch)
    assert decide(fake.context, request.request_id, decision, "a reason").cause == ""
    assert run_all(fake) == ()
    assert held_numbers(fake) == set(range(NUM_RECORDS))


def test_a_damaged_file_to_build_on_stops_the_deletion_before_it(fake: FakeModel) -> None:
    """Also one that the deletion itself would not rewrite, only train on."""
    request = asked(fake, 3)
    (row,) = fake.rows(3)
    others = [file for file in fake.ledger.slices(row.shard) if file.slice != row.slice]
    fake.records.erase([others[0].name])
    with pytest.raises(SisaError):
        run_all(fake)
    found = find_request(fake.context, request.request_id)
    assert (found.state, found.cause, found.committed_at) == ("failed", "IntegrityError", "")
    assert held_numbers(fake) == set(range(NUM_RECORDS))


def test_a_deletion_at_once_lives_the_same_life(fake: FakeModel) -> None:
    new = new_request(fake.context, fake.rows(3), (), APPROVED)
    (done,) = forget_at_once(fake.context, new).requests
    assert (done.request_id, done.state) == (new.request.request_id, "completed")
    assert states(fake, done) == WHOLE_LIFE
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {3}))


def test_a_deletion_at_once_that_fails_before_its_commit_never_was(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tables = held_bytes(fake), repr(fake.ledger.tables)
    new = new_request(fake.context, fake.rows(3), (), APPROVED)
    monkeypatch.setattr(fake.records, "write", Broken())
    with pytest.raises(EnvironmentFault):
        forget_at_once(fake.context, new)
    assert (held_bytes(fake), repr(fake.ledger.tables)) == (before, tables)


def test_a_deletion_at_once_that_fails_after_its_commit_is_finished(fake: FakeModel) -> None:
    new = new_request(fake.context, fake.rows(3), (), APPROVED)
    with pytest.raises(EnvironmentFault):
        forget_at_once(untrainable(fake), new)
    assert state(fake, new.request) == "failed"
    assert "id-0003" not in served(fake)
    reconcile(fake.context)
    assert state(fake, new.request) == "completed"


def test_another_batch_finishes_what_a_failure_left(fake: FakeModel) -> None:
    first = asked(fake, 1)
    failing(fake, untrainable(fake))
    second = asked(fake, 2)
    run_all(fake)
    assert (state(fake, first), state(fake, second)) == ("completed", "completed")
    assert held_bytes(fake) == held_bytes(trained(set(range(NUM_RECORDS)) - {1, 2}))


# --- plans


def test_a_plan_names_what_waits_and_changes_nothing(fake: FakeModel) -> None:
    assert plan_run(fake.context).choice == "nothing to do"
    asked(fake, 1, terms=Terms())
    assert plan_run(fake.context).choice == "nothing to do"
    request = asked(fake, 2)
    before, tables = held_bytes(fake), repr(fake.ledger.tables)
    found = plan_run(fake.context)
    assert found.requests == (request.request_id,)
    assert found.run_by == "2026-01-29"
    assert (held_bytes(fake), repr(fake.ledger.tables)) == (before, tables)
    (done,) = run_all(fake)
    assert found.cost_now >= done.record_epochs_retrained > 0


@pytest.mark.parametrize("left", [0, 3])
def test_a_plan_runs_what_is_due(fake: FakeModel, left: int) -> None:
    asked(fake, 2, terms=replace(APPROVED, due=f"2026-01-{1 + left:02d}"))
    found = plan_run(fake.context)
    assert (found.choice, found.run_by) == ("run now", "2026-01-01")


@pytest.mark.parametrize(("first", "days"), [("2025-12-27", 30), ("2025-11-12", 50), ("2025-06-15", 90)])
def test_a_plan_expects_requests_as_they_came_in_the_last_90_days(
    fake: FakeModel, first: str, days: int
) -> None:
    """An older one counts for the model's age alone, and a younger model counts as 30 days old."""
    came = [first, "2025-12-27"]
    for number, day in enumerate(came):
        context = changed(fake.context, now=lambda day=day: f"{day}T00:00:00+00:00")
        submit(context, fake.rows(number), (), Terms())
    asked(fake, 2)
    found = plan_run(fake.context)
    patience = date.fromisoformat(str(found.run_by)) - date(2026, 1, 1)
    num_recent = 2 if days < 90 else 1
    assert found.expected_arrivals == pytest.approx(patience.days * num_recent / days)


def test_a_plan_of_a_model_without_records() -> None:
    fake = trained({1})
    asked(fake, 1)
    run_all(fake)
    asked(fake, 1)
    assert plan_run(fake.context).choice == "run now"


def test_a_plan_finishes_what_a_failure_left(fake: FakeModel) -> None:
    asked(fake, 1)
    failing(fake, untrainable(fake))
    assert plan_run(fake.context).choice == "run now"


# --- histories


ACTS: dict[str, RequestState] = {"approve": "approved", "hold": "held", "cancel": "cancelled"}
CAN = {"approve": {"received", "held"}, "hold": {"received", "approved"}}
CAN["cancel"] = {"received", "approved", "held"}

numbers = st.lists(st.integers(0, NUM_RECORDS - 1), min_size=1, max_size=3, unique=True).map(tuple)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), numbers),
        st.tuples(st.sampled_from(sorted(ACTS)), st.integers(0, 5).map(lambda number: (number,))),
        st.tuples(st.sampled_from(["run", "fail"]), st.just(())),
    ),
    max_size=14,
)


OVERLAPPING = [("submit", (0,)), ("submit", (0, 1)), ("approve", (0,)), ("hold", (1,)), ("run", ())]


@settings(max_examples=300)
@given(steps)
@example(OVERLAPPING)
def test_any_history_of_requests_leaves_what_was_not_completed(
    history: Sequence[tuple[str, tuple[int, ...]]],
) -> None:
    fake = trained(range(NUM_RECORDS))
    requests: list[Request] = []
    expected: list[str] = []

    def named(state: str) -> set[int]:
        pairs = zip(requests, expected, strict=True)
        return {n for request, found in pairs if found == state for n in json.loads(request.reason)}

    for act, arguments in history:
        if act == "submit":
            requests.append(asked(fake, *arguments, terms=Terms(reason=json.dumps(arguments))))
            expected.append("received")
        elif act in ACTS and requests:
            position = arguments[0] % len(requests)
            name = requests[position].request_id
            if expected[position] in CAN[act]:
                decide(fake.context, name, ACTS[act], "a reason", by="dpo")
                expected[position] = ACTS[act]
            else:
                with pytest.raises(ConfigConflict):
                    decide(fake.context, name, ACTS[act], "a reason", by="dpo")
        elif act in ("run", "fail"):
            if act == "run":
                run_all(fake)
            else:
                try:
                    carry_out(untrainable(fake), ready(fake.context))
                except EnvironmentFault:
                    reconcile(fake.context)
            free = [named("held").isdisjoint(json.loads(each.reason)) for each in requests]
            expected = [
                "completed" if found == "approved" and runs else found
                for found, runs in zip(expected, free, strict=True)
            ]
        assert [state(fake, each) for each in requests] == expected
    remaining = set(range(NUM_RECORDS)) - named("completed")
    assert held_numbers(fake) == remaining
    assert served(fake) == ids(remaining)
    assert held_bytes(fake) == held_bytes(trained(remaining))


def test_a_legal_hold_protects_the_records_it_names(fake: FakeModel) -> None:
    """Neither another approved request nor a direct deletion reaches a record under a hold."""
    held = asked(fake, 3)
    decide(fake.context, held.request_id, "held", "court order")
    other, free = asked(fake, 3, 4), asked(fake, 5)
    assert [each.state for each in carry_out(fake.context, [other, free])] == ["approved", "completed"]
    waiting = {each.request.request_id: each.held_by for each in views(fake.context) if each.held_by}
    assert waiting == {other.request_id: (held.request_id,)}
    assert view_of(fake.context, other).held_by == (held.request_id,)
    new = new_request(fake.context, fake.rows(3), (), APPROVED)
    with pytest.raises(ConfigConflict, match="legal hold"):
        forget_at_once(fake.context, new)
    assert {3, 4} <= held_numbers(fake)
    decide(fake.context, held.request_id, "cancelled", "")
    assert view_of(fake.context, other).held_by == ()
    assert [each.state for each in run_all(fake)] == ["completed"]
    assert {3, 4}.isdisjoint(held_numbers(fake))
