"""Make and submit requests, decide about them, and carry out the approved ones.

A request names records by keyed digest from the start, so no plain id waits in the ledger. The same
external id with the same records is the same request; with other records it is refused. Exact copies
(the same normalised text under another id, of any subject) are counted. They are deleted with the
request only if the caller says so, and that decision is kept. Only approved requests run.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from sisa.core.domain import RecordRow, Tombstone
from sisa.core.errors import ConfigConflict, InvalidInput, Problem, UnknownRecord
from sisa.core.events import QueueSeen
from sisa.core.hooks import Removal
from sisa.core.ports import Change
from sisa.core.requests import (
    DROP,
    GDPR_SINCE,
    OPENDSR,
    RECTIFY,
    Regime,
    Request,
    RequestEvent,
    RequestState,
    check_four_eyes,
    days_left,
    due_date,
    event,
    extended,
    moved,
    waits_to_run,
)
from sisa.flows.candidates import Candidate
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.deletion import Deleted, delete, legal_holds, plan_forget, retry_overtaken, rows_named
from sisa.flows.reconcile import open_plans, under_way
from sisa.planning.batching import RunPlan, choose
from sisa.planning.cost import shard_costs

PAST_DAYS, YOUNG_DAYS = 90, 30.0  # see `_arrivals_per_day`


@dataclass(frozen=True)
class Submitted:
    """Hold a request and what else it might mean: ids of exact copies, and near-duplicates.

    `already_deleted` are the named records that earlier requests deleted.
    """

    request: Request
    copies: tuple[str, ...]
    near: tuple[Candidate, ...]
    already_deleted: tuple[Tombstone, ...] = ()


@dataclass(frozen=True)
class RequestView:
    """Hold a request with its history; `days_left` is negative if it is overdue."""

    request: Request
    days_left: int
    events: tuple[RequestEvent, ...]
    held_by: tuple[str, ...] = ()  # requests under a legal hold that it waits for, if it is approved


@dataclass(frozen=True)
class Terms:
    """Hold the terms of a request besides its records; they are kept as given."""

    external_id: str | None = None
    reason: str = ""
    regime: Regime = "gdpr"
    due: str | None = None  # an ISO date that replaces the regime's
    received_on: str | None = None  # an ISO date, from which the regime's term counts; None: today
    approver: str | None = None  # approves at once
    include_copies: bool = False
    consent: str = ""  # to keep the text, encrypted, for a patch, if the base alone knows it
    submitter: str = ""  # who submits it; may not approve it where the run file asks for four eyes
    by_opendsr: bool = False  # it came by that protocol, which is then its reason


@dataclass(frozen=True)
class NewRequest:
    """A request that is not in the ledger yet.

    `rows` are the held records that it names, `named` the keyed ids of all, deleted ones included.
    """

    request: Request
    rows: tuple[RecordRow, ...]
    named: tuple[str, ...]
    events: tuple[RequestEvent, ...]

    def change(self) -> Change:
        """Return the transaction that adds the request to the ledger."""
        pairs = [(self.request.request_id, each) for each in self.named]
        return Change(requests=[self.request], named=pairs, events=self.events)


def new_request(
    context: Context,
    rows: Sequence[RecordRow],
    deleted: Sequence[Tombstone],
    terms: Terms,
    *,
    full_scan: bool = False,
) -> NewRequest:
    """Return a new request that is not in the ledger yet.

    Raise InvalidInput for a bad date or a nameless approval, and ConfigConflict if four eyes should
    see it and do not.
    """
    if terms.approver is not None and not terms.approver.strip():
        raise InvalidInput("an approval names its approver", next_step="give --approver")
    if context.settings.config.service.four_eyes:
        check_four_eyes(terms.submitter, terms.approver)
    found = copies(context, rows, full_scan=full_scan or terms.include_copies)
    taken = [*rows, *(found if terms.include_copies else [])]
    named = {row.id_digest for row in taken} | {each.id_digest for each in deleted}
    now = context.now()
    received_on, due = _dates(terms, now[:10])
    request = Request(
        request_id=f"req-{uuid.uuid4()}",
        created_at=now,
        due=due,
        num_records=len(taken),
        regime=terms.regime,
        external_id=terms.external_id,
        reason=OPENDSR if terms.by_opendsr else terms.reason,
        num_copies=len(found),
        copies_included=terms.include_copies,
        consent=terms.consent.strip(),
        submitter=terms.submitter.strip(),
        received_on=received_on,
    )
    states = [request]
    if terms.approver is not None:
        states.append(moved(request, "approved", terms.approver))
    events = tuple(event(each, now, each.approver or "") for each in states)
    held = tuple(sorted(taken, key=lambda row: row.id_digest))
    return NewRequest(states[-1], held, tuple(sorted(named)), events)


def _dates(terms: Terms, today: str) -> tuple[str, str]:
    """Return the day of receipt, empty if it was not given, and the due date."""
    received_on = "" if terms.received_on is None else _day("day of receipt", terms.received_on)
    if received_on and not GDPR_SINCE <= received_on <= today:
        raise InvalidInput(
            f"the day of receipt is {'in the future' if received_on > today else 'before the GDPR'}",
            expected=f"{GDPR_SINCE} to {today}",
            got=received_on,
            next_step="give the day on which the request arrived, or none if it arrived today",
        )
    first = received_on or today
    due = due_date(first, terms.regime) if terms.due is None else _day("due date", terms.due)
    if due < first:
        raise InvalidInput(
            "the due date is before the day of receipt",
            expected=f"{first} or later",
            got=due,
            next_step="if the request arrived on an earlier day, give that as well (--received-on)",
        )
    return received_on, due


def _day(what: str, given: str) -> str:
    try:
        return date.fromisoformat(given).isoformat()
    except ValueError:
        raise InvalidInput(
            f"the {what} is not a date",
            expected="YYYY-MM-DD",
            got=given[:40],
            next_step="give another date, or none: the term of the regime counts from today",
        ) from None


def copies(context: Context, rows: Sequence[RecordRow], *, full_scan: bool) -> list[RecordRow]:
    """Return other held records with the text of one of `rows`; `full_scan` is that of `by_text`."""
    named = {row.id_digest for row in rows}
    held, _ = context.stores.ledger.by_text({row.text_digest for row in rows}, full_scan=full_scan)
    return [row for row in held if row.id_digest not in named]


def submit(
    context: Context, rows: Sequence[RecordRow], deleted: Sequence[Tombstone], terms: Terms
) -> Request:
    """Add a request to the ledger, or return the known one, approved if it waits and `terms` approves.

    Raise InvalidInput for a reason that only the program gives, and ConfigConflict for an external id
    that stands for other records.
    """
    if terms.reason in (RECTIFY, DROP, OPENDSR):
        raise InvalidInput(
            "the program gives this reason to requests of its own",
            where="reason",
            got=terms.reason,
            next_step="give the reason in other words, or ask by `sisa rectify`, DROP or OpenDSR",
        )
    with context.stores.ledger.exclusive():
        new = new_request(context, rows, deleted, terms, full_scan=True)
        asked = {row.id_digest for row in rows} | {each.id_digest for each in deleted}
        known = _request_known_as(context, terms, asked, new.named)
        if known is None:
            commit(context, new.change())
            return new.request
        if terms.approver is not None and known.state == "received":
            return decide(context, known.request_id, "approved", by=terms.approver)
        return known


def _request_known_as(
    context: Context, terms: Terms, asked: Collection[str], named: Collection[str]
) -> Request | None:
    """Return the earlier request of the same external id. Raise ConfigConflict if it is another one."""
    if terms.external_id is None:
        return None
    for request in context.stores.ledger.requests():
        if terms.external_id == request.request_id:
            what = "is the id of another request"
        elif terms.external_id != request.external_id:
            continue
        elif _stands_for(context, request, terms, set(asked), set(named)):
            return request
        else:
            what = "already stands for a request with other records"
        raise ConfigConflict(
            f"this external id {what}",
            where=request.request_id,
            next_step="give the new request an external id of its own",
        )
    return None


def _stands_for(
    context: Context, request: Request, terms: Terms, asked: set[str], named: set[str]
) -> bool:
    """Return whether a request stands for these records; copies may come and go after its receipt."""
    ledger = context.stores.ledger
    known = set(ledger.named_by(request.request_id))
    if not (request.copies_included and terms.include_copies):
        return known == named
    texts = {each.text_digest for each in ledger.lookup(asked).values()}
    extra = ledger.lookup(known - asked).values()
    return asked <= known and all(each.text_digest in texts for each in extra)


def find_request(context: Context, request_id: str) -> Request:
    """Return a request by its id or its external id. Raise UnknownRecord."""
    for request in context.stores.ledger.requests():
        if request_id in (request.request_id, request.external_id):
            return request
    raise UnknownRecord("there is no such request", next_step="`sisa request list` lists them")


def views(context: Context) -> list[RequestView]:
    """Return all requests with their history, oldest first."""
    passed: dict[str, list[RequestEvent]] = {}
    for each in context.stores.ledger.events():
        passed.setdefault(each.request_id, []).append(each)
    now, requests = context.now(), context.stores.ledger.requests()
    holds = _holds(context, requests)
    return [
        RequestView(
            each,
            days_left(each.due, now),
            tuple(passed.get(each.request_id, ())),
            holds.get(each.request_id, ()),
        )
        for each in requests
    ]


def view_of(context: Context, request: Request) -> RequestView:
    """Return a request with its days left and its history; read the events of no other."""
    ledger, name = context.stores.ledger, request.request_id
    held_by = legal_holds(context, ledger.named_by(name)) if waits_to_run(request) else ()
    left = days_left(request.due, context.now())
    return RequestView(request, left, tuple(ledger.events_of(name)), tuple(held_by))


def decide(
    context: Context, request_id: str, state: RequestState, note: str = "", *, by: str = ""
) -> Request:
    """Approve, hold, deny or cancel a request, in the name `by`, which an approval needs.

    Raise UnknownRecord, ConfigConflict (of its state, or of four eyes) or InvalidInput.
    """
    if state in ("denied", "held") and not note.strip():
        raise InvalidInput(f"a request is not {state} without a reason", next_step="give --reason")
    if state == "approved" and not by.strip():
        raise InvalidInput("an approval names its approver", next_step="give --approver")
    with context.stores.ledger.exclusive():
        found = find_request(context, request_id)
        request = moved(found, state, by)
        if state == "approved" and context.settings.config.service.four_eyes:
            check_four_eyes(found.submitter, by)
        signed_note = ": ".join(filter(None, (by, note)))
        commit(context, Change(requests=[request], events=[event(request, context.now(), signed_note)]))
    return request


def extend(context: Context, request_id: str, reason: str, *, by: str = "") -> Request:
    """Extend the due date by what the regime allows, in the name `by`.

    Raise ConfigConflict or InvalidInput.
    """
    with context.stores.ledger.exclusive():
        request = extended(find_request(context, request_id), reason)
        note = ": ".join(filter(None, (by, f"extended to {request.due}", reason)))
        commit(context, Change(requests=[request], events=[event(request, context.now(), note)]))
    return request


def ready(context: Context) -> list[Request]:
    """Return the requests that wait to run, and not for a legal hold, the most urgent first."""
    requests = context.stores.ledger.requests()
    holds = _holds(context, requests)
    free = [each for each in requests if each.request_id in holds and not holds[each.request_id]]
    return sorted(free, key=lambda each: (each.due, each.created_at, each.request_id))


def _holds(context: Context, requests: Sequence[Request]) -> dict[str, tuple[str, ...]]:
    """Return, for each request that waits to run, those under a legal hold that name its records."""
    ledger = context.stores.ledger
    waiting = [each.request_id for each in requests if waits_to_run(each)]
    held = [each.request_id for each in requests if each.state == "held"]
    records = {name: frozenset(ledger.named_by(name)) for name in (waiting + held if held else ())}
    return {
        each: tuple(hold for hold in held if not records[hold].isdisjoint(records[each]))
        for each in waiting
    }


def carry_out(context: Context, requests: Sequence[Request]) -> tuple[Request, ...]:
    """Delete what these requests name, as one batch; leave unapproved requests as they are.

    A request that somebody cancels, denies or holds before the commit is left out of it.
    """
    asked = {request.request_id for request in requests}

    def attempt() -> Deleted:
        due = [each for each in ready(context) if each.request_id in asked]
        named = {each.request_id: rows_named(context, each) for each in due}
        return delete(context, Removal(due, named), Change()) if due else Deleted()

    retry_overtaken(attempt)
    present = {each.request_id: each for each in context.stores.ledger.requests()}
    return tuple(present[request.request_id] for request in requests)


def forget_at_once(context: Context, new: NewRequest, *, defer: bool = False) -> Deleted:
    """Add an approved request to the ledger and carry it out in the same commit.

    A failure before the commit changes nothing; after a crash, the next command finishes the deletion.
    With `defer`, bytes are erased now and training is left to a later command. Raise ConfigConflict for
    a legal hold.
    """
    removal = Removal([new.request], {new.request.request_id: new.rows})

    def attempt() -> Deleted:
        _check_no_hold(context, removal.rows)
        return delete(context, removal, new.change(), defer=defer)

    return retry_overtaken(attempt)


def _check_no_hold(context: Context, records: Collection[str]) -> None:
    holds = legal_holds(context, records)
    if problems := [Problem(each, "holds records that were named") for each in holds]:
        raise ConfigConflict(
            "some of these records are under a legal hold; nothing was changed",
            next_step="`sisa request approve` or `sisa request cancel` ends a hold",
            problems=problems,
        )


def plan_run(context: Context) -> RunPlan:
    """Return whether to carry out the approved requests now, priced from this model's past."""
    ledger = context.stores.ledger
    waiting, now = ready(context), context.now()
    rows = [row for request in waiting for row in rows_named(context, request)]
    planned = plan_forget(context, list({row.id_digest: row for row in rows}.values()))
    plans = [*open_plans(context), *planned.plans]  # the later plan of a shard includes its open work
    pending = {plan.shard: float(plan.record_epochs) for plan in plans}
    total = sum(ledger.counts().values())
    sizes: dict[int, dict[int, int]] = {head.shard: {} for head in ledger.heads()}
    for file in ledger.slices():
        sizes[file.shard][file.slice] = file.num_records
    recipe = context.recipe
    shards = [shard_costs(pending.get(shard, 0.0), each, total, recipe) for shard, each in sizes.items()]
    left = [(request.request_id, days_left(request.due, now)) for request in waiting]
    cut_short = [each.request_id for each in under_way(context)]
    if cut_short:
        cost = sum(shard.pending for shard in shards)
        return RunPlan(
            requests=(*cut_short, *(name for name, _ in left)),
            choice="run now",
            why="a deletion was deferred or interrupted",
            run_by=now[:10],
            expected_arrivals=0.0,
            cost_now=cost,
            cost_waiting=cost,
        )
    return choose(left, shards, _arrivals_per_day(context, now, waiting), now[:10])


def queue_seen(context: Context) -> QueueSeen:
    """Return the number of requests in each state."""
    requests = context.stores.ledger.requests()
    states = Counter(each.state for each in requests)
    names = {each.request_id for each in ready(context)}
    names |= {each.request_id for each in under_way(context)}
    waiting = [each for each in requests if each.request_id in names or each.state == "received"]
    left = [days_left(each.due, context.now()) for each in waiting]
    return QueueSeen(
        depth=len(names),
        undecided=states["received"],
        held=states["held"],
        failed_erasures=states["erasure_failed"],
        oldest_days_left=min(left, default=None),
    )


def _arrivals_per_day(context: Context, now: str, waiting: Sequence[Request]) -> float:
    """Return the mean number of requests a day over the last PAST_DAYS, without the waiting ones.

    A model is as old as its oldest request, but not younger than YOUNG_DAYS, so that a new one does not
    look busy.
    """
    today = datetime.fromisoformat(now)
    here = {request.request_id for request in waiting}
    ages = [
        (today - datetime.fromisoformat(each.created_at)).total_seconds() / 86_400
        for each in context.stores.ledger.requests()
        if each.request_id not in here
    ]
    num_recent = sum(0 <= age <= PAST_DAYS for age in ages)
    return num_recent / min(PAST_DAYS, max([YOUNG_DAYS, *ages]))
