"""The law of requests that people submit and decide about while a deletion runs.

Decisions fall between any two effects or reads of a deletion, except within `ledger.exclusive()`.
Afterwards the events are one chain, the witness knows all of it, every decision that was accepted
stands, and a request is either deleted or not: never cancelled and deleted. The bytes are those of
training from scratch on what remains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa.core.domain import RecordRow, Tombstone
from sisa.core.errors import ConfigConflict, IntegrityError
from sisa.core.event_chain import contradicted
from sisa.core.requests import OPEN, Request
from sisa.flows.context.context import Context
from sisa.flows.ingest import add, train
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import (
    Terms,
    carry_out,
    decide,
    extend,
    find_request,
    forget_at_once,
    new_request,
    ready,
    submit,
)
from sisa.flows.restored_backup import catch_up
from tests.crash import Crash, Fuse, crashing
from tests.examples import num_examples
from tests.fakes.ports import FakeModel, fake_model, fake_record, fake_trained
from tests.property.histories import Model, assert_equal, wire

NUM_RECORDS = 12
NUM_RUNS = num_examples(300)
SCOPES = ("exclusive", "snapshot")
MOVES = ("cancelled", "held", "denied", "approved", "extend")
Decision = tuple[str, int]


class Alone:
    """An exclusive block, or a snapshot, that knows whether somebody is in it."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


class People:
    """Those who submit and decide; each decision falls at one call of a model's stores."""

    def __init__(self, fake: FakeModel, decisions: dict[int, Decision]) -> None:
        self.fake, self.decisions = fake, decisions
        self.calls, self.deciding = 0, False
        self.accepted: list[tuple[str, str]] = []
        self.alone = fake.ledger.alone = Alone()
        fake.ledger.snapshot = lambda: self.alone  # type: ignore[method-assign]
        for part in ("ledger", "witness", "records", "checkpoints", "index"):
            store = getattr(fake, part)
            for name in dir(type(store)):
                if not name.startswith("_") and name not in SCOPES and callable(getattr(store, name)):
                    setattr(store, name, self.between(getattr(store, name)))

    def between(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not self.alone.depth and not self.deciding:
                self.calls += 1
                if decision := self.decisions.pop(self.calls, None):
                    self.deciding = True
                    self.decide(*decision)
                    self.deciding = False
            return effect(*args, **options)

        return call

    def decide(self, move: str, number: int) -> None:
        context, name = self.fake.context, f"T-{number}"
        with contextlib.suppress(ConfigConflict):
            if move == "submit":
                request = submit(context, [row(context, number)], (), Terms(reason="by letter"))
            elif move == "extend":
                request = extend(context, name, "it is difficult")
            else:
                request = decide(context, name, move, "because", by="dpo")  # type: ignore[arg-type]
            self.accepted.append((request.request_id, move))


def row(context: Context, number: int) -> RecordRow:
    """Return the row of a record as the first training added it, held or deleted."""
    return context.settings.assigner.row(fake_record(number), 1)


def waiting() -> FakeModel:
    """Return a model with requests T-0 to T-5 for one record each; all but the last are approved."""
    fake = fake_trained(range(NUM_RECORDS))
    for number in range(6):
        approver = "dpo" if number < 5 else None
        terms = Terms(external_id=f"T-{number}", approver=approver)
        submit(fake.context, [row(fake.context, number)], (), terms)
    return fake


def run(fake: FakeModel) -> None:
    carry_out(fake.context, ready(fake.context))


def forget(fake: FakeModel) -> None:
    live = fake.ledger.rows(row(fake.context, 6).shard)[:2]
    with contextlib.suppress(ConfigConflict):  # a hold came first
        forget_at_once(fake.context, new_request(fake.context, live, (), Terms(approver="dpo")))


def grow(fake: FakeModel) -> None:
    add(fake.context, [fake_record(number) for number in range(20, 24)])


WORK = {"run": run, "forget": forget, "add": grow}


def is_deleted(fake: FakeModel, request: Request) -> bool:
    """Return whether the records of a request are deleted: all of them or none."""
    found = fake.ledger.lookup(fake.ledger.named_by(request.request_id)).values()
    (deleted,) = {isinstance(each, Tombstone) for each in found}
    return deleted


def check(people: People) -> None:
    fake, people.deciding = people.fake, True  # from now on nobody decides
    requests, events = fake.ledger.requests(), fake.ledger.events()
    assert not contradicted(requests, events, fake.context.settings.chain)
    assert fake.witness.testimony.head == fake.ledger.event_head()
    assert fake.witness.testimony.tombstones == fake.ledger.tables.tombstones
    by_id = {each.request_id: each for each in requests}
    assert people.accepted == [each for each in people.accepted if each[0] in by_id]
    for request_id, move in people.accepted:
        assert move != "extend" or by_id[request_id].extension == "it is difficult"
        assert by_id[request_id].state == move or move not in ("cancelled", "denied")
    deleted_by = {each.request_id for each in fake.ledger.tombstones()}
    for each in requests:
        assert each.state in OPEN | {"completed", "cancelled", "denied"}
        assert (each.request_id in deleted_by) == bool(each.committed_at)
        assert each.state != "completed" or is_deleted(fake, each)
        states = [event.state for event in events if event.request_id == each.request_id]
        assert not {"cancelled", "denied"} & set(states[:-1])
    live = [each for shard in range(3) for each in fake.ledger.rows(shard)]
    scratch = fake_model()
    numbers = [n for n in range(24) if row(fake.context, n).id_digest in {e.id_digest for e in live}]
    train(scratch.context, [fake_record(number) for number in numbers])
    assert_equal(fake, scratch)
    model = Model.__new__(Model)
    model.fake, model.remaining = fake, set(numbers)
    model.check_heads_are_clean()


decisions = st.one_of(
    st.tuples(st.sampled_from(MOVES), st.integers(0, 5)),
    st.tuples(st.just("submit"), st.integers(0, NUM_RECORDS - 1)),
)
schedules = st.dictionaries(st.integers(1, 150), decisions, min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=NUM_RUNS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(WORK)), schedules)
def test_people_decide_while_a_deletion_runs(work: str, schedule: dict[int, Decision]) -> None:
    people = People(waiting(), schedule)
    WORK[work](people.fake)
    check(people)


def test_the_law_needs_the_lock() -> None:
    """Where commits are not kept apart, one of the first decisions in a run breaks it."""
    broken = 0
    for at in range(1, 120, 4):
        people = People(waiting(), {at: ("extend", 0)})
        people.fake.ledger.alone = contextlib.nullcontext()
        try:
            run(people.fake)
            check(people)
        except (AssertionError, IntegrityError):
            broken += 1
    assert broken


@pytest.mark.parametrize("move", ["cancelled", "held", "denied"])
def test_a_decision_in_the_last_moment_stands_or_is_refused(move: str) -> None:
    """At a run's calls: either the request is deleted and the decision refused, or neither."""
    total = calls_of_a_run()
    outcomes = set()
    for at in range(1, total + 1, 1 if move == "cancelled" else 5):
        people = People(waiting(), {at: (move, 0)})
        run(people.fake)
        check(people)
        request = find_request(people.fake.context, "T-0")
        outcomes.add((request.state, is_deleted(people.fake, request), bool(people.accepted)))
    assert outcomes == {(move, False, True), ("completed", True, False)}


def calls_of_a_run() -> int:
    people = People(waiting(), {})
    run(people.fake)
    return people.calls


@pytest.fixture
def crashed() -> FakeModel:
    """Return a model whose deletion was committed and not recorded in the witness: it was killed."""
    fake = waiting()
    with crashing((fake.witness, "append")):
        run(fake)
    assert fake.ledger.tables.tombstones
    assert not fake.witness.testimony.tombstones
    return fake


@pytest.mark.parametrize("decision", [("submit", 9), ("approved", 5), ("extend", 5)])
def test_a_decision_after_a_crash_records_what_the_dead_process_could_not(
    crashed: FakeModel, decision: Decision
) -> None:
    people = People(crashed, {})
    people.decide(*decision)
    assert len(people.accepted) == 1
    assert crashed.witness.testimony.head == crashed.ledger.event_head()
    assert crashed.witness.testimony.tombstones == crashed.ledger.tables.tombstones
    catch_up(crashed.context)
    reconcile(crashed.context)
    check(people)


@pytest.mark.slow
@settings(max_examples=NUM_RUNS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules, st.integers(1, 40), st.booleans())
def test_people_decide_beside_a_process_that_is_killed(
    schedule: dict[int, Decision], at: int, after: bool
) -> None:
    fake = waiting()
    wire(fake, Fuse(at, after))
    people = People(fake, schedule)
    attempt = partial(run, fake)
    try:
        attempt()
    except Crash:
        people.deciding, people.alone.depth = False, 0  # locks end with a process
        catch_up(fake.context)
        reconcile(fake.context)
        attempt()
    check(people)
