"""The service as a FastAPI application: its routers, its limits and `/healthz`.

`build_app(service)` makes it; a replica of Ray Serve runs it (`replica.py`), and so does a test client:

    app = build_app(Service(open_model("model"), answers, tokens=None, settings=ServiceBlock()))

Endpoints that call the model are plain `def`: Starlette runs them on threads. They raise errors of
`sisa.core.errors`, or a `Refusal` for what only HTTP knows; `problems.py` writes both for clients. No
endpoint logs what a caller sent.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve.api.answers import answers_router
from cluster.serve.api.console import console_router
from cluster.serve.api.opendsr import opendsr_router
from cluster.serve.api.requests import requests_router
from cluster.serve.api.rights import rights_router
from cluster.serve.domain import Service
from cluster.serve.metrics import MeasuredAnswers, ServiceMeters, metrics_router
from cluster.serve.problems import (
    OPENAI,
    Refusal,
    error_response,
    errors_documented,
    on_error,
    on_refusal,
    on_schema,
)
from sisa.core.errors import SisaError, internal_fault

ROUTERS: tuple[APIRouter, ...] = (  # in the order of the OpenAPI document
    *(answers_router, requests_router, opendsr_router),
    *(console_router, metrics_router, rights_router),
)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_log = logging.getLogger(__name__)


def build_app(service: Service) -> FastAPI:
    """Return the application of a service, with every router."""
    app = FastAPI(title="The deletion-ready model", docs_url=None, redoc_url=None)
    app.state.meters = meters = ServiceMeters(service)
    app.state.service = replace(service, answers=MeasuredAnswers(service.answers, meters.answers))
    if service.tokens is None or not service.tokens.demanded():
        # A web page must not reach it under a name of its own.
        hosts = [*LOOPBACK, service.settings.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(_Guard, max_bytes=service.settings.max_body_bytes)
    app.add_exception_handler(SisaError, on_error)
    app.add_exception_handler(HTTPException, on_refusal)
    app.add_exception_handler(RequestValidationError, on_schema)
    app.get("/healthz", summary="Whether the service runs")(_healthz)
    for router in ROUTERS:
        openai = f"{router.prefix}/".startswith(OPENAI)
        app.include_router(router, responses=errors_documented(openai=openai))
    return app


async def _healthz() -> dict[str, str]:
    return {"status": "ok"}


class _Guard:
    """Refuse large bodies; keep unexpected errors out of logs, since they may quote text.

    FastAPI's `max_body_size` would refuse in plain text, whatever form the errors of a path have.
    """

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
                await error_response(Request(scope), 500, fault)(scope, receive, send)
