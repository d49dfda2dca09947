"""Who may: tokens at rest, what each role reaches, limits on rates, and where a service may listen."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Security
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from cluster.serve import app as serving
from cluster.serve import tokens as module
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.service import tls_files
from cluster.serve.tokens import (
    DAYS,
    FAILURES_PER_MINUTE,
    LOCAL,
    ROLES,
    SCOPES,
    Caller,
    Role,
    Scope,
    Tokens,
    admitted,
)
from sisa.config.config import Tls
from sisa.core.errors import ConfigConflict, IntegrityError, InvalidInput
from sisa.flows.wiring.upper_houses import TOKENS
from tests.fakes.tokens import certified
from tests.unit.serve.conftest import LOOPBACK

PAGE = Path(serving.__file__).with_name("README.md")
NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Need no token: they tell nothing about a model; OpenDSR publishes the certificate of its processor.
OPEN = {"/healthz", "/openapi.json", "/opendsr/certificate"}


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(tmp_path: Path, clock: Clock) -> Tokens:
    return Tokens(tmp_path, now=clock)


# --- at rest


def test_a_token_is_known_until_it_expires(tokens: Tokens, clock: Clock) -> None:
    made, text = tokens.add("anna", "officer")
    assert tokens.caller(text) == Caller("anna", "officer", ROLES["officer"])
    clock.now = NOW + timedelta(days=DAYS) - timedelta(seconds=1)
    assert tokens.caller(text) is not None
    clock.now += timedelta(seconds=1)
    assert tokens.caller(text) is None
    assert tokens.listed() == [(made, "expired")]


def test_a_revoked_token_ends_at_once_in_every_process(tokens: Tokens, tmp_path: Path) -> None:
    _, text = tokens.add("anna", "reader")
    elsewhere = Tokens(tmp_path, now=lambda: NOW)
    assert elsewhere.caller(text) is not None
    tokens.revoke("Anna")
    assert elsewhere.caller(text) is None
    assert [state for _, state in tokens.listed()] == ["revoked"]
    with pytest.raises(InvalidInput, match="can be revoked"):
        tokens.revoke("anna")


@given(data=st.data())
def test_no_other_text_is_a_token(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Truncated, extended, changed, empty, huge or not ASCII: nobody's."""
    tokens = Tokens(tmp_path_factory.mktemp("m"))
    _, text = tokens.add("anna", "operator")
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda each: each != text[at]))
    wrong = [text[:at], text[at + 1 :], f"{text}=", f" {text}", text.swapcase(), "", "é", text * 9]
    wrong += [text[:at] + other + text[at + 1 :], hashlib.sha256(text.encode()).hexdigest()]
    assert [each for each in wrong if tokens.caller(each)] == []
    assert tokens.caller(text) is not None


def test_the_file_holds_no_token_and_is_its_owners_alone(tokens: Tokens, tmp_path: Path) -> None:
    texts = [tokens.add(name, "reader")[1] for name in ("anna", "ben")]
    kept = (tmp_path / TOKENS).read_bytes()
    assert (tmp_path / TOKENS).stat().st_mode & 0o777 == 0o600
    assert len(set(texts)) == 2
    for text in texts:
        assert len(text.removeprefix("sisa_")) * 6 >= 256
        assert text.removeprefix("sisa_").encode() not in kept
    assert [each.name for each in tmp_path.iterdir()] == [TOKENS]


@pytest.mark.parametrize("which", [0, 4, None])
def test_every_digest_is_compared_in_constant_time(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch, which: int | None
) -> None:
    """The work does not depend on which token fits, or whether one does."""
    texts = [tokens.add(f"t{number}", "reader")[1] for number in range(5)]
    tokens.revoke("t2")
    compared = []

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(module, "hmac", SimpleNamespace(compare_digest=counting))
    found = tokens.caller("forged" if which is None else texts[which])
    assert (found and found.name) == (None if which is None else f"t{which}")
    assert len(compared) == 5


def test_a_name_is_one_persons(tokens: Tokens) -> None:
    _, old = tokens.add("anna", "reader")
    with pytest.raises(ConfigConflict, match="in use"):
        tokens.add("Anna", "operator")
    tokens.revoke("anna")
    _, new = tokens.add("Anna", "officer")
    assert (tokens.caller(old), tokens.caller(new)) == (
        None,
        Caller("Anna", "officer", ROLES["officer"]),
    )
    assert len(tokens.listed()) == 1


@pytest.mark.parametrize("name", ["", "local", "LOCAL", "a b", "é", "a\n", "x" * 65, "-a", "<b>"])
def test_names_that_no_log_or_header_misreads(tokens: Tokens, name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        tokens.add(name, "reader")
    assert tokens.listed() == []


def test_scopes_narrow_a_role_and_never_widen_it(tokens: Tokens) -> None:
    _, text = tokens.add("prometheus", "operator", scopes=["operate"])
    assert tokens.caller(text) == Caller("prometheus", "operator", frozenset({"operate"}))
    with pytest.raises(InvalidInput, match="role reader"):
        tokens.add("ben", "reader", scopes=["answer", "decide"])


def test_a_token_for_some_shards_concerns_no_whole_model(tokens: Tokens) -> None:
    _, text = tokens.add("ops", "operator", shards=[3, 0], partition="p")
    found = tokens.caller(text)
    assert found is not None
    assert (found.shards, found.partition) == (frozenset({0, 3}), "p")
    assert not found.scopes & {"erase", "operate"}
    with pytest.raises(InvalidInput, match="for some shards"):
        tokens.add("ben", "operator", scopes=["erase"], shards=[0])
    with pytest.raises(InvalidInput, match="for some shards"):
        tokens.add("ben", "operator", shards=[])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o660),
        lambda path: path.chmod(0o606),
        lambda path: path.write_text("{}garbage"),
        lambda path: path.write_text('{"tokens": [{"name": "anna"}]}'),
        lambda path: path.write_text(path.read_text().replace("reader", "root")),
    ],
)
def test_a_file_that_others_can_write_or_that_is_damaged_admits_nobody(
    tokens: Tokens, tmp_path: Path, spoil: Callable[[Path], Any]
) -> None:
    _, text = tokens.add("anna", "reader")
    spoil(tmp_path / TOKENS)
    for attempt in (lambda: tokens.caller(text), lambda: tokens.add("ben", "reader")):
        with pytest.raises(IntegrityError, match="tokens can't be used"):
            attempt()


def test_tokens_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(8)]
    threads = [threading.Thread(target=Tokens(tmp_path).add, args=(name, "reader")) for name in names]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [each.name for each, _ in Tokens(tmp_path).listed()] == names


# --- over HTTP

probe_router = APIRouter()


def add_probe(scope: Scope) -> None:
    """Add an endpoint that asks for a scope and says who calls."""

    def probe(caller: Caller = Security(admitted, scopes=[scope])) -> str:  # noqa: B008 - as FastAPI reads it
        return caller.name

    probe_router.get(f"/probe/{scope}")(probe)


for each_scope in sorted(SCOPES):
    add_probe(each_scope)


@pytest.fixture
def guarded(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """Return a client of the service with an endpoint for each scope, and a token for each role."""
    monkeypatch.setattr(serving, "ROUTERS", (*serving.ROUTERS, probe_router))
    served = replace(service, tokens=Tokens(service.model.directory, per_minute=100))
    with TestClient(build_app(served), base_url=LOOPBACK, raise_server_exceptions=False) as made:
        yield made


def tokens_of(client: TestClient) -> Tokens:
    found: Tokens = client.app.state.service.tokens  # type: ignore[attr-defined]
    return found


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_what_its_scopes_say_and_nothing_else(guarded: TestClient, role: Role) -> None:
    _, text = tokens_of(guarded).add("anna", role)
    found = {scope: guarded.get(f"/probe/{scope}", headers=bearer(text)).status_code for scope in SCOPES}
    assert found == {scope: 200 if scope in ROLES[role] else 403 for scope in SCOPES}


def scopes_of(found: Dependant) -> set[str]:
    own = {*found.own_oauth_scopes} if found.own_oauth_scopes else set[str]()
    return own.union(*map(scopes_of, found.dependencies))


def endpoints(app: FastAPI) -> dict[tuple[str, str], set[str]]:
    """Return the scopes that each method and path asks for, but for what is open to all."""
    return {
        (method, str(route.path)): scopes_of(route.dependant)
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ("GET",)
        if not (route.path in OPEN or str(route.path).startswith("/console"))
    }


def listed() -> dict[str, set[str]]:
    """Return the scope of each call, as the service's page lists them."""
    table = PAGE.read_text().partition("<!-- table: calls -->")[2].partition("<!-- end of table -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    return {call: {scope} for scope, calls in rows for call in re.findall("`(.+?)`", calls)}


def test_every_endpoint_asks_for_the_scope_that_the_page_lists(service: Service) -> None:
    found = {
        f"{method} {re.sub('{.+?}', 'ID', path)}": wanted
        for (method, path), wanted in endpoints(build_app(service)).items()
    }
    assert found == listed()


def test_whoever_decides_does_not_erase() -> None:
    changing = {role: scopes & {"submit", "decide", "erase"} for role, scopes in ROLES.items()}
    assert changing["reader"] == set()
    assert changing["officer"] == {"submit", "decide"}
    assert changing["operator"] == {"submit", "erase"}


def test_every_endpoint_refuses_whoever_lacks_its_scope(guarded: TestClient) -> None:
    tokens = tokens_of(guarded)
    callers = {role: tokens.add(role, role)[1] for role in ROLES}
    app = guarded.app
    assert isinstance(app, FastAPI)
    for (method, path), wanted in endpoints(app).items():
        for headers in ({}, bearer("sisa_forged")):  # 429: after many failures
            assert guarded.request(method, path, headers=headers).status_code in (401, 429), path
        for role, text in callers.items():
            if not wanted <= ROLES[role]:
                found = guarded.request(method, path, headers=bearer(text))
                assert found.status_code == 403, (method, path, role)
                assert found.headers["content-type"].split(";")[0].endswith("json")


@pytest.mark.parametrize("path", ["/probe/read", "/v1/nothing"])
def test_a_refusal_quotes_no_token(guarded: TestClient, path: str) -> None:
    tokens_of(guarded).add("anna", "reader")
    found = guarded.get(path, headers=bearer("sisa_secret-of-somebody"))
    assert found.status_code in (401, 404)
    assert "somebody" not in found.text + str(found.headers)


def test_a_token_that_calls_too_often_waits_and_others_do_not(guarded: TestClient) -> None:
    texts = [tokens_of(guarded).add(name, "reader")[1] for name in ("anna", "ben")]
    found = [guarded.get("/probe/read", headers=bearer(texts[0])) for _ in range(101)]
    assert [each.status_code for each in found] == [200] * 100 + [429]
    assert 1 <= int(found[-1].headers["retry-after"]) <= 60
    assert guarded.get("/probe/read", headers=bearer(texts[1])).status_code == 200


def test_the_owner_of_the_directory_is_not_limited(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path, per_minute=1, owner=hashlib.sha256(b"in service.json").hexdigest())
    assert tokens.caller("another") is None
    caller = tokens.caller("in service.json")
    assert caller is LOCAL
    for _ in range(3):
        tokens.check_rate(caller)


def test_an_address_that_fails_too_often_is_told_so_and_locks_nobody_out(guarded: TestClient) -> None:
    _, text = tokens_of(guarded).add("anna", "reader")
    found = [
        guarded.get("/probe/read", headers=bearer(f"sisa_{number}")).status_code
        for number in range(FAILURES_PER_MINUTE + 5)
    ]
    assert found == [401] * FAILURES_PER_MINUTE + [429] * 5
    assert guarded.get("/probe/read", headers=bearer(text)).json() == "anna"


def test_the_first_token_closes_the_door_and_a_lost_file_opens_none(guarded: TestClient) -> None:
    tokens = tokens_of(guarded)
    assert guarded.get("/probe/operate").json() == LOCAL.name
    _, text = tokens.add("anna", "reader")
    assert guarded.get("/probe/read").status_code == 401
    assert guarded.get("/probe/read", headers=bearer(text)).json() == "anna"
    tokens.revoke("anna")
    assert guarded.get("/probe/read", headers=bearer(text)).status_code == 401
    (guarded.app.state.service.model.directory / TOKENS).unlink()  # type: ignore[attr-defined]
    assert guarded.get("/probe/read").status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9"])
def test_without_tokens_no_page_of_another_site_acts_for_whoever_sits_here(
    monkeypatch: pytest.MonkeyPatch, service: Service, origin: str
) -> None:
    monkeypatch.setattr(serving, "ROUTERS", (*serving.ROUTERS, probe_router))
    with TestClient(build_app(service), base_url=LOOPBACK) as here:
        assert here.get("/probe/operate", headers={"origin": origin}).status_code == 403
        assert here.get("/probe/operate", headers={"origin": LOOPBACK}).json() == LOCAL.name


def test_the_document_says_how_to_send_a_token(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    (needed,) = document["paths"]["/probe/read"]["get"]["security"]
    assert [*needed.values()] == [["read"]]


# --- where it may listen


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org"])  # noqa: S104
def test_other_machines_are_not_listened_to_without_an_active_token(
    tokens: Tokens, clock: Clock, host: str
) -> None:
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        tokens.check_listening(loopback)
    with pytest.raises(ConfigConflict, match="no token is active"):
        tokens.check_listening(host)
    tokens.add("anna", "reader")
    tokens.check_listening(host)
    clock.now += timedelta(days=DAYS)
    with pytest.raises(ConfigConflict, match="no token is active"):
        tokens.check_listening(host)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Return a certificate for 127.0.0.1 and its key."""
    return certified(tmp_path_factory.mktemp("tls"))


def test_tls_takes_a_certificate_and_a_key_that_its_owner_alone_reads(certificate: Tls) -> None:
    assert tls_files(None) == {}
    found = tls_files(certificate)
    assert found == {"ssl_certfile": str(certificate.cert), "ssl_keyfile": str(certificate.key)}
    certificate.key.chmod(0o640)
    with pytest.raises(InvalidInput, match="TLS") as error:
        tls_files(certificate)
    assert "640" in error.value.got
    certificate.key.chmod(0o600)


def test_tls_refuses_files_that_do_not_fit(certificate: Tls, tmp_path: Path) -> None:
    sealed = certified(tmp_path, "-passout", "pass:secret")
    wrong = [
        sealed,
        Tls(cert=certificate.cert, key=sealed.key),
        Tls(cert=certificate.key, key=certificate.key),
        Tls(cert=tmp_path / "none.pem", key=certificate.key),
        Tls(cert=certificate.cert, key=tmp_path / "none.pem"),
    ]
    for each in wrong:
        with pytest.raises(InvalidInput, match="TLS can't be used") as error:
            tls_files(each)
        assert error.value.got
