"""Define `Refusal`, and write errors for clients.

Errors have OpenAI's form under `/v1/`, and are RFC 9457 problems elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sisa.core.errors import (
    Busy,
    ConfigConflict,
    InvalidInput,
    Outdated,
    Problem,
    SisaError,
    UnknownRecord,
)

OPENAI = "/v1/"  # paths below speak OpenAI's dialect
STATUSES = {InvalidInput: 400, UnknownRecord: 404, ConfigConflict: 409, Busy: 503, Outdated: 503}
RETRY_AFTER_S = 2
DOCUMENTED = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)
MAX_LISTED = 100  # problems of one request
FACTS = ("where", "expected", "got", "next_step", "problems")
PROBLEM = "urn:deletion-ready-model:problem:"


class Refusal(HTTPException):
    """A refusal that has no class in `sisa.core.errors`; `code` and `param` are OpenAI's."""

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


def errors_documented(*, openai: bool) -> dict[int | str, dict[str, Any]]:
    """Return the schema of each error of a router's endpoints, for the OpenAPI document."""
    text = {"type": "string"}
    if openai:
        names = ("message", "type", "param", "code")
        error = _object({name: {"type": ["string", "null"]} for name in names}, *names)
        content = {"application/json": {"schema": _object({"error": error}, "error")}}
    else:
        problem = _object({"where": text, "what": text}, "where", "what")
        properties: dict[str, Any] = dict.fromkeys(("type", "title", "detail", *FACTS[:-1]), text)
        properties |= {"status": {"type": "integer"}, "problems": {"type": "array", "items": problem}}
        schema = _object(properties, "type", "title", "status", "detail")
        content = {"application/problem+json": {"schema": schema}}
    return {code: {"description": HTTPStatus(code).phrase, "content": content} for code in DOCUMENTED}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


async def on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SisaError)  # noqa: S101 - as registered
    return error_response(request, _status(error), error)


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    if isinstance(error, Refusal):
        more = {"code": error.code or None, "param": error.param}
        return error_response(request, error.status_code, error.error, error.headers, **more)
    return error_response(request, error.status_code, SisaError(error.detail), error.headers)


async def on_schema(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    errors = error.errors()
    problems = [
        Problem(".".join(map(str, each["loc"])), str(each["msg"]).removeprefix("Value error, "))
        for each in errors[:MAX_LISTED]
    ]
    first = errors[0]
    # FastAPI leaves a body as bytes unless its type is JSON.
    is_raw = isinstance(first.get("input"), bytes)
    step = "send it as `Content-Type: application/json`" if is_raw else ""
    refused = SisaError("the request does not fit its schema", next_step=step, problems=problems)
    param = next((each for each in first["loc"][1:2] if isinstance(each, str)), None)
    return error_response(request, 422, refused, param=param, code=first["type"])


def error_response(
    request: Request,
    status: int,
    error: SisaError,
    headers: Mapping[str, str] | None = None,
    *,
    code: str | None = None,
    param: str | None = None,
) -> JSONResponse:
    """Return an error in the form of its path, named by its class in `sisa.core.errors`."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    headers = {**retry, **(headers or {})}
    facts, name = _facts(request, status, error), _name(error)
    if request.url.path.startswith(OPENAI):
        body = _openai_body(status, error, facts, code or name, param)
        return JSONResponse(body, status, headers)
    body = {
        "type": f"{PROBLEM}{name}" if name else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.what,
        **facts,
    }
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def stream_error(request: Request, error: SisaError) -> dict[str, Any]:
    """Return OpenAI's form of an error that ends a stream."""
    status = _status(error)
    return _openai_body(status, error, _facts(request, status, error), _name(error), None)


def _openai_body(
    status: int, error: SisaError, facts: Mapping[str, Any], code: str | None, param: str | None
) -> dict[str, Any]:
    sentences = [error.what]
    sentences += [f"{key}: {each}" for key, each in facts.items() if key != "problems"]
    sentences += [f"{each['where']}: {each['what']}" for each in facts.get("problems", ())]
    type_ = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": "; ".join(sentences), "type": type_, "param": param, "code": code}}


def _name(error: SisaError) -> str | None:
    """Return the class of a typed error; a plain SisaError, as a Refusal has it, has no name."""
    return None if type(error) is SisaError else type(error).__name__


def _status(error: SisaError) -> int:
    return next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 500)


def _facts(request: Request, status: int, error: SisaError) -> dict[str, Any]:
    """Return the facts of an error that its caller may see: paths are the operator's."""
    facts = {key: each for key, each in error.to_json().items() if key in FACTS and each}
    caller = getattr(request.state, "caller", None)
    if caller is not None and "operate" in caller.scopes:
        return facts
    if status >= 500:
        return {}
    directory = str(request.app.state.service.model.directory)
    return {key: each for key, each in facts.items() if directory not in str(each)}
