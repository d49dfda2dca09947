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
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, Protocol

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
    from prometheus_client.core import Metric

    from cluster.serve.tokens import Tokens

ROUTERS: tuple[str, ...] = (  # in the order of the document
    "cluster.serve.api.answers:answers_router",
    "cluster.serve.api.requests:requests_router",
    "cluster.serve.api.opendsr:opendsr_router",
    "cluster.serve.api.console:console_router",
    "cluster.serve.metrics:metrics_router",
    "cluster.serve.api.rights:rights_router",
)
MEASURED = "cluster.serve.metrics:with_meters"  # by name, too: it imports from here
OPENAI = "/v1/"  # paths below speak OpenAI's dialect
STATUSES = {InvalidInput: 400, UnknownRecord: 404, ConfigConflict: 409, Busy: 503, Outdated: 503}
RETRY_AFTER_S = 2
_DOCUMENTED = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)
MAX_LISTED = 100  # problems of one request
FACTS = ("where", "expected", "got", "next_step", "problems")
PROBLEM = "urn:deletion-ready-model:problem:"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What to answer, and how."""

    prompt: Prompt
    kind: Kind | None = None  # the form of a text; None: as the model was trained
    max_new_tokens: int | None = None  # None: DEFAULT_TOKENS, or as many as fit
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # most likely tokens to name at each position; None: no probabilities
    shards: frozenset[int] | None = None  # those that the caller may read; None: all
    partition: str = ""  # in which the shards were named
    alone: bool = False  # ask the base alone
    whole: bool = True  # nobody sees a piece before the end, so the answer may begin again


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, its log-probability, and the likeliest tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """An answer begins, or begins again after a deletion: what came before is void."""

    shards: tuple[int, ...]  # whose models answer; none: the base alone
    num_prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; tokens are given if probabilities were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer is complete."""

    reason: Literal["stop", "length"]
    num_tokens: int


AnswerEvent = Started | Piece | Ended


class Answers(Protocol):
    """What answers questions: a replica's engine, or a fake."""

    def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        """Yield what happens to each question, by its position, until all have ended.

        Raise InvalidInput for a question that can't be answered, before anything is yielded; Outdated
        where a deletion cuts an answer that may not begin again. Closing the generator gives them up.
        """


@dataclass(frozen=True)
class Service:
    """What the endpoints share; every call of `model` adopts what others have committed."""

    model: Model
    answers: Answers
    tokens: Tokens | None  # None: loopback, and everybody who reaches it may do everything
    settings: ServiceBlock
    measured_everywhere: Callable[[], list[Metric]] | None = None  # None: this is the only process

    @property
    def name(self) -> str:
        """Return the model's name for clients: that of its directory."""
        return self.model.directory.resolve().name


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
        next_step: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, what, headers)
        self.code, self.param = code, param
        self.error = SisaError(what, expected=expected, next_step=next_step)


def service_of(request: Request) -> Service:
    """Return the service that an application was built for; a dependency of its endpoints."""
    found: Service = request.app.state.service
    return found


def build_app(service: Service) -> FastAPI:
    """Return the application of a service, with every router."""
    app = FastAPI(title="The deletion-ready model", docs_url=None, redoc_url=None)
    app.state.service, app.state.meters = pkgutil.resolve_name(MEASURED)(service)
    if service.tokens is None or not service.tokens.demanded():
        # A web page must not reach it under a name of its own.
        hosts = [*LOOPBACK, service.settings.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(_Guard, max_bytes=service.settings.max_body_bytes)
    app.add_exception_handler(SisaError, _on_error)
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_schema)
    app.get("/healthz", summary="Whether the service runs")(_healthz)
    for name in ROUTERS:
        router = pkgutil.resolve_name(name)
        app.include_router(router, responses=_refusals(f"{router.prefix}/".startswith(OPENAI)))
    return app


def _refusals(openai: bool) -> dict[int | str, dict[str, Any]]:
    """Return how the errors of a router's endpoints look, for the OpenAPI document."""
    if openai:
        facts = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
        media, body = "application/json", {"error": {"type": "object", "properties": facts}}
    else:
        media = "application/problem+json"
        body = {name: {"type": "string"} for name in ("type", "title", "detail", *FACTS[:-1])}
        body |= {"status": {"type": "integer"}, "problems": {"type": "array"}}
    content = {media: {"schema": {"type": "object", "properties": body}}}
    return {code: {"description": HTTPStatus(code).phrase, "content": content} for code in _DOCUMENTED}


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
    return _response(request, _status(error), error)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    if isinstance(error, Refusal):
        more = {"code": error.code or None, "param": error.param}
        return _response(request, error.status_code, error.error, error.headers, **more)
    return _response(request, error.status_code, SisaError(error.detail), error.headers)


async def _on_schema(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    errors = error.errors()
    problems = [
        Problem(".".join(map(str, each["loc"])), str(each["msg"]).removeprefix("Value error, "))
        for each in errors[:MAX_LISTED]
    ]
    first = errors[0]
    is_raw = isinstance(first.get("input"), bytes)  # FastAPI parses what is called JSON alone
    step = "send it as `Content-Type: application/json`" if is_raw else ""
    refused = SisaError("the request does not fit its schema", next_step=step, problems=problems)
    param = next((each for each in first["loc"][1:2] if isinstance(each, str)), None)
    return _response(request, 422, refused, param=param, code=first["type"])


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
    facts, name = _facts(request, status, error), _kind(error)
    if request.url.path.startswith(OPENAI):
        body = _openai_body(status, error, facts, code or name, param)
        return JSONResponse(body, status, headers)
    kind = f"{PROBLEM}{name}" if name else "about:blank"
    about = {"type": kind, "title": HTTPStatus(status).phrase, "status": status, "detail": error.what}
    return JSONResponse(about | facts, status, headers, media_type="application/problem+json")


def stream_error(request: Request, error: SisaError) -> dict[str, Any]:
    """Return OpenAI's form of an error after the response has begun."""
    status = _status(error)
    return _openai_body(status, error, _facts(request, status, error), _kind(error), None)


def _openai_body(
    status: int, error: SisaError, facts: Mapping[str, Any], code: str | None, param: str | None
) -> dict[str, Any]:
    said = [f"{key}: {each}" for key, each in facts.items() if key != "problems"]
    said += [f"{each['where']}: {each['what']}" for each in facts.get("problems", ())]
    message = "; ".join([error.what, *said])
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _kind(error: SisaError) -> str | None:
    """Return the name of a typed error; what only HTTP refuses has none."""
    return None if type(error) is SisaError else type(error).__name__


def _status(error: SisaError) -> int:
    return next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 500)


def _facts(request: Request, status: int, error: SisaError) -> dict[str, Any]:
    """Return the facts of an error that its caller may see: paths are the operator's."""
    found = {key: each for key, each in error.to_json().items() if key in FACTS and each}
    caller = getattr(request.state, "caller", None)
    if caller is not None and "operate" in caller.scopes:
        return found
    directory = str(service_of(request).model.directory)
    own = {key: each for key, each in found.items() if directory not in str(each)}
    return {} if status >= 500 else own
