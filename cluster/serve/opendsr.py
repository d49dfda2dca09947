"""Requests for erasure in the vocabulary of OpenDSR 1.0 (formerly OpenGDPR).

    POST   /opendsr/requests                        {"regulation": "gdpr", "subject_request_id": ...}
    GET    /opendsr/requests/{subject_request_id}   its status
    DELETE /opendsr/requests/{subject_request_id}   cancels it while it is pending
    GET    /opendsr/discovery                       what is supported
    GET    /opendsr/certificate                     the certificate that signed the responses

A `subject_request_id` is a request's external id. Every response is signed by the key of
`service.opendsr` (RSA with PKCS #1 v1.5 or ECDSA, with SHA-256); without that block there is no OpenDSR
here. What can't be served is refused with 400: other types than `erasure`, other identities than
`controller_customer_id` in the form `raw` (a subject), several subjects in one request, and callbacks to
hosts that the block does not list. A request waits for approval as any other, which OpenDSR calls
`pending`; a denied one is `cancelled`.

Source: OpenDSR specification 1.0, sections 5 to 9 (github.com/opengdpr/OpenDSR, specification.md).
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HttpRequest
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from cluster.serve.app import Refusal, Service, service_of
from cluster.serve.tokens import Caller, may
from cluster.serve.webhooks import ServiceState, expected_by, opendsr_headers, opendsr_status
from sisa.config.config import OpenDsrBlock
from sisa.core.domain import Regime, Request
from sisa.core.errors import InvalidInput, UnknownRecord
from sisa.flows.deletion import Terms
from sisa.flows.lifecycle import RequestView
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
_REGIMES: dict[str, Regime] = {"gdpr": "gdpr", "ccpa": "delete-act"}

opendsr_router = APIRouter(prefix="/opendsr", tags=["opendsr"])
_Open = Annotated[Service, Depends(service_of)]
_Uuid4 = Annotated[
    str,
    StringConstraints(pattern="^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"),
]


class Identity(BaseModel):
    """Who the subject is."""

    model_config = ConfigDict(extra="forbid")
    identity_type: Annotated[str, Field(max_length=100)]
    identity_value: Annotated[str, Field(min_length=1, max_length=2_000)]
    identity_format: Literal["raw", "sha1", "md5", "sha256"]


class DataSubjectRequest(BaseModel):
    """A request as OpenDSR writes it; extensions of other processors are ignored."""

    model_config = ConfigDict(extra="forbid")
    regulation: Literal["gdpr", "ccpa"] = "gdpr"
    subject_request_id: _Uuid4
    subject_request_type: Literal["erasure", "access", "portability"]
    submitted_time: AwareDatetime
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


_Submitting = Annotated[Caller, Depends(may("submit"))]
_Reading = Annotated[Caller, Depends(may("read"))]


@opendsr_router.post(
    "/requests",
    name="submit_data_subject_request",
    status_code=201,
    response_class=Response,
    responses=_SIGNED,
)
def _submit_dsr(
    asked: DataSubjectRequest,
    service: _Open,
    caller: _Submitting,
    body: Annotated[bytes, Depends(_raw)],
) -> Response:
    """Take in a request for erasure; it waits to be approved."""
    block = _block(service)
    (subject,) = _subjects(asked)
    _check_callbacks(block, asked.status_callback_urls)
    model = caller.view(service.model)
    regime = _REGIMES[asked.regulation]
    terms = Terms(asked.subject_request_id, "OpenDSR", regime, submitter=caller.name)
    made = model.submit(subject=subject, terms=terms).request
    ServiceState(model.directory).add_callbacks(made.request_id, asked.status_callback_urls)
    return _signed(
        block,
        201,
        {
            "controller_id": block.controller_id,
            "expected_completion_time": expected_by(made),
            "received_time": _rfc3339(made.created_at),
            "encoded_request": base64.b64encode(body).decode(),
            "subject_request_id": asked.subject_request_id,
        },
    )


def _subjects(asked: DataSubjectRequest) -> set[str]:
    """Return the only subject that a request names. Raise InvalidInput for what can't be served."""
    if asked.subject_request_type != "erasure":
        raise InvalidInput(
            "this type of request is not served by OpenDSR here",
            where="subject_request_type",
            expected="erasure",
            got=asked.subject_request_type,
            next_step="what is held of a person: POST /rights/access",
        )
    kinds = {(each.identity_type, each.identity_format) for each in asked.subject_identities}
    found = {each.identity_value for each in asked.subject_identities}
    if kinds != {("controller_customer_id", "raw")} or len(found) != 1:
        raise InvalidInput(
            "these identities can't be looked up here",
            where="subject_identities",
            expected="one controller_customer_id, raw: the subject of records",
            next_step="look the records up by `POST /find`, then name them in `POST /requests`",
        )
    return found


def _check_callbacks(block: OpenDsrBlock, urls: list[str]) -> None:
    """Raise InvalidInput for a callback that the run file does not allow: a service must not be sent
    to addresses of its own network."""
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


def _view(service: Service, caller: Caller, subject_request_id: str) -> RequestView:
    view = caller.view(service.model).request(subject_request_id)
    if view.request.external_id != subject_request_id:
        raise UnknownRecord("there is no such request")
    return view


@opendsr_router.get(
    "/requests/{subject_request_id}",
    name="show_data_subject_request",
    response_class=Response,
    responses=_SIGNED,
)
def _status_dsr(subject_request_id: _Uuid4, service: _Open, caller: _Reading) -> Response:
    """Return the status of a request."""
    block = _block(service)
    return _signed(block, 200, _status(block, _view(service, caller, subject_request_id).request))


@opendsr_router.delete(
    "/requests/{subject_request_id}",
    name="cancel_data_subject_request",
    status_code=202,
    response_class=Response,
    responses=_SIGNED,
)
def _cancel_dsr(subject_request_id: _Uuid4, service: _Open, caller: _Submitting) -> Response:
    """Cancel a request while it is pending."""
    block = _block(service)
    found = _view(service, caller, subject_request_id).request
    caller.view(service.model).decide(found.request_id, "cancelled", "OpenDSR", by=caller.name)
    body = {
        "controller_id": block.controller_id,
        "received_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject_request_id": subject_request_id,
        "api_version": _VERSION,
    }
    return _signed(block, 202, body)


@opendsr_router.get("/discovery", name="discover", response_class=Response, responses=_SIGNED)
def _discovery_dsr(http: HttpRequest, service: _Open, _caller: _Reading) -> Response:
    """Return what is supported."""
    block = _block(service)
    body = {
        "api_version": _VERSION,
        "supported_identities": [{"identity_type": "controller_customer_id", "identity_format": "raw"}],
        "supported_subject_request_types": ["erasure"],
        "processor_certificate": f"{http.url.scheme}://{block.domain}{_CERTIFICATE}",
    }
    return _signed(block, 200, body)


@opendsr_router.get(
    "/certificate", name="show_processor_certificate", response_class=Response, responses=_PEM
)
def _certificate_dsr(service: _Open) -> Response:
    """Return the certificate (PEM) whose key signs responses and callbacks."""
    path = _block(service).certificate
    with disk_errors(path):
        return Response(path.read_bytes(), media_type="application/x-pem-file")


def _status(block: OpenDsrBlock, request: Request) -> dict[str, Any]:
    state = request.state if request.state != "failed" else "approved"
    return {
        "controller_id": block.controller_id,
        "expected_completion_time": expected_by(request),
        "subject_request_id": request.external_id,
        "request_status": opendsr_status(state),
        "api_version": _VERSION,
    }


def _signed(block: OpenDsrBlock, code: int, body: dict[str, Any]) -> Response:
    data = json.dumps(body).encode()
    headers = {**opendsr_headers(block, data), "Cache-Control": "no-store"}
    return Response(data, code, headers, media_type=_JSON)


def _rfc3339(time: str) -> str:
    return datetime.fromisoformat(time).isoformat(timespec="seconds")
