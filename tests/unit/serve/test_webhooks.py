"""Changes of requests are reported, signed, at least once, whoever made them and whenever."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response
from standardwebhooks.webhooks import Webhook

from cluster.serve.domain import Service
from cluster.serve.state import ServiceState
from cluster.serve.webhooks import RETRY_S, Courier, post_message, secrets_of
from sisa.config.config import ServiceBlock, WebhookReceiver
from sisa.core.errors import InvalidInput
from sisa.flows.requests import Terms
from sisa.model import Model, open_model
from tests.models.programs.local_server import served

SECRET = "whsec_" + base64.b64encode(b"a secret of a test").decode()
URL, OTHER = "https://dpo.example/hooks", "https://other.example/"
RECORD = "id-0003"


@dataclass
class Receivers:
    """Receivers that answer as they are told, and what they got."""

    statuses: dict[str, int] = field(default_factory=dict)
    got: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)

    def __call__(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        self.got.append((url, body, dict(headers)))
        return self.statuses.get(url, 204)

    def states(self, url: str = URL) -> list[str]:
        return [json.loads(body)["data"]["state"] for to, body, _ in self.got if to == url]


@dataclass
class Clock:
    at: float = field(default_factory=lambda: datetime.now(UTC).timestamp())

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def model(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Return a model whose run file names two receivers."""
    path = tmp_path / "hook.secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    receivers = (
        WebhookReceiver(url=URL, secret_file=path),
        WebhookReceiver(url=OTHER, secret_file=path, events=("completed",)),
    )
    model = service.model
    config = model.config.model_copy(update={"service": ServiceBlock(webhooks=receivers)})
    monkeypatch.setattr(model, "config", config)
    monkeypatch.setattr(model, "_refresh", lambda: None)
    return model


@pytest.fixture
def receivers() -> Receivers:
    return Receivers()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def courier(model: Model, receivers: Receivers, clock: Clock) -> Courier:
    """Return a courier that has seen what was there before."""
    found = Courier(model, receivers, clock)
    assert found.turn() == 0
    return found


def submit(model: Model) -> None:
    model.submit([RECORD], terms=Terms(external_id="T-1", reason="words of a person"))


def test_every_change_is_reported_in_order_also_of_commands_and_while_nobody_served(
    model: Model, courier: Courier, receivers: Receivers, clock: Clock
) -> None:
    command = open_model(model.directory)
    submit(command)
    assert courier.turn() == 1
    command.decide("T-1", "approved", by="dpo")
    command.run()
    again = Courier(model, receivers, clock)  # a service that is started later
    again.turn()
    life = ["received", "approved", "committed", "rolled_back", "erased", "retrained", "completed"]
    assert receivers.states() == life
    assert receivers.states(OTHER) == ["completed"]
    assert again.turn() == 0
    ids = [headers["webhook-id"] for to, _, headers in receivers.got if to == URL]
    assert len(set(ids)) == len(life)
    for _, body, _ in receivers.got:
        assert b"id-0" not in body
        assert b"words" not in body


def test_a_failing_receiver_is_tried_again_in_order_and_holds_up_no_other(
    model: Model, courier: Courier, receivers: Receivers, clock: Clock
) -> None:
    receivers.statuses[URL] = 503
    submit(model)
    model.decide("T-1", "approved", by="dpo")
    model.run()
    courier.turn()
    assert receivers.states() == ["received"]
    assert receivers.states(OTHER) == ["completed"]
    courier.turn()
    assert receivers.states() == ["received"]  # not before its time
    for wait in RETRY_S[:2]:
        clock.at += wait
        courier.turn()
    assert receivers.states() == ["received"] * 3
    tried = [headers for url, _, headers in receivers.got if url == URL]
    for name, number in (("webhook-id", 1), ("webhook-timestamp", 3), ("webhook-signature", 3)):
        assert len({each[name] for each in tried}) == number
    receivers.statuses[URL] = 200
    clock.at += RETRY_S[2]
    assert courier.turn() == 7
    assert receivers.states()[3:5] == ["received", "approved"]


@pytest.mark.parametrize("status", [410, 0])
def test_a_message_is_given_up(
    model: Model, courier: Courier, receivers: Receivers, clock: Clock, status: int
) -> None:
    receivers.statuses[URL] = status
    submit(model)
    courier.turn()
    for wait in RETRY_S:
        clock.at += wait
        courier.turn()
    assert len(receivers.got) == (1 if status == 410 else 1 + len(RETRY_S))
    assert ServiceState(model.directory).waiting() == []
    with ServiceState(model.directory)._tables() as db:
        assert db.execute("SELECT count(*) FROM queue WHERE due IS NULL").fetchone() == (1,)
    model.decide("T-1", "cancelled")
    courier.turn()
    assert receivers.states()[-1] == "cancelled"


def test_a_receiver_that_the_run_file_names_no_more_gets_nothing_more(
    model: Model,
    courier: Courier,
    receivers: Receivers,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receivers.statuses[URL] = 500
    submit(model)
    courier.turn()
    rest = ServiceBlock(webhooks=model.config.service.webhooks[1:])
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"service": rest}))
    clock.at += RETRY_S[0]
    courier.turn()
    assert receivers.states() == ["received"]
    assert ServiceState(model.directory).waiting() == []


def test_a_crash_between_delivery_and_its_note_delivers_again_under_the_same_id(
    model: Model, courier: Courier, receivers: Receivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(model)
    monkeypatch.setattr(ServiceState, "delivered", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        courier.turn()
    monkeypatch.undo()
    ids = {receivers.got[0][2]["webhook-id"]}
    state = ServiceState(model.directory)
    assert [each.id for each in state.waiting()] == [*ids]


def test_a_receiver_checks_what_it_gets_by_either_of_two_secrets(
    model: Model, courier: Courier, receivers: Receivers, tmp_path: Path
) -> None:
    new = "whsec_" + base64.b64encode(b"the next secret").decode()
    (tmp_path / "hook.secret").write_text(f"{new}\n{SECRET}\n")
    submit(model)
    courier.turn()
    ((_, body, headers),) = receivers.got
    for secret in (new, SECRET):  # one replaces the other
        found = Webhook(secret).verify(body, headers)
        assert (found["type"], found["data"]["external_id"]) == ("request.received", "T-1")


@pytest.mark.parametrize(("text", "mode"), [(SECRET, 0o644), ("", 0o600), ("whsec_!", 0o600)])
def test_a_secret_that_cannot_be_used_is_refused(tmp_path: Path, text: str, mode: int) -> None:
    path = tmp_path / "hook.secret"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(InvalidInput, match="webhook"):
        secrets_of(WebhookReceiver(url=URL, secret_file=path))


def test_messages_go_by_http_and_follow_no_redirect() -> None:
    got, app = list[tuple[str, bytes]](), FastAPI()

    @app.post("/{path}")
    async def take(path: str, request: Request) -> Response:
        got.append((path, await request.body()))
        return Response(status_code=307 if path == "moved" else 200, headers={"Location": "/"})

    with served(app) as url:
        assert post_message(f"{url}/hook", b"{}", {"webhook-id": "a"}) == 200
        assert post_message(f"{url}/moved", b"{}", {}) == 307
    assert got == [("hook", b"{}"), ("moved", b"{}")]
    assert post_message("http://127.0.0.1:1/", b"{}", {}) == 0
