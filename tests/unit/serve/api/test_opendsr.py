"""OpenDSR's vocabulary: what is served is signed, and what can't be served is refused clearly."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from fastapi.testclient import TestClient

from cluster.serve.api import opendsr as opendsr_api
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.state import ServiceState
from cluster.serve.tokens import Role, Tokens
from cluster.serve.webhooks import Courier
from sisa.config.config import OpenDsrBlock, ServiceBlock, WebhookReceiver
from sisa.config.runfile import parse_run_file
from sisa.evidence.keys.keys import create_keys
from sisa.flows.requests import Terms
from sisa.flows.wiring import wiring
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.model import open_model
from tests.fakes.answers import FakeAnswers
from tests.fakes.ports import fake_record
from tests.models.confessing import RUN_FILE, train_in

DOMAIN, CALLBACK = "model.example", "https://controller.example/callbacks"
NAME = "a7551968-d5d6-44b2-9831-815ac9017798"
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "model"
    records = [fake_record(number, f"subject-{number % 4}") for number in range(12)]
    train_in(directory, parse_run_file(RUN_FILE, "run.yaml"), records)
    return directory


def block(folder: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> OpenDsrBlock:
    """Return the block of a self-signed certificate."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DOMAIN)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    (folder / "cert.pem").write_bytes(
        made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (folder / "key.pem").write_bytes(key.private_bytes(*form, serialization.NoEncryption()))
    (folder / "key.pem").chmod(0o600)
    return OpenDsrBlock(
        domain=DOMAIN,
        controller_id="acme",
        certificate=folder / "cert.pem",
        key=folder / "key.pem",
        callback_hosts=("controller.example",),
    )


@pytest.fixture
def service(
    request: pytest.FixtureRequest, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Service:
    by_rsa = getattr(request, "param", "") == "rsa"
    key = rsa.generate_private_key(65537, 2048) if by_rsa else ec.generate_private_key(ec.SECP256R1())
    model = open_model(bare)
    settings = ServiceBlock(opendsr=block(tmp_path, key))
    config = model.config.model_copy(update={"service": settings})
    monkeypatch.setattr(model, "config", config)
    monkeypatch.setattr(model, "_refresh", lambda: None)
    return Service(model, FakeAnswers(), tokens=None, settings=settings)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_app(service), base_url="http://127.0.0.1") as made:
        yield made


def asked(**changed: Any) -> dict[str, Any]:
    identity = {
        "identity_type": "controller_customer_id",
        "identity_value": "subject-1",
        "identity_format": "raw",
    }
    return {
        "regulation": "gdpr",
        "subject_request_id": NAME,
        "subject_request_type": "erasure",
        "submitted_time": NOW.isoformat(),
        "subject_identities": [identity],
        "api_version": "1.0",
        "status_callback_urls": [CALLBACK],
        "extensions": {DOMAIN: {"property_id": "1"}},
        **changed,
    }


def verify(client: TestClient, body: bytes, headers: Any) -> dict[str, Any]:
    """Check a signature as a controller does: by the certificate that discovery names."""
    assert headers["X-OpenDSR-Processor-Domain"] == DOMAIN
    where = client.get("/opendsr/discovery").json()["processor_certificate"]
    assert where == f"http://{DOMAIN}/opendsr/certificate"
    key = x509.load_pem_x509_certificate(client.get("/opendsr/certificate").content).public_key()
    signature = base64.b64decode(headers["X-OpenDSR-Signature"])
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, body, padding.PKCS1v15(), hashes.SHA256())
    else:
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, body, ec.ECDSA(hashes.SHA256()))
    found: dict[str, Any] = json.loads(body)
    return found


@pytest.mark.parametrize("service", ["rsa", "ec"], indirect=True)
def test_an_erasure_from_receipt_to_callback(client: TestClient, service: Service) -> None:
    got: list[tuple[str, bytes, Any]] = []
    courier = Courier(service.model, lambda *given: got.append(given) or 202)  # type: ignore[func-returns-value]
    courier.turn()
    response = client.post("/opendsr/requests", json=asked())
    assert response.status_code == 201
    made = verify(client, response.content, response.headers)
    assert json.loads(base64.b64decode(made["encoded_request"])) == asked()
    assert (made["controller_id"], made["subject_request_id"]) == ("acme", NAME)
    assert client.post("/opendsr/requests", json=asked()).status_code == 201  # the same request
    response = client.get(f"/opendsr/requests/{NAME}")
    status = verify(client, response.content, response.headers)
    assert (status["request_status"], status["received_time"]) == ("pending", made["received_time"])
    service.model.decide(NAME, "approved", by="dpo")
    service.model.run()
    courier.turn()
    assert client.get(f"/opendsr/requests/{NAME}").json()["request_status"] == "completed"
    said = [verify(client, body, headers) for _, body, headers in got]
    assert [each["request_status"] for each in said] == ["pending", "in_progress", "completed"]
    assert {(url, each["status_callback_url"]) for (url, _, _), each in zip(got, said, strict=True)} == {
        (CALLBACK, CALLBACK)
    }
    assert client.delete(f"/opendsr/requests/{NAME}").status_code == 409


def test_without_the_block_callbacks_are_given_up_and_webhooks_go_on(
    client: TestClient, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[str] = []

    def post(url: str, *_: object) -> int:
        got.append(url)
        return 0 if url == CALLBACK else 202

    courier = Courier(service.model, post)
    courier.turn()
    client.post("/opendsr/requests", json=asked())
    courier.turn()
    secret = tmp_path / "hook.secret"
    secret.write_text("whsec_c2VjcmV0IG9mIGEgdGVzdA==")
    secret.chmod(0o600)
    hooks = (WebhookReceiver(url="https://dpo.example/", secret_file=secret),)
    changed = service.model.config.model_copy(update={"service": ServiceBlock(webhooks=hooks)})
    monkeypatch.setattr(service.model, "config", changed)
    service.model.decide(NAME, "cancelled", "a mistake")
    courier.turn()
    assert got == [CALLBACK, "https://dpo.example/"]
    assert ServiceState(service.model.directory).waiting() == []


def test_the_status_says_when_a_late_letter_arrived(client: TestClient, service: Service) -> None:
    day = (datetime.now(UTC).date() - timedelta(days=20)).isoformat()
    terms = Terms(external_id=NAME, received_on=day)
    made = service.model.submit(subject="subject-1", terms=terms).request
    status = client.get(f"/opendsr/requests/{NAME}").json()
    assert status["received_time"] == f"{day}T00:00:00+00:00"
    assert status["expected_completion_time"] == f"{made.due}T23:59:59Z"


def test_the_term_counts_from_the_day_on_which_the_person_asked(
    client: TestClient, service: Service
) -> None:
    sent = asked(submitted_time="2020-01-31T23:30:00-05:00")
    made = client.post("/opendsr/requests", json=sent).json()
    found = service.model.request(NAME).request
    assert (found.reason, found.received_on, found.due) == ("OpenDSR", "2020-02-01", "2020-03-01")
    assert made["expected_completion_time"] == "2020-03-01T23:59:59Z"
    received = datetime.fromisoformat(found.created_at).isoformat(timespec="seconds")
    status = client.get(f"/opendsr/requests/{NAME}").json()
    assert made["received_time"] == status["received_time"] == received  # when it came here


def test_a_clock_that_is_a_little_ahead_at_midnight_delays_no_due_date(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    midnight = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)
    monkeypatch.setattr(wiring, "_now", midnight.isoformat)
    monkeypatch.setattr(opendsr_api, "datetime", SimpleNamespace(now=lambda _: midnight))
    sent = asked(submitted_time="2026-02-01T00:03:00Z")
    made = client.post("/opendsr/requests", json=sent).json()
    assert made["expected_completion_time"] == "2026-02-28T23:59:59Z"
    later = asked(submitted_time="2026-02-01T00:05:00Z", subject_request_id=NAME.replace("a7", "b7"))
    assert client.post("/opendsr/requests", json=later).status_code == 400


def test_a_pending_request_is_cancelled(client: TestClient) -> None:
    client.post("/opendsr/requests", json=asked(regulation="ccpa"))
    assert client.get(f"/requests/{NAME}").json()["regime"] == "delete-act"
    response = client.delete(f"/opendsr/requests/{NAME}")
    assert response.status_code == 202
    assert verify(client, response.content, response.headers)["subject_request_id"] == NAME
    assert client.get(f"/opendsr/requests/{NAME}").json()["request_status"] == "cancelled"


@pytest.mark.parametrize("kind", ["access", "portability"])
def test_what_is_held_of_a_person_is_handed_out_once(
    client: TestClient, service: Service, kind: str
) -> None:
    model, got = service.model, list[tuple[str, bytes, Any]]()
    create_keys(evidence_keys_dir(model.config, model.id), model.id)
    courier = Courier(model, lambda *given: got.append(given) or 202)  # type: ignore[func-returns-value]
    courier.turn()
    for _ in range(2):  # the same request
        response = client.post("/opendsr/requests", json=asked(subject_request_type=kind))
        assert response.status_code == 201, response.text
    made = verify(client, response.content, response.headers)
    assert made["expected_completion_time"] == made["received_time"]
    response = client.get(f"/opendsr/requests/{NAME}")
    status = verify(client, response.content, response.headers)
    assert status["request_status"] == "completed"
    assert status["received_time"] == made["received_time"]
    assert status["results_url"] == f"http://{DOMAIN}/opendsr/requests/{NAME}/results"
    courier.turn()
    ((url, body, headers),) = got
    del status["api_version"]
    assert verify(client, body, headers) == {**status, "status_callback_url": url}
    assert b"subject-1" not in (model.directory / "service.sqlite").read_bytes()

    response = client.get(urlsplit(status["results_url"]).path)
    assert response.headers["Log-Entry"]
    found = verify(client, response.content, response.headers)
    expected = client.post("/rights/access", json={"subject": "subject-1"}).json()
    drawn = {"salt": "", "made_at": ""}
    assert {**found, **drawn} == {**expected, **drawn}
    assert found["records"] != []
    assert client.get(f"/opendsr/requests/{NAME}/results").status_code == 409
    after = client.get(f"/opendsr/requests/{NAME}").json()
    assert (after["request_status"], "results_url" in after) == ("completed", False)


def test_a_request_for_access_asks_for_no_decision(client: TestClient, service: Service) -> None:
    """It is listed nowhere, can't be cancelled, and keeps its name for itself."""
    client.post("/opendsr/requests", json=asked(subject_request_type="access"))
    assert client.get("/requests").json() == {"requests": []}
    assert client.delete(f"/opendsr/requests/{NAME}").status_code == 409
    for others in ("erasure", "portability"):
        assert (
            client.post("/opendsr/requests", json=asked(subject_request_type=others)).status_code == 409
        )
    another = NAME.replace("a7", "b7")
    client.post("/opendsr/requests", json=asked(subject_request_id=another))
    wanted = asked(subject_request_id=another, subject_request_type="access")
    assert client.post("/opendsr/requests", json=wanted).status_code == 409
    for unknown in ("", "/results"):
        assert client.get(f"/opendsr/requests/{NAME.replace('a7', 'c7')}{unknown}").status_code == 404
    service.model.forget(subject="subject-1")
    left = client.get(f"/opendsr/requests/{NAME}/results").json()
    assert (left["subject"], left["records"], len(left["deleted"])) == (None, [], 3)


def test_who_may_open_the_results(service: Service) -> None:
    model, tokens = service.model, Tokens(service.model.directory)
    shard = model.where([fake_record(1).id])[0].shard

    def bearer(name: str, role: Role, shards: list[int] | None = None) -> dict[str, str]:
        partition = model.partition if shards else ""
        return {
            "Authorization": f"Bearer {tokens.add(name, role, shards=shards, partition=partition)[1]}"
        }

    operator, own = bearer("operator", "operator"), bearer("own", "officer", [shard])
    others = bearer("others", "officer", [1 - shard])
    guarded = replace(service, tokens=Tokens(model.directory))
    with TestClient(build_app(guarded), base_url="http://127.0.0.1") as client:
        wanted, where = asked(subject_request_type="access"), f"/opendsr/requests/{NAME}"
        assert client.post("/opendsr/requests", json=wanted, headers=operator).status_code == 201
        assert client.get(where, headers=operator).status_code == 200
        assert client.get(f"{where}/results", headers=operator).status_code == 403
        for path in (where, f"{where}/results"):
            assert client.get(path, headers=others).status_code == 404
            assert client.get(path, headers=own).status_code == 200


IDENTITY = asked()["subject_identities"][0]
NOBODY = {**IDENTITY, "identity_value": "nobody"}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"subject_request_type": "rectification"}, 422),
        ({"subject_request_type": "access", "subject_identities": [NOBODY]}, 404),
        ({"subject_identities": [{**IDENTITY, "identity_type": "email"}]}, 400),
        ({"subject_identities": [{**IDENTITY, "identity_format": "sha256"}]}, 400),
        ({"subject_identities": [IDENTITY, {**IDENTITY, "identity_value": "subject-2"}]}, 400),
        ({"subject_identities": [NOBODY]}, 404),
        ({"status_callback_urls": ["http://controller.example/"]}, 400),
        ({"status_callback_urls": ["https://169.254.169.254/"]}, 400),
        ({"status_callback_urls": ["https://a@controller.example/"]}, 400),
        ({"subject_request_id": "T-1"}, 422),
        ({"submitted_time": (NOW + timedelta(days=2)).isoformat()}, 400),
        ({"submitted_time": "2018-05-24T23:00:00Z"}, 400),
        ({"submitted_time": "2026-01-30T15:00:00"}, 422),
        ({"regulation": "lgpd"}, 422),
    ],
)
def test_what_cannot_be_served_is_refused(
    client: TestClient, changed: dict[str, Any], status: int
) -> None:
    response = client.post("/opendsr/requests", json=asked(**changed))
    assert response.status_code == status, response.text
    assert "nobody" not in response.text
    assert client.get("/requests").json() == {"requests": []}


def test_without_keys_there_is_no_opendsr(service: Service) -> None:
    without = Service(service.model, service.answers, None, ServiceBlock())
    with TestClient(build_app(without), base_url="http://127.0.0.1") as client:
        for path in ("discovery", "certificate", f"requests/{NAME}"):
            response = client.get(f"/opendsr/{path}")
            assert response.status_code == 404
            assert "service.opendsr" in response.json()["next_step"]
