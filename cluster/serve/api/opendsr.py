"""Take requests for erasure, access and portability by OpenDSR 1.0 (formerly OpenGDPR).

    POST   /opendsr/requests                               {"subject_request_type": "erasure", ...}
    GET    /opendsr/requests/{subject_request_id}          its status
    GET    /opendsr/requests/{subject_request_id}/results  what is held of the person, once
    DELETE /opendsr/requests/{subject_request_id}          cancels it while it is pending
    GET    /opendsr/discovery                              what is supported
    GET    /opendsr/certificate                            the certificate that signed the responses

Every response is signed by the key of `service.opendsr` (RSA with PKCS #1 v1.5 or ECDSA, with SHA-256);
without that block there is no OpenDSR here. What can't be served is refused with 400: other identities
than `controller_customer_id` in the form `raw` (a subject), several subjects in one request, and
callbacks to hosts that the block does not list.

An `erasure` is a request whose external id is the `subject_request_id`. Its term counts from the day of
`submitted_time`, in UTC. It waits for approval as any other, which OpenDSR calls `pending`; a denied one
is `cancelled`. `access` and `portability` are `completed` at once: the file is made when somebody whose
token has the scope `access` opens the `results_url`. It is handed out once, within a week. Until then
the service keeps keyed digests of the request's name and of the subject.

Source: OpenDSR specification 1.0, sections 5 to 9 (github.com/opengdpr/OpenDSR, specification.md).
"""

from __future__ import annotations

import base64
import contextlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HttpRequest
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from cluster.serve.api.rights import handed
from cluster.serve.domain import Service, TheService
from cluster.serve.opendsr import (
    DsrTimes,
    day_asked,
    opendsr_headers,
    opendsr_status,
    status_body,
    times_of,
)
from cluster.serve.problems import Refusal
from cluster.serve.state import Call, Delivery, ServiceState
from cluster.serve.tokens import Caller, MayAccess, MayRead, MaySubmit
from sisa.config.config import OpenDsrBlock
from sisa.core.digest import Keyed, sha256_hex
from sisa.core.errors import ConfigConflict, InvalidInput, UnknownRecord
from sisa.core.requests import OPENDSR, Regime, Request
from sisa.flows.requests import Terms
from sisa.store.blobs.files import disk_errors

_VERSION = "1.0"
_CERTIFICATE = "/opendsr/certificate"
_JSON = "application/json"
_SIGNED: dict[int | str, dict[str, Any]] = {
    "2XX": {"description": "Signed JSON.", "content": {_JSON: {"schema": {"type": "object"}}}}
}
_PEM: dict[int | str, dict[str, Any]] = {
    200: {"description": "PEM.", "content": {"application/x-pem-file": {"schema": {"type": "string"}}}}
}
_HANDED_OUT = "handed out"  # how a request for access has ended
_REGIMES: dict[str, Regime] = {"gdpr": "gdpr", "ccpa": "delete-act"}

opendsr_router = APIRouter(prefix="/opendsr", tags=["opendsr"])
_Uuid4 = Annotated[
    str,
    StringConstraints(pattern="^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"),
]


class Identity(BaseModel):
    """An identity of the subject."""

    model_config = ConfigDict(extra="forbid")
    identity_type: Annotated[str, Field(max_length=100)]
    identity_value: Annotated[str, Field(min_length=1, max_length=2_000)]
    identity_format: Literal["raw", "sha1", "md5", "sha256"]


class DataSubjectRequest(BaseModel):
    """A request in OpenDSR's form; extensions of other processors are ignored."""

    model_config = ConfigDict(extra="forbid")
    regulation: Literal["gdpr", "ccpa"] = "gdpr"
    subject_request_id: _Uuid4
    subject_request_type: Literal["erasure", "access", "portability"]
    submitted_time: AwareDatetime = Field(
        description="When the person asked the controller: the term of an erasure counts from its day."
    )
    subject_identities: Annotated[list[Identity], Field(min_length=1, max_length=100)]
    api_version: Annotated[str, Field(max_length=20)] = _VERSION
    status_callback_urls: Annotated[
        list[Annotated[str, Field(max_length=2_000)]], Field(max_length=10)
    ] = []
    extensions: dict[str, Any] = {}


def _block(service: Service) -> OpenDsrBlock:
    if service.settings.opendsr is None:
        step = "name a certificate and a key in the run file's `service.opendsr`"
        raise Refusal(404, "OpenDSR is not set up here", next_step=step)
    return service.settings.opendsr


async def _raw(request: HttpRequest) -> bytes:
    return await request.body()


@opendsr_router.post(
    "/requests",
    status_code=201,
    response_class=Response,
    responses=_SIGNED,
)
def submit_data_subject_request(
    asked: DataSubjectRequest,
    service: TheService,
    caller: MaySubmit,
    http: HttpRequest,
    body: Annotated[bytes, Depends(_raw)],
) -> Response:
    """Accept a request for erasure, which waits to be approved, for access or for portability."""
    block = _block(service)
    subject = _subject(asked)
    _check_callbacks(block, asked.status_callback_urls)
    if asked.subject_request_type == "erasure":
        times = _submit_erasure(service, caller, asked, subject)
    else:
        times = _submit_access(service, caller, asked, subject, http)
    return _signed(
        block,
        201,
        {
            "controller_id": block.controller_id,
            **times._asdict(),
            "encoded_request": base64.b64encode(body).decode(),
            "subject_request_id": asked.subject_request_id,
        },
    )


def _submit_erasure(
    service: Service, caller: Caller, asked: DataSubjectRequest, subject: str
) -> DsrTimes:
    """Submit a request for erasure."""
    name, state = asked.subject_request_id, ServiceState(service.model.directory)
    if state.call(_key(service, name)):
        raise _taken()
    regime = _REGIMES[asked.regulation]
    terms = Terms(
        external_id=name,
        by_opendsr=True,
        regime=regime,
        received_on=day_asked(asked.submitted_time, datetime.now(UTC)),
        submitter=caller.name,
    )
    made = caller.view(service.model).submit(subject=subject, terms=terms).request
    state.add_callbacks(made.request_id, asked.status_callback_urls)
    return times_of(made)


def _submit_access(
    service: Service, caller: Caller, asked: DataSubjectRequest, subject: str, http: HttpRequest
) -> DsrTimes:
    """Note a request for access, which is complete at once, and queue its callbacks."""
    name, state = asked.subject_request_id, ServiceState(service.model.directory)
    digest = caller.view(service.model).subject_digest(subject)
    wanted = f"{asked.subject_request_type} {digest}"
    if _erasure(service, caller, name):
        raise _taken()
    call = state.begin(_key(service, name), wanted)
    if call.asked != wanted:
        raise _taken()
    status = _access_status(service, http, name, call)
    state.queue(
        Delivery(
            f"msg_{sha256_hex(name.encode())[:32]}",
            url,
            "opendsr",
            json.dumps({**status, "status_callback_url": url}),
        )
        for url in asked.status_callback_urls
    )
    return _times_of_access(call)


def _times_of_access(call: Call) -> DsrTimes:
    at = datetime.fromtimestamp(call.at, UTC).isoformat(timespec="seconds")
    return DsrTimes(at, at)


def _key(service: Service, subject_request_id: str) -> str:
    """Return the key under which `ServiceState` keeps a request for access."""
    return Keyed(service.model.secret).digest("OpenDSR request", subject_request_id)


def _taken() -> ConfigConflict:
    return ConfigConflict(
        "another request has this subject_request_id", next_step="send each request under its own"
    )


def _subject(asked: DataSubjectRequest) -> str:
    """Return the only subject that a request names. Raise InvalidInput for other identities."""
    kinds = {(each.identity_type, each.identity_format) for each in asked.subject_identities}
    subject, *others = {each.identity_value for each in asked.subject_identities}
    if kinds != {("controller_customer_id", "raw")} or others:
        raise InvalidInput(
            "these identities can't be looked up here",
            where="subject_identities",
            expected="one controller_customer_id, raw: the subject of records",
            next_step="look the records up by `POST /find`, then name them in `POST /requests`",
        )
    return subject


def _check_callbacks(block: OpenDsrBlock, urls: list[str]) -> None:
    """Raise InvalidInput for a callback that the run file does not allow.

    Otherwise a caller could make the service connect to addresses of its own network.
    """
    for number, url in enumerate(urls):
        try:
            found = urlsplit(url)
            allowed = found.scheme == "https" and found.hostname in block.callback_hosts
            allowed = allowed and found.username is None and url.isascii() and url.isprintable()
        except ValueError:
            allowed = False
        if not allowed:
            raise InvalidInput(
                "this callback is not allowed",
                where=f"status_callback_urls.{number}",
                expected="https, and a host that `service.opendsr.callback_hosts` lists",
                next_step="ask for its status instead, or have the host listed",
            )


def _erasure(service: Service, caller: Caller, subject_request_id: str) -> Request | None:
    """Return the request for erasure of this name, if there is one."""
    with contextlib.suppress(UnknownRecord):
        found = caller.view(service.model).request(subject_request_id).request
        return found if found.external_id == subject_request_id else None
    return None


def _call(service: Service, subject_request_id: str) -> Call:
    """Return the request for access of this name. Raise UnknownRecord."""
    found = ServiceState(service.model.directory).call(_key(service, subject_request_id))
    if found is None:
        raise UnknownRecord("there is no such request")
    return found


def _subject_digest(call: Call) -> str:
    """Return the digest of the subject that a request for access names."""
    return call.asked.split()[1]


@opendsr_router.get(
    "/requests/{subject_request_id}",
    response_class=Response,
    responses=_SIGNED,
)
def show_data_subject_request(
    subject_request_id: _Uuid4, service: TheService, caller: MayRead, http: HttpRequest
) -> Response:
    """Return the status of a request."""
    block = _block(service)
    if found := _erasure(service, caller, subject_request_id):
        status = opendsr_status(found.state if found.state != "failed" else "approved")
        body = status_body(block, subject_request_id, status, times_of(found))
    else:
        call = _call(service, subject_request_id)
        if caller.shards is not None:  # raises for a person of other shards
            caller.view(service.model).check_subject(_subject_digest(call))
        body = _access_status(service, http, subject_request_id, call)
    return _signed(block, 200, {**body, "api_version": _VERSION})


def _access_status(service: Service, http: HttpRequest, name: str, call: Call) -> dict[str, Any]:
    """Return the status of a request for access: completed, with its results until they are fetched."""
    block = _block(service)
    url = f"{http.url.scheme}://{block.domain}{opendsr_router.prefix}/requests/{name}/results"
    body = status_body(block, name, "completed", _times_of_access(call))
    return body if call.request else {**body, "results_url": url}


@opendsr_router.get(
    "/requests/{subject_request_id}/results",
    response_class=Response,
    responses=_SIGNED,
)
def hand_out_results(subject_request_id: _Uuid4, service: TheService, caller: MayAccess) -> Response:
    """Return what is held of a person, as a file, once (GDPR Art. 15 and 20)."""
    block, call = _block(service), _call(service, subject_request_id)
    digest = _subject_digest(call)
    found = caller.view(service.model).access(digest=digest)
    if not ServiceState(service.model.directory).end(_key(service, subject_request_id), _HANDED_OUT):
        step = "send another request, or `POST /rights/access`"
        raise ConfigConflict("these results were handed out already", next_step=step)
    made = handed(service, "access", found, [found["subject"] or digest])
    made.headers.update(opendsr_headers(block, bytes(made.body)))
    return made


@opendsr_router.delete(
    "/requests/{subject_request_id}",
    status_code=202,
    response_class=Response,
    responses=_SIGNED,
)
def cancel_data_subject_request(
    subject_request_id: _Uuid4, service: TheService, caller: MaySubmit
) -> Response:
    """Cancel a request while it is pending."""
    block = _block(service)
    found = _erasure(service, caller, subject_request_id)
    if found is None:
        _call(service, subject_request_id)
        raise ConfigConflict("a request for access is completed at once, and can't be cancelled")
    caller.view(service.model).decide(found.request_id, "cancelled", OPENDSR, by=caller.name)
    body = {
        "controller_id": block.controller_id,
        "received_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject_request_id": subject_request_id,
        "api_version": _VERSION,
    }
    return _signed(block, 202, body)


@opendsr_router.get("/discovery", response_class=Response, responses=_SIGNED)
def discover(http: HttpRequest, service: TheService, _caller: MayRead) -> Response:
    """Return what is supported."""
    block = _block(service)
    body = {
        "api_version": _VERSION,
        "supported_identities": [{"identity_type": "controller_customer_id", "identity_format": "raw"}],
        "supported_subject_request_types": ["erasure", "access", "portability"],
        "processor_certificate": f"{http.url.scheme}://{block.domain}{_CERTIFICATE}",
    }
    return _signed(block, 200, body)


@opendsr_router.get("/certificate", response_class=Response, responses=_PEM)
def show_processor_certificate(service: TheService) -> Response:
    """Return the certificate (PEM) whose key signs responses and callbacks."""
    path = _block(service).certificate
    with disk_errors(path):
        return Response(path.read_bytes(), media_type="application/x-pem-file")


def _signed(block: OpenDsrBlock, code: int, body: dict[str, Any]) -> Response:
    data = json.dumps(body).encode()
    headers = {**opendsr_headers(block, data), "Cache-Control": "no-store"}
    return Response(data, code, headers, media_type=_JSON)
