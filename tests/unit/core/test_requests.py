"""The life of a request: due dates, extensions, who may decide what and when, and the chain of events.

The calendar is checked against its own laws and against cases written by hand; the transition table is
written out whole, so that a state that is left out anywhere fails.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import Keyed
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.core.event_chain import EventChain, chained, contradicted, key_name, key_names
from sisa.core.requests import (
    OPEN,
    UNDER_WAY,
    Regime,
    Request,
    RequestEvent,
    RequestState,
    add_months,
    days_left,
    due_date,
    event,
    extended,
    is_under_way,
    moved,
    waits_to_run,
)

STATES: tuple[RequestState, ...] = get_args(RequestState)
DECISIONS: tuple[RequestState, ...] = ("approved", "held", "denied", "cancelled")
COMMITTED_AT = "2026-01-02T00:00:00+00:00"

moments = st.datetimes(datetime(2000, 1, 1), datetime(2099, 12, 31), timezones=st.just(UTC))
regimes = st.sampled_from(get_args(Regime))


def request(
    state: RequestState = "received", committed_at: str = "", regime: Regime = "gdpr"
) -> Request:
    return Request(
        request_id="req-1",
        created_at="2026-01-01T09:00:00+00:00",
        due=due_date("2026-01-01T09:00:00+00:00", regime),
        num_records=2,
        regime=regime,
        state=state,
        committed_at=committed_at,
        cause="EnvironmentFault" if state == "failed" else "",
    )


@pytest.mark.parametrize(
    ("received", "regime", "due"),
    [
        ("2026-01-15", "gdpr", "2026-02-15"),
        ("2026-01-31", "gdpr", "2026-02-28"),  # no such day: the month's last one
        ("2028-01-31", "gdpr", "2028-02-29"),  # leap year
        ("2100-01-30", "gdpr", "2100-02-28"),  # a century that is none
        ("2026-02-28", "gdpr", "2026-03-28"),  # the same day, not the month's last one
        ("2028-02-29", "gdpr", "2028-03-29"),
        ("2026-03-31", "gdpr", "2026-04-30"),
        ("2026-11-30", "gdpr", "2026-12-30"),
        ("2026-12-31", "gdpr", "2027-01-31"),  # year change
        ("2026-01-01", "delete-act", "2026-02-15"),
        ("2028-02-01", "delete-act", "2028-03-17"),
        ("2026-12-01", "delete-act", "2027-01-15"),
    ],
)
def test_due_dates(received: str, regime: Regime, due: str) -> None:
    for hour in ("00:00:00", "23:59:59.999"):
        assert due_date(f"{received}T{hour}+00:00", regime) == due


@given(moments)
def test_the_delete_act_gives_45_days(received: datetime) -> None:
    assert days_left(due_date(received.isoformat(), "delete-act"), received.isoformat()) == 45


@given(st.dates(date(2000, 1, 1), date(2090, 1, 1)), st.integers(0, 30))
def test_months_are_counted_on_the_calendar(day: date, months: int) -> None:
    later = add_months(day, months)
    assert (later.year - day.year) * 12 + later.month - day.month == months
    assert later.day == day.day or (later + timedelta(days=1)).day == 1


@given(moments, regimes, st.integers(-400, 400))
def test_each_day_that_passes_is_one_day_less(received: datetime, regime: Regime, passed: int) -> None:
    due = due_date(received.isoformat(), regime)
    now = received + timedelta(days=passed)
    assert days_left(due, now.isoformat()) == days_left(due, received.isoformat()) - passed


def test_the_due_date_itself_is_still_in_time() -> None:
    assert days_left("2026-02-28", "2026-02-28T23:59:59+00:00") == 0
    assert days_left("2026-02-28", "2026-03-01T00:00:00+00:00") == -1
    assert days_left("2026-02-28", "2026-02-27T00:00:00+00:00") == 1


def test_an_extension_adds_two_months_once_and_keeps_its_reason() -> None:
    before = request()
    after = extended(before, "complex")
    assert (before.due, after.due, after.extension) == ("2026-02-01", "2026-04-01", "complex")
    assert replace(after, due=before.due, extension="") == before
    with pytest.raises(ConfigConflict):
        extended(after, "more complex")


@given(moments)
def test_an_extension_never_goes_past_three_months_from_receipt(received: datetime) -> None:
    due = due_date(received.isoformat(), "gdpr")
    later = date.fromisoformat(extended(replace(request(), due=due), "complex").due)
    assert date.fromisoformat(due) + timedelta(days=58) < later <= add_months(received.date(), 3)


@pytest.mark.parametrize("reason", ["", " \n"])
def test_an_extension_needs_a_reason(reason: str) -> None:
    with pytest.raises(InvalidInput):
        extended(request(), reason)


def test_the_delete_act_knows_no_extension() -> None:
    with pytest.raises(ConfigConflict):
        extended(request(regime="delete-act"), "complex")


@pytest.mark.parametrize("state", STATES)
def test_what_is_finished_is_not_extended(state: RequestState) -> None:
    if state in ("completed", "denied", "cancelled"):
        with pytest.raises(ConfigConflict):
            extended(request(state), "complex")
    else:
        assert extended(request(state), "complex").state == state


# state, whether the deletion was committed: the decisions that can still be taken
TABLE: dict[tuple[RequestState, bool], set[str]] = {
    ("received", False): {"approved", "held", "denied", "cancelled"},
    ("approved", False): {"held", "denied", "cancelled"},
    ("held", False): {"approved", "denied", "cancelled"},
    ("failed", False): {"approved", "held", "denied", "cancelled"},
    ("failed", True): set(),
    ("denied", False): set(),
    ("cancelled", False): set(),
    ("committed", True): set(),
    ("rolled_back", True): set(),
    ("erased", True): set(),
    ("erasure_failed", True): set(),
    ("retrained", True): set(),
    ("completed", True): set(),
}


def test_the_table_knows_every_state() -> None:
    assert {state for state, _ in TABLE} == set(STATES)


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("found", TABLE, ids=str)
def test_decisions(found: tuple[RequestState, bool], decision: RequestState) -> None:
    state, committed = found
    before = request(state, COMMITTED_AT if committed else "")
    if decision not in TABLE[found]:
        with pytest.raises(ConfigConflict) as caught:
            moved(before, decision, "dpo")
        assert (caught.value.got, caught.value.where) == (state, before.request_id)
        return
    after = moved(before, decision, "dpo")
    assert after == replace(
        before, state=decision, cause="", approver="dpo" if decision == "approved" else None
    )


def test_who_approved_stays_when_others_decide() -> None:
    approved = moved(request(), "approved", "dpo")
    assert moved(approved, "held", "court order").approver == "dpo"
    again = moved(moved(approved, "held", "court order"), "approved", "deputy")
    assert again.approver == "deputy"


@pytest.mark.parametrize("found", TABLE, ids=str)
def test_what_is_committed_and_not_finished_is_under_way(found: tuple[RequestState, bool]) -> None:
    state, committed = found
    assert is_under_way(request(state, COMMITTED_AT if committed else "")) == (
        committed and state != "completed"
    )


@pytest.mark.parametrize("found", TABLE, ids=str)
def test_what_is_approved_and_not_committed_waits_to_run(found: tuple[RequestState, bool]) -> None:
    state, committed = found
    waits = waits_to_run(request(state, COMMITTED_AT if committed else ""))
    assert waits == (found in [("approved", False), ("failed", False)])


def test_nothing_is_both_open_and_under_way() -> None:
    assert OPEN.isdisjoint(UNDER_WAY)


def test_an_event_shows_the_state_and_its_time() -> None:
    found = event(request("held"), COMMITTED_AT, "court order")
    assert found == RequestEvent("req-1", "held", COMMITTED_AT, "court order", "")


def links(events: list[RequestEvent]) -> list[str]:
    found = [""]
    for each in events:
        found.append(chained(found[-1], each))
    return found[1:]


texts = st.text(st.characters(codec="utf-8"), max_size=8)
events = st.builds(RequestEvent, texts, st.sampled_from(STATES), texts, texts)


@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_changing_an_event_changes_its_link_and_every_later_one(
    history: list[RequestEvent], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(history) - 1))
    name = data.draw(st.sampled_from(["request_id", "at", "note", "state"]))
    old = history[position]
    other = "held" if old.state != "held" else "denied"
    value: Any = other if name == "state" else getattr(old, name) + "x"
    changed = [*history]
    changed[position] = replace(old, **{name: value})
    before, after = links(history), links(changed)
    assert before[:position] == after[:position]
    pairs = zip(before[position:], after[position:], strict=True)
    assert all(one != other_link for one, other_link in pairs)


@given(st.lists(events, min_size=2, max_size=6, unique=True))
def test_leaving_out_or_swapping_events_shows(history: list[RequestEvent]) -> None:
    whole = links(history)
    assert links(history[1:])[-1] != whole[-1]
    assert links([history[1], history[0], *history[2:]])[-1] != whole[-1]


@given(events, texts, texts)
def test_a_link_covers_all_but_itself(found: RequestEvent, link: str, other: str) -> None:
    assert chained(link, found) == chained(link, replace(found, link=other))
    assert (chained(link, found) == chained(other, found)) == (link == other)


CHAIN, OTHER = EventChain(Keyed(bytes(32))), EventChain(Keyed(b"1" * 32))


def test_events_must_be_one_chain_that_leads_to_the_states() -> None:
    one, other = request(), replace(request(), request_id="req-2")
    approved = moved(one, "approved", "dpo")
    entered = [event(each, "2026-01-02T00:00:00+00:00") for each in (one, other, approved)]
    events = [*CHAIN.linked("", entered)]
    assert not contradicted([], [], CHAIN)
    assert not contradicted([approved, other], events, CHAIN)
    assert contradicted([approved, other], events, OTHER)
    assert not contradicted([approved, other], events, None)
    assert contradicted([one, other], events, CHAIN)
    assert contradicted([approved], events, CHAIN)
    for at in range(3):
        assert contradicted([approved, other], events[:at] + events[at + 1 :], CHAIN)
    assert contradicted([approved, other], [*events[:2], replace(events[2], note="x")], CHAIN)
    assert contradicted([approved, other], [events[1], events[0], events[2]], CHAIN)


@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_unkeyed_events_come_first_and_only_in_a_ledger_of_an_earlier_version(
    history: list[RequestEvent], data: st.DataObject
) -> None:
    keyed_from = data.draw(st.integers(0, len(history)))
    plain = links(history[:keyed_from])
    found = [replace(each, link=link) for each, link in zip(history, plain, strict=False)]
    found += CHAIN.linked(plain[-1] if plain else "", history[keyed_from:])
    earlier = EventChain(CHAIN.keyed, began_unkeyed=True)
    assert earlier.holds(found)
    assert CHAIN.holds(found) is (keyed_from == 0)
    at = data.draw(st.integers(0, len(history) - 1))
    before = found[at - 1].link if at else ""
    assert earlier.holds(found[at:], before)
    found[at] = replace(found[at], link=chained(before, found[at]))
    after = [*earlier.linked(found[at].link, history[at + 1 :])]
    assert earlier.holds([*found[: at + 1], *after]) is (at <= keyed_from)


def test_the_name_of_a_key_says_how_events_are_linked() -> None:
    keyed = CHAIN.keyed
    now, earlier = key_names(keyed)
    assert (now, earlier) == (key_name(keyed), keyed.name)
    assert [EventChain.of(keyed, each).began_unkeyed for each in (now, earlier, None)] == [
        *(False, True, False)
    ]
