"""The service as a FastAPI application: its routers, its error forms, its limits and `/healthz`.

`build_app(service)` makes it; a replica of Ray Serve runs it (`replica.py`), and so does a test client:

    app = build_app(Service(open_model("model"), answers, tokens=None, settings=ServiceBlock()))

A router is a module's own and is found by name (`ROUTERS`), since its endpoints import `Service` and
`service_of` from here. Endpoints that call the model are plain `def`: Starlette runs them on threads.
They raise errors of `sisa.core.errors`, or a `Refusal` for what only HTTP knows. Under `/v1/` an error
has OpenAI's form, elsewhere it is an RFC 9457 problem. No endpoint logs what a caller sent.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sisa.config.config import ServiceBlock
from sisa.core.domain import Kind
from sisa.core.errors import (
    Busy,
    ConfigConflict,
    InvalidInput,
    Outdated,
    Problem,
    SisaError,
    UnknownRecord,
    internal_fault,
)
from sisa.flows.ask import Prompt
from sisa.model import Model

if TYPE_CHECKING:
    from cluster.serve.tokens import Tokens

ROUTERS: tuple[str, ...] = ()  # "cluster.serve.MODULE:NAME_router", in the order of the document
OPENAI = "/v1/"  # paths below speak OpenAI's dialect
STATUSES = {InvalidInput: 400, UnknownRecord: 404, ConfigConflict: 409, Busy: 503, Outdated: 503}
RETRY_AFTER_S = 2
MAX_LISTED = 100  # problems of one request
FACTS = ("where", "expected", "got", "next_step", "problems")
PROBLEM = "urn:deletion-ready-model:problem:"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What to answer, and how; `shards` are those that the caller may read (None: all)."""

    prompt: Prompt
    kind: Kind | None = None
    max_new_tokens: int = 48
    shards: frozenset[int] | None = None


class Answers(Protocol):
    """What answers questions: a replica's engine, or a fake."""

    def generate(self, question: Question) -> AsyncIterator[Any]:
        """Yield the answer in pieces."""


@dataclass(frozen=True)
class Service:
    """What the endpoints share; every call of `model` adopts what others have committed."""

    model: Model
    answers: Answers
    tokens: Tokens | None  # None: loopback, and everybody who reaches it may do everything
    settings: ServiceBlock


class Refusal(HTTPException):
    """A refusal that only HTTP knows, with OpenAI's `code` and `param` where it has them."""

    def __init__(
        self,
        status: int,
        what: str,
        code: str = "",
        *,
        param: str | None = None,
        expected: str = "",
        got: str = "",
        next_step: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, what, headers)
        self.code, self.param = code, param
        self.error = SisaError(what, expected=expected, got=got, next_step=next_step)


def service_of(request: Request) -> Service:
    """Return the service that an application was built for; a dependency of its endpoints."""
    found: Service = request.app.state.service
    return found


def build_app(service: Service) -> FastAPI:
    """Return the application of a service, with every router."""
    app = FastAPI(title="The deletion-ready model", docs_url=None, redoc_url=None)
    app.state.service = service
    if service.tokens is None:  # a web page must not reach it under a name of its own
        hosts = [*LOOPBACK, service.settings.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(_Guard, max_bytes=service.settings.max_body_bytes)
    app.add_exception_handler(SisaError, _on_error)
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_schema)
    app.get("/healthz", summary="Whether the service runs")(_healthz)
    for name in ROUTERS:
        app.include_router(pkgutil.resolve_name(name))
    return app


async def _healthz() -> dict[str, str]:
    return {"status": "ok"}


class _Guard:
    """Refuse large bodies; keep unexpected errors out of logs, since they may quote text."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared, read, started = Headers(scope=scope).get("content-length", ""), 0, False

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes or (declared.isdecimal() and int(declared) > self.max_bytes):
                raise Refusal(413, "the body is too large", expected=f"{self.max_bytes} bytes at most")
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, limited, noted)
        except Exception as error:
            fault = internal_fault(error)
            _log.error(fault.what)
            if not started:
                await _response(Request(scope), 500, fault)(scope, receive, send)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SisaError)  # noqa: S101 - as registered
    status = next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 500)
    return _response(request, status, error)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    if isinstance(error, Refusal):
        more = {"code": error.code or None, "param": error.param}
        return _response(request, error.status_code, error.error, error.headers, **more)
    return _response(request, error.status_code, SisaError(error.detail), error.headers)


async def _on_schema(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    found = [(".".join(map(str, each["loc"])), str(each["msg"])) for each in error.errors()]
    problems = [Problem(*each) for each in found[:MAX_LISTED]]
    param = ".".join(map(str, error.errors()[0]["loc"][1:])) if found else None
    refused = SisaError("the request does not fit its schema", problems=problems)
    return _response(request, 422, refused, param=param)


def _response(
    request: Request,
    status: int,
    error: SisaError,
    headers: Mapping[str, str] | None = None,
    *,
    code: str | None = None,
    param: str | None = None,
) -> JSONResponse:
    """Return an error in the form of its path; a class of `sisa.core.errors` names its kind."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    headers = {**retry, **(headers or {})}
    facts, name = _facts(request, status, error), type(error).__name__
    typed = type(error) is not SisaError
    if request.url.path.startswith(OPENAI):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        message = "; ".join([error.what, *(f"{key}: {each}" for key, each in facts.items())])
        code = code or (name if typed else None)
        body = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": body}, status, headers)
    kind = f"{PROBLEM}{name}" if typed else "about:blank"
    about = {"type": kind, "title": HTTPStatus(status).phrase, "status": status, "detail": error.what}
    return JSONResponse(about | facts, status, headers, media_type="application/problem+json")


def _facts(request: Request, status: int, error: SisaError) -> dict[str, Any]:
    """Return the facts of an error that its caller may see: paths are the operator's."""
    found = {key: each for key, each in error.to_json().items() if key in FACTS and each}
    caller = getattr(request.state, "caller", None)
    if caller is not None and "operate" in caller.scopes:
        return found
    directory = str(service_of(request).model.directory)
    own = {key: each for key, each in found.items() if directory not in str(each)}
    return {} if status >= 500 else own
