"""The life of a request for deletion: its states, its due date, and the moves that people may make.

    received -> approved -> committed -> rolled_back -> erased -> retrained -> completed
    received, approved <-> held;  received, approved, held -> denied, cancelled
    failed and erasure_failed are left by carrying the request out again

`committed` and `rolled_back` are one commit, before which people may move a request (`moved`), and after
which only the flows do.

`gdpr`: one calendar month from receipt, extendable once by two months with a reason (GDPR Art. 12(3)).
`delete-act`: 45 days (California Delete Act: data brokers process requests at least once in 45 days),
not extendable. A move that the present state does not allow raises ConfigConflict. Time is an argument.

>>> due_date("2026-01-31T09:00:00+00:00", "gdpr"), due_date("2026-01-31T09:00:00+00:00", "delete-act")
('2026-02-28', '2026-03-17')
>>> days_left("2026-02-28", "2026-02-20T23:00:00+00:00")
8
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Literal

from sisa.core.domain import normalised
from sisa.core.errors import ConfigConflict, InvalidInput

RequestState = Literal[
    "received",
    "approved",
    "held",
    "denied",
    "cancelled",
    "committed",
    "rolled_back",
    "erased",
    "erasure_failed",
    "retrained",
    "completed",
    "failed",
]
Regime = Literal["gdpr", "delete-act"]

GDPR_MONTHS, GDPR_EXTENSION_MONTHS = 1, 2
GDPR_SINCE = "2018-05-25"  # Art. 99(2); the laws of other regimes are younger
DELETE_ACT_DAYS = 45
# Reasons that the program gives, and reads again.
RECTIFY, DROP, OPENDSR = "sisa rectify", "California DROP", "OpenDSR"

COMMITTED: tuple[RequestState, ...] = ("committed", "rolled_back")  # entered in one commit
OPEN: frozenset[RequestState] = frozenset({"received", "approved", "held"})
CLOSED: frozenset[RequestState] = frozenset({"completed", "denied", "cancelled"})
UNDER_WAY: tuple[RequestState, ...] = (*COMMITTED, "erased", "erasure_failed", "retrained")
BY_HAND: dict[RequestState, frozenset[RequestState]] = {  # a decision: the states that allow it
    "approved": frozenset({"received", "held", "failed"}),
    "held": frozenset({"received", "approved", "failed"}),
    "denied": OPEN | {"failed"},
    "cancelled": OPEN | {"failed"},
}


@dataclass(frozen=True, slots=True)
class Probed:
    """What the frozen base alone knew of deleted records: numbers, never exact.

    Means over `num_probed` of `num_records`, each in [0, 1] except the margin. `num_known` counts the
    records that the base is taken to know. `failure` is the kind of an error.
    """

    num_records: int
    num_probed: int = 0
    num_known: int = 0
    extraction_strength: float = 0.0
    exact_memorisation: float = 0.0
    membership_margin: float = 0.0  # Min-K%++ above that of the base's own choices
    continuation: float = 0.0  # ROUGE-L recall of the greedy continuation, or a lower bound
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One request for deletion, from receipt to outcome; words as given, times ISO 8601 in UTC."""

    request_id: str
    created_at: str
    due: str
    num_records: int
    regime: Regime = "gdpr"
    state: RequestState = "received"
    external_id: str | None = None
    reason: str = ""
    approver: str | None = None
    extension: str = ""
    num_copies: int = 0  # exact copies found under other ids
    copies_included: bool = False
    committed_at: str = ""
    shards: tuple[tuple[int, int, int], ...] = ()  # shard, first slice, slices to retrain
    record_epochs_retrained: int = 0
    record_epochs_full: int = 0
    record_epochs_others: int = 0  # of the other orders' stages
    served: tuple[tuple[int, int, int], ...] = ()  # from its commit on: shard, slices, of how many
    serving_depth: float = 1.0  # from its commit on: mean share of their slices that all shards serve
    model_digest_before: str = ""
    seconds: float = 0.0
    model_digest_after: str = ""
    exports_erased: int = 0
    cause: str = ""  # kind of the error that failed it, never its text
    probed: Probed | None = None  # None: not probed, or interrupted
    consent: str = ""  # to keep the text, encrypted, until a patch is made from it
    vaulted: str = ""  # the vault's set that holds the text
    submitter: str = ""  # who submitted it: a token's name, or the name that was given
    received_on: str = ""  # the day on which it arrived, here or at the controller; "": of `created_at`


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A state that a request entered. `link` chains all events of a ledger (`event_chain.py`)."""

    request_id: str
    state: RequestState
    at: str
    note: str = ""
    link: str = ""


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
    """Return whether a request is committed and not finished; the reconciliation continues it."""
    return request.state in UNDER_WAY or (request.state == "failed" and request.committed_at != "")


def waits_to_run(request: Request) -> bool:
    """Return whether a request is approved and not committed; the next run carries it out."""
    return request.state in ("approved", "failed") and not is_under_way(request)


def may_become(request: Request, state: RequestState) -> bool:
    """Return whether people may move a request to a state."""
    return request.state in BY_HAND.get(state, frozenset()) and not is_under_way(request)


def moved(request: Request, state: RequestState, approver: str = "") -> Request:
    """Return a request after a person's decision; an approval keeps its `approver`, if one is named.

    Raise ConfigConflict if the request's state forbids the decision.
    """
    if not may_become(request, state):
        allowed = BY_HAND.get(state, frozenset())
        raise ConfigConflict(
            f"a request that is {request.state} can't become {state}",
            where=request.request_id,
            expected=" or ".join(sorted(allowed)) or "a state that people decide",
            got=request.state,
            next_step="`sisa request show` prints its history",
        )
    named = approver if state == "approved" else ""
    return replace(request, state=state, approver=named or request.approver, cause="")


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
    if approver is not None and normalised(approver) == normalised(submitter):
        raise ConfigConflict(
            "this model requires four eyes: the submitter of a request may not approve it",
            where="service.four_eyes",
            next_step="let somebody else approve it",
        )


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
