"""California's DROP over HTTP: a ZIP in, its responses out; scopes, and what is refused."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import ROLES, Role, Tokens
from tests.unit.serve.conftest import LOOPBACK

HASH = "KA18MT/ph6IHYjzT9zwETySDQyvSh87YuoSBpOQtkhE="
EMAIL = "20260812_4821_Email"
ZIP = {"Content-Type": "application/octet-stream"}


def zipped(rows: str) -> bytes:
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(f"{EMAIL}.csv", f"ID,Hash\n{rows}")
    return held.getvalue()


def test_a_cycle(client: TestClient) -> None:
    assert client.get("/rights/drop").json()["standing"] is None
    done = client.post("/rights/drop/import", content=zipped(f"A7kP2xQ9Lm4R,{HASH}\n"), headers=ZIP)
    assert (done.status_code, done.json()["new"], done.json()["not_found"]) == (200, 1, 1)
    standing = client.get("/rights/drop").json()["standing"]
    assert (standing["next_access"], standing["open"]) == ("2026-09-26", 1)
    said = client.post("/rights/drop/report", json={}).json()
    assert said["upload"] == {f"{EMAIL}.csv": "Id,Status\nA7kP2xQ9Lm4R,5\n"}
    assert (said["amend"], said["statuses"], said["open"]) == ({}, {"5": 1}, 0)
    lost = client.post("/rights/drop/report", json={"again": True}).json()
    assert list(lost["upload"].values()) == list(said["upload"].values())


def test_a_broken_download_is_refused_whole(client: TestClient) -> None:
    rows = f"A7kP2xQ9Lm4R,{HASH}\nB7kP2xQ9Lm4R,{HASH[1:]}\n"
    for content in (zipped(rows), b"no ZIP", b""):
        found = client.post("/rights/drop/import", content=content, headers=ZIP)
        assert found.status_code in (400, 422)
        assert "7kP2" not in found.text
        assert HASH[1:] not in found.text
    problems = client.post("/rights/drop/import", content=zipped(rows), headers=ZIP).json()["problems"]
    assert [each["where"] for each in problems] == [f"{EMAIL}.csv, line 3"]
    assert client.get("/rights/drop").json()["standing"] is None


@pytest.mark.parametrize("role", ROLES)
def test_who_may(service: Service, tmp_path: Path, role: Role) -> None:
    tokens = Tokens(tmp_path / "model")
    _, text = tokens.add("somebody", role)
    bearer = {"Authorization": f"Bearer {text}"}
    with TestClient(build_app(replace(service, tokens=tokens)), base_url=LOOPBACK) as client:
        asked = {
            "read": client.get("/rights/drop", headers=bearer),
            "submit": client.post("/rights/drop/import", content=zipped(""), headers=ZIP | bearer),
            "decide": client.post("/rights/drop/report", json={}, headers=bearer),
        }
        none = client.get("/rights/drop")
    assert {scope: each.status_code for scope, each in asked.items()} == {
        scope: 200 if scope in ROLES[role] else 403 for scope in asked
    }
    assert none.status_code == 401
