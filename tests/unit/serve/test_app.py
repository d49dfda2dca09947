"""The application's frame: error forms, who sees which facts, the size of bodies, host names, faults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body
from fastapi.testclient import TestClient

from cluster.serve import app as serving
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import SCOPES, Caller, MayDecide, MayRead
from sisa.core.errors import (
    Busy,
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    Problem,
    SisaError,
    UnknownRecord,
)
from tests.fakes.tokens import KnownTokens
from tests.unit.serve.conftest import LOOPBACK

ERRORS: list[tuple[Callable[..., SisaError], int]] = [
    (InvalidInput, 400),
    (UnknownRecord, 404),
    (ConfigConflict, 409),
    (Busy, 503),
    (IntegrityError, 500),
    (EnvironmentFault, 500),
]


raised: list[Exception] = []
failing_router = APIRouter()


@failing_router.post("/v1/fail")
@failing_router.post("/fail")
def fail(_caller: MayRead, number: Annotated[int, Body(embed=True)]) -> int:
    """Raise what the test asks for."""
    if raised:
        raise raised.pop()
    return number


@failing_router.post("/decide")
def decide(caller: MayDecide) -> str:
    return caller.name


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ROUTERS", (*serving.ROUTERS, failing_router))


@pytest.fixture
def guarded(service: Service) -> Iterator[TestClient]:
    """Return a client of the service with tokens: an operator's, and a reader's."""
    reader = Caller("r", "reader", frozenset({"read"}))
    tokens = KnownTokens(op=Caller("ops", "operator", SCOPES), re=reader)
    with TestClient(build_app(replace(service, tokens=tokens)), base_url=LOOPBACK) as made:
        yield made


def ask(client: TestClient, path: str, error: Exception | None = None, bearer: str = "") -> Any:
    raised[:] = [error] if error else []
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    return client.post(path, json={"number": 1}, headers=headers)


@pytest.mark.parametrize(("kind", "status"), ERRORS)
def test_typed_errors_are_problems_with_their_facts(
    client: TestClient, kind: Callable[..., SisaError], status: int
) -> None:
    error = kind(
        "it failed", where="there", expected="a", got="b", next_step="c", problems=[Problem("x", "y")]
    )
    found = ask(client, "/fail", error)
    assert found.status_code == status
    assert found.headers["content-type"] == "application/problem+json"
    body = found.json()
    name = type(error).__name__
    assert body.pop("type") == f"urn:deletion-ready-model:problem:{name}"
    assert body.pop("title")
    facts = {name: each for name, each in error.to_json().items() if name not in ("type", "message")}
    assert body == {"status": status, "detail": "it failed", **facts}
    assert ("retry-after" in found.headers) == (status == 503)


@pytest.mark.parametrize(("kind", "status"), ERRORS)
def test_under_v1_they_have_openais_form(
    client: TestClient, kind: Callable[..., SisaError], status: int
) -> None:
    found = ask(client, "/v1/fail", kind("it failed", got="b"))
    assert found.status_code == status
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith("it failed")
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


@pytest.mark.parametrize("path", ["/fail", "/v1/fail", "/nowhere", "/v1/nowhere"])
def test_a_request_beside_the_schema_or_the_paths(client: TestClient, path: str) -> None:
    found = client.post(path, json={"number": "a secret"})
    assert found.status_code == (404 if "nowhere" in path else 422)
    assert "a secret" not in found.text
    where = found.json()["error"] if path.startswith("/v1/") else found.json()
    assert "number" in str(where) or "nowhere" in path


@pytest.mark.parametrize("path", ["/requests", "/v1/completions"])
def test_json_that_is_sent_as_a_form_is_refused_with_what_to_do(client: TestClient, path: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's, unless one names another
    refused = client.post(path, content=b'{"model": "m"}', headers=form)
    assert refused.status_code == 422
    assert "send it as `Content-Type: application/json`" in refused.text
    broken = client.post(path, content=b'{"model', headers={"Content-Type": "application/json"})
    assert (broken.status_code, "Content-Type" in broken.text) == (422, False)


def test_only_an_operator_sees_paths_and_causes(guarded: TestClient, service: Service) -> None:
    directory = str(service.model.directory)
    faults: list[Callable[[], SisaError]] = [
        lambda: IntegrityError("damaged", where=f"{directory}/records", got="other bytes"),
        lambda: ConfigConflict("another model", where=directory, got="another"),
    ]
    for fault in faults:
        seen = {each: ask(guarded, "/fail", fault(), each).text for each in ("op", "re")}
        assert directory in seen["op"]
        assert directory not in seen["re"]


def test_the_caller_on_loopback_without_tokens_is_local(client: TestClient) -> None:
    assert client.post("/decide").json() == "local"


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_limited(service: Service, chunked: bool) -> None:
    limit = service.settings.max_body_bytes
    sent: Any = b" " * (limit + 1)
    with TestClient(build_app(service), base_url=LOOPBACK) as client:
        content = iter([sent[:10], sent[10:]]) if chunked else sent
        found = client.post("/v1/fail", content=content, headers={"content-type": "application/json"})
        assert (found.status_code, set(found.json())) == (413, {"error"})
        fits = b'{"number": 2}'.ljust(limit)
        kind = {"content-type": "application/json"}
        assert client.post("/fail", content=fits, headers=kind).json() == 2


def test_an_unexpected_error_says_where_and_quotes_nothing(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        found = ask(client, "/fail", KeyError("the text of a record"))
    assert (found.status_code, found.json()["status"]) == (500, 500)
    assert "the text of a record" not in found.text + caplog.text
    assert "KeyError" in caplog.text


def test_a_web_page_under_its_own_name_reaches_nothing(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
