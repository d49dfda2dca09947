"""Requests over HTTP: taken in, decided and proved, once for each idempotency key."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.runner import carry_out_requests
from cluster.serve.tokens import Tokens
from sisa.audit.garbage import KEPT_FILES
from sisa.flows.wiring.ledger_place import LOCK
from sisa.flows.wiring.upper_houses import SERVICE_STATE
from sisa.store.blobs.files import writer_lock
from tests.fakes.ports import fake_record
from tests.unit.serve.conftest import LOOPBACK

ONE, OTHER = "id-0003", "id-0004"
ASKED = ("/requests", "/requests/plan")
KEY = {"Idempotency-Key": "8f4a"}


def submit(client: TestClient, expect: int = 201, **body: Any) -> dict[str, Any]:
    response = client.post("/requests", json=body)
    assert response.status_code == expect, response.text
    found: dict[str, Any] = response.json()
    return found


def move(client: TestClient, name: str, move: str, expect: int = 200, **body: Any) -> dict[str, Any]:
    response = client.post(f"/requests/{name}/{move}", json=body)
    assert response.status_code == expect, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_request_from_receipt_to_deletion(client: TestClient, service: Service) -> None:
    made = submit(client, ids=[ONE], external_id="T-1", reason="by letter")
    assert (made["state"], made["num_records"], made["copies"], made["near"]) == ("received", 1, [], [])
    assert client.get("/requests", params={"state": "received"}).json()["requests"][0] == {
        key: each for key, each in made.items() if key not in ("copies", "near")
    }
    assert move(client, "T-1", "extend", reason="difficult")["extension"] == "difficult"
    assert move(client, "T-1", "hold", reason="a court")["state"] == "held"
    approved = move(client, "T-1", "approve")
    assert (approved["state"], approved["approver"]) == ("approved", "local")
    assert client.get(f"/records/{ONE}/shards").json()["state"] == "trained"
    response = client.post("/requests/run", json={})
    assert (response.status_code, response.json()) == (202, {"requests": [made["request_id"]]})
    assert carry_out_requests(service.model, plan=False)
    found = client.get("/requests/T-1").json()
    assert found["state"] == "completed"
    assert [each["note"].partition(": ")[0] for each in found["events"][1:4]] == ["local"] * 3
    assert [each["state"] for each in found["events"]][-1] == "completed"
    where = client.get(f"/records/{ONE}/shards").json()
    assert (where["state"], where["request_id"]) == ("deleted", made["request_id"])
    refused = move(client, "T-1", "cancel", expect=409)
    assert refused["type"].endswith("ConfigConflict")


def test_a_letter_that_lay_too_long_is_overdue_from_the_start(client: TestClient) -> None:
    today = datetime.now(UTC).date()
    days = [(today + timedelta(days=each)).isoformat() for each in (-35, 1)]
    made = submit(client, ids=[ONE], received_on=days[0])
    assert (made["received_on"], made["days_left"] < 0) == (days[0], True)
    shown = client.get(f"/requests/{made['request_id']}").json()
    assert (shown["received_on"], shown["days_left"]) == (days[0], made["days_left"])
    refused = submit(client, expect=400, ids=[OTHER], received_on=days[1])
    assert refused["detail"] == "the day of receipt is in the future"


def test_requests_are_taken_in_while_another_process_writes(
    client: TestClient, service: Service
) -> None:
    with writer_lock(service.model.directory / LOCK):
        submit(client, ids=[ONE], external_id="T-1")
        assert move(client, "T-1", "deny", reason="not the person")["state"] == "denied"


def test_find_proposes_records_and_shows_no_text(client: TestClient) -> None:
    text = fake_record(3).text
    found = client.post("/find", json={"text": text, "top": 3}).json()["candidates"]
    assert (found[0]["id"], len(found)) == (ONE, 3)
    assert set(found[0]) == {"id", "score", "shard", "slice", "match", "subject"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        *((path, {"ids": ["id-9999"]}, 404) for path in ASKED),
        *((path, {"subject": "nobody"}, 404) for path in ASKED),
        *((path, {}, 422) for path in ASKED),
        *((path, {"ids": [ONE], "subject": "a"}, 422) for path in ASKED),
        *((path, {"ids": ONE}, 422) for path in ASKED),
        *((path, {"id": [ONE]}, 422) for path in ASKED),
        ("/requests", {"ids": [ONE], "approver": "me"}, 422),
        ("/requests", {"ids": [ONE], "due": "2001-01-01"}, 400),
        ("/requests", {"ids": [ONE], "external_id": "a b"}, 422),
        ("/requests", {"ids": [ONE], "external_id": "2026/17"}, 422),
        ("/requests/T-0/approve", {}, 404),
        ("/requests/T-0/deny", {}, 422),
        ("/requests/T-0/receipt", {"id": ONE}, 404),
        ("/find", {"text": "a", "like": ONE}, 422),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    client: TestClient, path: str, body: dict[str, Any], status: int
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert "id-9999" not in response.text
    assert client.get("/requests").json() == {"requests": []}


def test_a_key_is_used_once(client: TestClient) -> None:
    first = client.post("/requests", json={"ids": [ONE]}, headers=KEY)
    again = client.post("/requests", json={"ids": [ONE]}, headers=KEY)
    assert (first.status_code, first.json()) == (again.status_code, again.json())
    other = client.post("/requests", json={"ids": [OTHER]}, headers=KEY)
    assert other.status_code == 422
    name = first.json()["request_id"]
    assert client.post(f"/requests/{name}/approve", json={}, headers=KEY).status_code == 422
    key = {"Idempotency-Key": "another"}
    approved = client.post(f"/requests/{name}/approve", json={}, headers=key).json()
    move(client, name, "hold", reason="a court")
    again = client.post(f"/requests/{name}/approve", json={}, headers=key)
    assert again.status_code == 200
    assert (approved["state"], again.json()["state"]) == ("approved", "held")  # it is not approved again
    assert len(client.get("/requests").json()["requests"]) == 1


def test_a_key_whose_call_was_cut_short_makes_no_second_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.serve.state.ServiceState.end", lambda *_: 1 / 0)
    assert client.post("/requests", json={"ids": [ONE]}, headers=KEY).status_code == 500
    monkeypatch.undo()
    again = client.post("/requests", json={"ids": [ONE]}, headers=KEY)
    assert again.status_code == 201
    assert len(client.get("/requests").json()["requests"]) == 1


def test_the_state_names_no_record_and_belongs_to_the_model(
    client: TestClient, service: Service
) -> None:
    client.post("/requests", json={"ids": [ONE]}, headers=KEY)
    path = service.model.directory / SERVICE_STATE
    assert path.stat().st_mode & 0o777 == 0o600
    assert ONE.encode() not in path.read_bytes()
    assert SERVICE_STATE in KEPT_FILES


def test_whoever_holds_the_token_is_the_approver(service: Service) -> None:
    tokens = Tokens(service.model.directory)
    headers = {"Authorization": f"Bearer {tokens.add('anna', 'officer')[1]}"}
    with TestClient(build_app(replace(service, tokens=tokens)), LOOPBACK, headers=headers) as client:
        submit(client, ids=[ONE], external_id="T-1")
        assert move(client, "T-1", "approve")["approver"] == "anna"
