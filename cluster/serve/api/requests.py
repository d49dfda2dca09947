"""Requests for deletion over HTTP: submit, look up, decide, carry out, and prove; look records up.

    POST /requests                     {"subject": "p001", "external_id": "T-17"}
    POST /requests/T-17/approve        {}
    POST /requests/run                 {}             carry out what is approved, now
    GET  /requests/T-17/certificate
    GET  /records/p001-q1/shards                      where a record is
    POST /find                         {"text": "Mara"}

A request is named by its own id or by its external id. Requests are submitted and decided while a
deletion trains. A call with an `Idempotency-Key` is done once; repeated, it returns the request as it is
now. The key with another body is refused. The service remembers keyed digests of keys for a week.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from cluster.serve.domain import Service, TheService
from cluster.serve.problems import Refusal
from cluster.serve.state import ServiceState
from cluster.serve.tokens import Caller, MayDecide, MayErase, MayRead, MaySubmit
from sisa.core.digest import Keyed
from sisa.core.requests import Regime, RequestState
from sisa.evidence.open_evidence import certificate_file, receipt_file, standing
from sisa.flows.requests import RequestView, Terms

_MAX_IDS, _MAX_CHARS, _MAX_TOP = 10_000, 2_000, 100
_JSON = "application/json"
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "A signed file.", "content": {_JSON: {"schema": {"type": "object"}}}}
}

requests_router = APIRouter(tags=["requests"])
_Text = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_CHARS)]


class NothingMore(BaseModel):
    """A body without unknown keys; as it is here, an empty one."""

    model_config = ConfigDict(extra="forbid")


class RecordsNamed(NothingMore):
    """Records, by their ids or by their subject."""

    ids: Annotated[list[_Text], Field(max_length=_MAX_IDS)] = Field([], description="Ids of records.")
    subject: _Text | None = Field(None, description="All records of a subject, in place of ids.")

    @model_validator(mode="after")
    def _one(self) -> RecordsNamed:
        if bool(self.ids) == (self.subject is not None):
            raise ValueError("give either ids or a subject")
        return self


class ErasureAsked(RecordsNamed):
    """A request for deletion."""

    external_id: Annotated[str, StringConstraints(pattern=r"^[!-.0-~]{1,200}$")] | None = Field(
        None,
        description="Your own name for it, without spaces and slashes, since it is a part of addresses; "
        "the same name with the same records adds no request.",
    )
    reason: str = Field("", max_length=_MAX_CHARS, description="Why; stored as given: no personal data.")
    regime: Regime = Field("gdpr", description="Sets the due date: a month, or 45 days.")
    due: date | None = Field(None, description="A due date in place of the regime's.")
    received_on: date | None = Field(
        None, description="The day on which it arrived, if not today: its term counts from then."
    )
    include_copies: bool = Field(False, description="Also delete exact copies under other ids.")


class ReasonGiven(NothingMore):
    """The reason of a decision."""

    reason: _Text = Field(description="Stored as given: no personal data.")


class Withdrawal(NothingMore):
    """The reason of a withdrawal, if there is one."""

    reason: str = Field("", max_length=_MAX_CHARS, description="Stored as given: no personal data.")


class Searched(NothingMore):
    """A search by text, by subject or by likeness."""

    text: _Text | None = Field(None, description="Content.")
    subject: _Text | None = Field(None, description="A subject.")
    like: _Text | None = Field(None, description="The id of a record: its near-duplicates.")
    top: int = Field(10, ge=1, le=_MAX_TOP, description="Most candidates.")

    @model_validator(mode="after")
    def _one(self) -> Searched:
        if sum(each is not None for each in (self.text, self.subject, self.like)) != 1:
            raise ValueError("give exactly one of text, subject and like")
        return self


class EventShown(BaseModel):
    """A state that a request entered."""

    state: RequestState
    at: str = Field(description="ISO 8601, in UTC.")
    note: str = Field(description="Who approved, or why.")


class RequestShown(BaseModel):
    """A request for deletion. It names no record."""

    request_id: str
    external_id: str | None
    state: RequestState
    regime: Regime
    created_at: str
    received_on: str = Field(description="The day on which it arrived; empty: that of `created_at`.")
    due: str = Field(description="The last day for it.")
    days_left: int = Field(description="Negative when it is overdue.")
    held_by: list[str] = Field(
        description="Requests under a legal hold whose records it names, too: it waits for them."
    )
    num_records: int
    num_copies: int = Field(description="Exact copies found under other ids.")
    copies_included: bool
    reason: str
    approver: str | None
    extension: str = Field(description="Why it was extended; empty if it was not.")
    committed_at: str = Field(description="Since when nothing served has seen the records.")
    cause: str = Field(description="Kind of the error that failed it.")
    record_epochs_retrained: int
    record_epochs_full: int
    seconds: float = Field(description="From its commit until all was trained again.")
    shards: list[tuple[int, int, int]] = Field(
        description="What it trains again: shard, first slice, number of slices."
    )
    events: list[EventShown]


class OneRequestShown(RequestShown):
    """A request, and whether its deletion is certified."""

    certificate: Literal["issued", "pending", "none"]


class CandidateShown(BaseModel):
    """A record that a search proposes."""

    id: str
    score: float
    shard: int
    slice: int
    match: str = Field(description="`subject` if the ledger named it, `content` if the index did.")
    subject: str | None


class SubmittedShown(RequestShown):
    """A request, and other records that it may mean; they are deleted only if they are named."""

    copies: list[str] = Field(description="Ids of exact copies.")
    near: list[CandidateShown] = Field(description="Near-duplicates.")


class RequestsShown(BaseModel):
    """Requests, oldest first."""

    requests: list[RequestShown]


class CandidatesShown(BaseModel):
    """The results of a search, best first."""

    candidates: list[CandidateShown]


class RunAsked(BaseModel):
    """The requests that the runner carries out next."""

    requests: list[str] = Field(description="Requests that are approved and under no hold.")


class Receipted(NothingMore):
    """The record of a receipt."""

    id: _Text = Field(description="The record's id.")


class ShardShown(BaseModel):
    """Where a record is, or by which request it was deleted."""

    id: str
    state: str
    shard: int
    slice: int
    deleted_at: str | None
    request_id: str | None


def _shown(view: RequestView, **more: Any) -> dict[str, Any]:
    """Return a request with its history; the response's model leaves out what clients do not see."""
    own = asdict(view)
    return {**own.pop("request"), **own, **more}


@dataclass(frozen=True)
class Once:
    """A call that is done once, however often it is sent."""

    state: ServiceState
    key: str  # a digest of its Idempotency-Key; empty: it has none
    asked: str  # a digest of what it asks

    def do(self, act: Callable[[], str]) -> str:
        """Call `act`, which returns a request's id, unless this was done; return that id."""
        if not self.key:
            return act()
        call = self.state.begin(self.key, self.asked)
        if call.asked != self.asked:
            step = "send another key for another call"
            raise Refusal(422, "this Idempotency-Key was used for another call", next_step=step)
        if call.request:
            return call.request
        request_id = act()
        self.state.end(self.key, request_id)
        return request_id


async def _once(
    request: Request,
    service: TheService,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[!-~]{1,200}$",
            description="A name of this call that you choose, such as a UUID: repeat it with the call.",
        ),
    ] = None,
) -> Once:
    """Return a call with the digests of its key and of its body; its caller was admitted."""
    keyed = Keyed(service.model.secret)
    name = json.dumps([request.state.caller.name, idempotency_key or ""])
    body = (await request.body()).decode("utf-8", "replace")
    asked = keyed.digest("idempotent call", json.dumps([request.method, request.url.path, body]))
    key = keyed.digest("idempotency key", name) if idempotency_key else ""
    return Once(ServiceState(service.model.directory), key, asked)


_Repeatable = Annotated[Once, Depends(_once)]


@requests_router.post("/requests", name="submit_request", status_code=201, response_model=SubmittedShown)
def _submit(
    asked: ErasureAsked, service: TheService, caller: MaySubmit, call: _Repeatable
) -> dict[str, Any]:
    """Submit a request. It waits to be approved; nothing is deleted before."""
    model = caller.view(service.model)
    external_id = asked.external_id or (call.key and f"key-{call.key[:32]}") or None
    given = asked.model_dump(mode="json", exclude={"ids", "subject", "external_id"})
    terms = Terms(external_id=external_id, submitter=caller.name, **given)
    done: dict[str, Any] = {}

    def act() -> str:
        made = model.submit(asked.ids, subject=asked.subject, terms=terms)
        done.update(copies=made.copies, near=[*map(asdict, made.near)])
        return made.request.request_id

    request_id = call.do(act)
    if not done:  # a repeated call: this finds the request by its external id, and the copies again
        act()
    return _shown(model.request(request_id), **done)


@requests_router.get("/requests", name="list_requests", response_model=RequestsShown)
def _requests(
    service: TheService,
    caller: MayRead,
    state: Annotated[RequestState | None, Query(description="Only those in this state.")] = None,
) -> dict[str, Any]:
    """List requests with their due dates and days left."""
    views = caller.view(service.model).requests()
    return {"requests": [_shown(each) for each in views if state in (None, each.request.state)]}


@requests_router.post("/requests/run", name="run_requests", status_code=202, response_model=RunAsked)
def _run(_asked: NothingMore, service: TheService, _caller: MayErase) -> dict[str, Any]:
    """Have the runner carry out all approved requests now, as one batch, whatever it costs."""
    ServiceState(service.model.directory).ask_to_run()
    return {"requests": list(service.model.plan_run().requests)}


@requests_router.get("/requests/{request_id}", name="show_request", response_model=OneRequestShown)
def _request(request_id: str, service: TheService, caller: MayRead) -> dict[str, Any]:
    """Return one request with its history."""
    found = caller.view(service.model).request(request_id)
    return _shown(found, certificate=standing(service.model, found.request.request_id))


def _decide(
    service: Service, caller: Caller, call: Once, request_id: str, state: RequestState, note: str
) -> dict[str, Any]:
    model = caller.view(service.model)

    def act() -> str:
        return model.decide(request_id, state, note, by=caller.name).request.request_id

    return _shown(model.request(call.do(act)))


@requests_router.post(
    "/requests/{request_id}/approve", name="approve_request", response_model=RequestShown
)
def _approve(
    request_id: str, _asked: NothingMore, service: TheService, caller: MayDecide, call: _Repeatable
) -> dict[str, Any]:
    """Approve a request in the caller's name; it ends a legal hold, too."""
    return _decide(service, caller, call, request_id, "approved", "")


@requests_router.post("/requests/{request_id}/deny", name="deny_request", response_model=RequestShown)
def _deny(
    request_id: str, asked: ReasonGiven, service: TheService, caller: MayDecide, call: _Repeatable
) -> dict[str, Any]:
    """Refuse a request."""
    return _decide(service, caller, call, request_id, "denied", asked.reason)


@requests_router.post("/requests/{request_id}/hold", name="hold_request", response_model=RequestShown)
def _hold(
    request_id: str, asked: ReasonGiven, service: TheService, caller: MayDecide, call: _Repeatable
) -> dict[str, Any]:
    """Put a request under a legal hold: nothing deletes its records until it is approved."""
    return _decide(service, caller, call, request_id, "held", asked.reason)


@requests_router.post(
    "/requests/{request_id}/cancel", name="cancel_request", response_model=RequestShown
)
def _cancel(
    request_id: str, asked: Withdrawal, service: TheService, caller: MayDecide, call: _Repeatable
) -> dict[str, Any]:
    """Withdraw a request whose deletion is not committed."""
    return _decide(service, caller, call, request_id, "cancelled", asked.reason)


@requests_router.post(
    "/requests/{request_id}/extend", name="extend_request", response_model=RequestShown
)
def _extend(
    request_id: str, asked: ReasonGiven, service: TheService, caller: MayDecide, call: _Repeatable
) -> dict[str, Any]:
    """Extend the due date once, by two months (GDPR Art. 12(3))."""
    model = caller.view(service.model)

    def act() -> str:
        return model.extend(request_id, asked.reason, by=caller.name).request.request_id

    return _shown(model.request(call.do(act)))


@requests_router.get(
    "/requests/{request_id}/certificate",
    name="export_certificate",
    response_class=Response,
    responses=_FILE,
)
def _certificate(request_id: str, service: TheService, caller: MayRead) -> Response:
    """Return the certificate of a completed request, which `sisa verify-certificate` checks offline."""
    found = caller.view(service.model).request(request_id)
    return Response(certificate_file(service.model, found.request.request_id), media_type=_JSON)


@requests_router.post(
    "/requests/{request_id}/receipt", name="make_receipt", response_class=Response, responses=_FILE
)
def _receipt(request_id: str, asked: Receipted, service: TheService, caller: MaySubmit) -> Response:
    """Return the receipt that the certificate of a request is about a record."""
    found = caller.view(service.model).request(request_id)
    return Response(receipt_file(service.model, found.request.request_id, asked.id), media_type=_JSON)


@requests_router.get("/records/{record_id:path}/shards", name="locate_record", response_model=ShardShown)
def _shards(record_id: str, service: TheService, caller: MayRead) -> dict[str, Any]:
    """Return the shard and slice of a record, or by which request it was deleted."""
    (found,) = caller.view(service.model).where([record_id])
    return asdict(found)


@requests_router.post("/find", name="find_records", response_model=CandidatesShown)
def _find(asked: Searched, service: TheService, caller: MayRead) -> dict[str, Any]:
    """Look records up by content, subject or likeness. Their text is not shown."""
    model = caller.view(service.model)
    found = model.find(text=asked.text, subject=asked.subject, like=asked.like, top_k=asked.top)
    return {"candidates": [*map(asdict, found)]}
