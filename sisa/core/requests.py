"""The life of a request for deletion: its states, its due date, and the moves that people may make.

    received -> approved -> committed -> rolled_back -> erased -> retrained -> completed
    received, approved <-> held;  received, approved, held -> denied, cancelled
    failed and erasure_failed are left by carrying the request out again

`gdpr`: one calendar month from receipt, extendable once by two months with a reason (GDPR Art. 12(3)).
`delete-act`: 45 days (California Delete Act: data brokers process requests at least once in 45 days),
not extendable. A move that the present state does not allow raises ConfigConflict. All events of a
ledger form one hash chain. Time is an argument.

>>> due_date("2026-01-31T09:00:00+00:00", "gdpr"), due_date("2026-01-31T09:00:00+00:00", "delete-act")
('2026-02-28', '2026-03-17')
>>> days_left("2026-02-28", "2026-02-20T23:00:00+00:00")
8
"""

from __future__ import annotations

import calendar
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta

from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Regime, Request, RequestEvent, RequestState
from sisa.core.errors import ConfigConflict, InvalidInput

GDPR_MONTHS, GDPR_EXTENSION_MONTHS = 1, 2
DELETE_ACT_DAYS = 45
RECTIFY = "sisa rectify"  # approves and names the deletions of a rectification

ACCEPTED: tuple[RequestState, ...] = ("committed", "rolled_back")  # both by one commit
OPEN: frozenset[RequestState] = frozenset({"received", "approved", "held"})
CLOSED: frozenset[RequestState] = frozenset({"completed", "denied", "cancelled"})
UNDER_WAY: tuple[RequestState, ...] = (*ACCEPTED, "erased", "erasure_failed", "retrained")
BY_HAND: dict[RequestState, frozenset[RequestState]] = {
    "approved": frozenset({"received", "held", "failed"}),
    "held": frozenset({"received", "approved", "failed"}),
    "denied": OPEN | {"failed"},
    "cancelled": OPEN | {"failed"},
}


def due_date(received_at: str, regime: Regime) -> str:
    """Return the last day for a request, as an ISO date."""
    day = datetime.fromisoformat(received_at).date()
    if regime == "delete-act":
        return (day + timedelta(days=DELETE_ACT_DAYS)).isoformat()
    return add_months(day, GDPR_MONTHS).isoformat()


def add_months(day: date, months: int) -> date:
    """Return the same day some months later, or that month's last day.

    Source: Regulation 1182/71, Art. 3(2)(c).

    >>> add_months(date(2027, 12, 31), 2)
    datetime.date(2028, 2, 29)
    """
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    last = calendar.monthrange(year, month + 1)[1]
    return date(year, month + 1, min(day.day, last))


def days_left(due: str, now: str) -> int:
    """Return the whole days until the end of the due date; negative when it has passed."""
    return (date.fromisoformat(due) - datetime.fromisoformat(now).date()).days


def is_under_way(request: Request) -> bool:
    """Return whether a request was accepted and is not finished; the reconciliation continues it."""
    return request.state in UNDER_WAY or (request.state == "failed" and request.committed_at != "")


def may_become(request: Request, state: RequestState) -> bool:
    """Return whether people may move a request to a state."""
    return request.state in BY_HAND.get(state, frozenset()) and not is_under_way(request)


def moved(request: Request, state: RequestState, note: str = "") -> Request:
    """Return a request after a person's decision. Raise ConfigConflict if its state forbids it."""
    if not may_become(request, state):
        allowed = BY_HAND.get(state, frozenset())
        raise ConfigConflict(
            f"a request that is {request.state} can't become {state}",
            where=request.request_id,
            expected=" or ".join(sorted(allowed)) or "a state that people decide",
            got=request.state,
            next_step="`sisa request show` prints its history",
        )
    approver = note or request.approver if state == "approved" else request.approver
    return replace(request, state=state, approver=approver, cause="")


def check_four_eyes(submitter: str, approver: str | None) -> None:
    """Raise ConfigConflict if nobody is known to submit a request, or the same person approves it.

    >>> check_four_eyes("anna", None)
    >>> check_four_eyes("anna", "ben")
    """
    if not submitter.strip():
        raise ConfigConflict(
            "this model requires four eyes, but no submitter is named",
            where="service.four_eyes",
            next_step="`sisa request submit --submitter WHO`; then somebody else approves it",
        )
    if approver is not None and _person(approver) == _person(submitter):
        raise ConfigConflict(
            "this model requires four eyes: the submitter of a request may not approve it",
            where="service.four_eyes",
            next_step="let somebody else approve it",
        )


def _person(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def extended(request: Request, reason: str) -> Request:
    """Return a request with a due date two months later. Raise InvalidInput or ConfigConflict."""
    if not reason.strip():
        raise InvalidInput("an extension needs a reason", next_step="give --reason")
    if request.regime != "gdpr" or request.extension or request.state in CLOSED:
        raise ConfigConflict(
            "this request can't be extended",
            where=request.request_id,
            expected="an open request under gdpr that was not extended before",
            got=f"{request.regime}, {request.state}" + (", extended" if request.extension else ""),
        )
    due = add_months(date.fromisoformat(request.due), GDPR_EXTENSION_MONTHS).isoformat()
    return replace(request, due=due, extension=reason)


def completed(request: Request, at: str, model_digest: str) -> Request:
    """Return a request that is done, with the model's digest after it and the seconds that it took."""
    passed = datetime.fromisoformat(at) - datetime.fromisoformat(request.committed_at)
    seconds = max(0.0, round(passed.total_seconds(), 3))
    return replace(
        request, state="completed", cause="", model_digest_after=model_digest, seconds=seconds
    )


def event(request: Request, at: str, note: str = "") -> RequestEvent:
    """Return the event of a request's present state."""
    return RequestEvent(request.request_id, request.state, at, note)


@dataclass(frozen=True)
class EventChain:
    """Link of each event of a ledger to the one before it, under the partition key.

    An earlier version linked events without the key. A ledger that it began names its key differently
    (`key_name`); it may begin with unkeyed events, but has none after the first keyed one.
    """

    keyed: Keyed
    began_unkeyed: bool = False

    @classmethod
    def of(cls, keyed: Keyed, named: str | None) -> EventChain:
        """Return the chain of a ledger, given the name of its key."""
        return cls(keyed, named == keyed.name)

    def _link(self, unkeyed: str) -> str:
        return self.keyed.digest("event", unkeyed)

    def linked(self, before: str, events: Iterable[RequestEvent]) -> Iterator[RequestEvent]:
        """Yield events with their links."""
        for each in events:
            before = self._link(chained(before, each))
            yield replace(each, link=before)

    def holds(self, events: Iterable[RequestEvent], link: str = "") -> bool:
        """Return whether the links are those of events that follow the one with `link`."""
        unkeyed_too = self.began_unkeyed
        for each in events:
            plain = chained(link, each)
            link = each.link
            if link == self._link(plain):
                unkeyed_too = False
            elif link != plain or not unkeyed_too:
                return False
        return True


def key_name(keyed: Keyed) -> str:
    """Return how a ledger names its key if all its events are linked under it."""
    return keyed.digest("name", "events")


def key_names(keyed: Keyed) -> tuple[str, str]:
    """Return the names that a ledger may give its key: this version's, and an earlier one's."""
    return key_name(keyed), keyed.name


def contradicted(
    requests: Iterable[Request],
    events: Sequence[RequestEvent],
    chain: EventChain | None,
    link: str = "",
) -> bool:
    """Return whether events are not one `chain` (if given), or a request differs from what they say.

    A request must be in the state of its last event, and committed when its events say. With `link`,
    only the events after the one with that link, and their requests, are compared.
    """
    if chain is not None and not chain.holds(events, link):
        return True
    states = {each.request_id: each.state for each in events}
    committed = {each.request_id: each.at for each in events if each.state == "committed"}
    held = {each.request_id: each for each in requests if not link or each.request_id in states}
    dated = committed if link else held
    if any(held[key].committed_at != committed.get(key, "") for key in dated if key in held):
        return True
    return {key: each.state for key, each in held.items()} != states


def chained(link: str, found: RequestEvent) -> str:
    """Return the unkeyed link of an event after the one with `link`."""
    return digest_of([link, asdict(replace(found, link=""))])
