"""A clock that jumps, in either direction, at any moment: no crash, no negative time, no wrong order.

Events are ordered by their position in the chain; a due date is compared with the present clock alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.domain import Export
from sisa.core.errors import EnvironmentFault
from sisa.core.requests import Request
from sisa.flows.context.consistency import check_consistent
from sisa.flows.context.context import Context
from sisa.flows.export import export_adapters
from sisa.flows.ingest import train
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import (
    Terms,
    carry_out,
    decide,
    extend,
    find_request,
    plan_run,
    ready,
    submit,
    view_of,
)
from sisa.planning.batching import RunPlan
from tests.fakes.ports import FakeModel, changed, fake_model, fake_record

NUM_RECORDS = 12
WHOLE_LIFE = ["received", "approved", "committed", "rolled_back", "erased", "retrained", "completed"]
moments = st.datetimes(
    datetime(1969, 6, 1), datetime(2200, 1, 1), timezones=st.just(UTC)
) | st.sampled_from([datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 29)])


class Clock:
    """Return the times of a list, one at each call, over and over."""

    def __init__(self, times: Sequence[datetime]) -> None:
        self._times = list(times)
        self._calls = 0

    def __call__(self) -> str:
        self._calls += 1
        return self._times[(self._calls - 1) % len(self._times)].isoformat(timespec="milliseconds")


def model_with(times: Sequence[datetime]) -> FakeModel:
    fake = fake_model()
    fake.context = changed(fake.context, now=Clock(times))
    train(fake.context, [fake_record(number) for number in range(NUM_RECORDS)])
    return fake


def sound(context: Context, request: Request, now: datetime) -> None:
    """Check what holds of every request, whatever the clock did."""
    present = changed(context, now=Clock([now]))
    view = view_of(present, request)
    assert view.days_left == (date.fromisoformat(request.due) - now.date()).days
    assert request.seconds >= 0
    assert view.events[-1].state == request.state
    check_consistent(context)


@settings(max_examples=80, deadline=None)
@given(times=st.lists(moments, min_size=1, max_size=9), now=moments)
def test_a_request_lives_its_whole_life_under_any_clock(times: list[datetime], now: datetime) -> None:
    fake = model_with(times)
    context = fake.context
    one = submit(context, fake.rows(3), (), Terms(external_id="T-1"))
    other = submit(context, fake.rows(4), (), Terms(approver="dpo"))
    for each in (one, other):
        sound(context, each, now)
    decide(context, "T-1", "held", "a court")
    decide(context, "T-1", "approved", by="dpo")
    extend(context, "T-1", "complex")
    plan: RunPlan = plan_run(context)
    assert set(plan.requests) == {one.request_id, other.request_id}
    assert plan.expected_arrivals >= 0
    assert date.fromisoformat(str(plan.run_by))
    done = carry_out(context, ready(context))
    assert {each.state for each in done} == {"completed"}
    for each in done:
        sound(context, each, now)
    states = [each.state for each in view_of(context, find_request(context, "T-1")).events]
    assert states == ["received", "held", "approved", "approved", *WHOLE_LIFE[2:]]


@settings(max_examples=80, deadline=None)
@given(times=st.lists(moments, min_size=2, max_size=9), now=moments)
def test_a_deletion_completes_under_any_clock(times: list[datetime], now: datetime) -> None:
    """Between receipt and commit, between any two events, and after a failure."""
    fake = model_with(times)
    context = fake.context
    export_adapters(context, Path("no-such"))

    erase = fake.exports.erase

    def fails(export: Export) -> bool:
        raise EnvironmentFault("the disk refused", where=export.path)

    fake.exports.erase = fails  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFault):
        fake.forget(3)
    fake.exports.erase = erase  # type: ignore[method-assign]
    (request,) = fake.ledger.requests()
    assert (request.state, request.cause) == ("erasure_failed", "EnvironmentFault")
    sound(context, request, now)
    reconcile(context)
    done = find_request(context, request.request_id)
    assert done.state == "completed"
    sound(context, done, now)
    assert not fake.rows(3)
    assert done.exports_erased == 1


@settings(max_examples=80)
@given(received=moments, now=moments)
def test_a_due_date_under_a_wrong_clock_is_replaced(received: datetime, now: datetime) -> None:
    """It is shown with the days left by the present clock; cancelled and sent again it is right."""
    fake = model_with([received])
    context = fake.context
    wrong = submit(context, fake.rows(3), (), Terms(external_id="T-1"))
    right = changed(context, now=Clock([now]))
    sound(right, wrong, now)
    decide(right, wrong.request_id, "cancelled", "a wrong clock")
    again = submit(right, fake.rows(3), (), Terms(external_id="T-2", approver="dpo"))
    assert 28 <= view_of(right, again).days_left <= 31
    (done,) = carry_out(right, [again])
    assert done.state == "completed"
