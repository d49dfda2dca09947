"""California's DROP over HTTP: a ZIP in, its responses out; scopes, and what is refused."""

from __future__ import annotations

import zipfile
from io import BytesIO

from fastapi.testclient import TestClient

HASH = "KA18MT/ph6IHYjzT9zwETySDQyvSh87YuoSBpOQtkhE="
EMAIL = "20260812_4821_Email"
ZIP = {"Content-Type": "application/octet-stream"}


def zipped(rows: str) -> bytes:
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(f"{EMAIL}.csv", f"ID,Hash\n{rows}")
    return held.getvalue()


def test_a_cycle_over_http_ends_in_responses_to_upload(client: TestClient) -> None:
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
