"""What buckets of an S3 server do in their own way: versions, refusals, retries and conditional puts."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sisa.core.checkpoint_files import MANIFEST_FILE
from sisa.core.errors import EnvironmentFault, TransientError
from sisa.store.blobs import s3_blobs, s3_client
from sisa.store.blobs.s3_blobs import S3Blobs
from tests.fakes.s3_server import Server, fresh_blobs


@pytest.fixture
def objects(s3: Server) -> S3Blobs:
    """Return a store in a bucket that keeps versions."""
    return fresh_blobs(s3)


def versions(server: Server, blobs: S3Blobs) -> list[tuple[str, bytes | None]]:
    """Return all versions and delete markers below a store, by name."""
    found = server.versions(blobs.bucket).items()
    start = f"{blobs.prefix}/"
    return [(key.removeprefix(start), data) for (key, _), data in found if key.startswith(start)]


def test_one_of_many_writers_of_a_name_is_first(objects: S3Blobs) -> None:
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda n: objects.put_new("a", str(n).encode()), range(4)))
    assert won.count(True) == 1
    assert objects.get("a", "file") == str(won.index(True)).encode()
    assert not objects.put_new("a", b"late")


def test_parts_without_their_manifest_are_no_group(objects: S3Blobs) -> None:
    objects.put("g/weights", b"half")
    (left,) = objects.held()
    assert left != "g"
    assert (objects.get(f"{left}/weights", "file"), objects.num_bytes(left)) == (b"half", 4)
    objects.put_group("g", {"weights": b"whole", MANIFEST_FILE: b"{}"})
    assert objects.held() == {"g"}
    objects.erase([left])  # finished meanwhile: it stays
    assert objects.parts("g") == {"weights", MANIFEST_FILE}
    objects.put("h/weights", b"half")
    objects.erase(objects.held() - {"g"})
    assert objects.held() == {"g"}


def test_no_version_is_left(s3: Server, objects: S3Blobs) -> None:
    objects.put("a", b"old")
    objects.put("a", b"new")
    s3.client().delete_object(Bucket=objects.bucket, Key=f"{objects.prefix}/a")  # a marker over both
    objects.put("a", b"newest")
    assert len(versions(s3, objects)) == 4
    (finding,) = objects.purge(dry_run=True)
    assert (finding.where, finding.why) == (objects.location("a"), "3 old versions: not purged yet")
    assert objects.purge() == ()
    assert versions(s3, objects) == [("a", b"newest")]
    objects.put("a", b"again")
    objects.erase(["a"])
    assert versions(s3, objects) == []


def test_what_a_lock_keeps_is_hidden_and_reported(s3: Server) -> None:
    blobs = S3Blobs(s3.bucket("locked", lock=True), "m", s3.url, "us-east-1")
    until = datetime.now(UTC) + timedelta(days=1)
    locked = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
    s3.client().put_object(Bucket="locked", Key="m/a", Body=b"text", **locked)
    blobs.put("b", b"free")
    blobs.erase(["a", "b"])
    for _ in range(2):  # the marker is not purged: it hides the version
        (kept,) = blobs.purge()
        assert kept.where == blobs.location("a")
        assert kept.why == "1 old versions: AccessDenied"
        assert blobs.held() == frozenset()


def test_versions_that_may_not_be_listed_can_not_be_excluded(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = replace(fresh_blobs(s3), region="eu-west-1")  # a client of its own
    plain = replace(fresh_blobs(s3, versions=False), region="eu-west-1")
    with s3.enforced("reader", ["s3:ListBucketVersions"]) as credentials:
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        for each in (blobs, plain):
            each.put("a", b"text")
            each.erase(["a"])
            assert each.held() == frozenset()
        (kept,) = blobs.purge()
        assert kept.where == blobs.location()
        assert "AccessDenied" in kept.why
        assert plain.purge() == ()  # that bucket never kept any
    assert len(versions(s3, blobs)) == 2
    again = replace(blobs, region="us-east-1")
    assert again.purge() == ()
    assert versions(s3, again) == []


def test_a_refusal_is_typed(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fresh_blobs(s3)
    own.put("a", b"text")
    blobs = replace(own, region="eu-west-2")  # a client of its own
    touches = (blobs.held, lambda: blobs.put("a", b""), lambda: blobs.get("a", "file"), blobs.clear)
    with s3.enforced("nobody", ["s3:*"]) as credentials:
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        for touch in touches:
            with pytest.raises(EnvironmentFault) as caught:
                touch()
            assert caught.value.got == "AccessDenied"
            assert "allow" in caught.value.next_step


def test_an_unknown_bucket_is_an_environment_fault(s3: Server) -> None:
    blobs = S3Blobs("nowhere", "m", s3.url, "us-east-1")
    touches = (blobs.held, lambda: blobs.get("a", "file"), lambda: blobs.put("a", b""), blobs.clear)
    for touch in (*touches, lambda: blobs.erase(["a"])):
        with pytest.raises(EnvironmentFault) as caught:
            touch()
        assert (caught.value.got, caught.value.exit_code) == ("NoSuchBucket", 6)


CUT = 0  # a status of 200 with half of the bytes


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answer with the given statuses, then as a store that has an object `ab`."""

    left: ClassVar[list[int]]
    seen: ClassVar[list[str]]

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"ab")

    def _answer(self, body: bytes) -> None:
        self.seen.append(self.command)
        status = self.left.pop(0) if self.left else 200
        self.send_response(status or 200)
        data = body if status in (200, CUT) else b"<Error><Code>SlowDown</Code></Error>"
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:1] if status == CUT else data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def scripted(*statuses: int) -> Iterator[tuple[S3Blobs, list[str]]]:
    handler = type("Handler", (Scripted,), {"left": list(statuses), "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield S3Blobs("bucket", "m", url, "us-east-1"), handler.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("s3")
def test_what_may_pass_is_tried_again() -> None:
    with scripted(503) as (blobs, seen):
        blobs.put("a", b"ab")
        assert seen == ["PUT", "PUT"]
    for status in (503, CUT):
        with scripted(status) as (blobs, seen):
            assert blobs.get("a", "file") == b"ab"
            assert seen == ["GET", "GET"]


@pytest.mark.usefixtures("s3")
def test_what_does_not_pass_is_a_transient_error() -> None:
    with scripted(*[503] * 99) as (blobs, seen):
        with pytest.raises(TransientError) as caught:
            blobs.put("a", b"ab")
        assert (caught.value.exit_code, caught.value.got) == (6, "SlowDown")
        assert seen == ["PUT", "PUT"]  # AWS_MAX_ATTEMPTS
        with pytest.raises(TransientError):
            blobs.get("a", "file")
    for touch in (blobs.held, lambda: blobs.get("a", "file"), lambda: blobs.put_new("a", b"")):
        with pytest.raises(TransientError) as caught:
            touch()
        assert caught.value.where.startswith("s3://bucket/m")


class Meddling:
    """Interfere with the conditional puts of a real client."""

    def __init__(self, client: Any, *, ignores: bool = False, conflicts: int = 0) -> None:
        self._client, self._ignores, self.conflicts = client, ignores, conflicts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, **arguments: Any) -> Any:
        if self.conflicts and "IfNoneMatch" in arguments:
            from botocore.exceptions import ClientError

            self.conflicts -= 1
            raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
        if self._ignores:
            arguments.pop("IfNoneMatch", None)
        return self._client.put_object(**arguments)


def meddle(monkeypatch: pytest.MonkeyPatch, objects: S3Blobs, **how: Any) -> Meddling:
    client = Meddling(s3_client.boto(objects.endpoint, objects.region), **how)
    monkeypatch.setattr(s3_client, "boto", lambda *_: client)
    monkeypatch.setattr(s3_blobs, "CONFLICT_PAUSE_S", 0.001)
    return client


def test_a_server_that_ignores_conditions_is_refused(
    objects: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle(monkeypatch, objects, ignores=True)
    with pytest.raises(EnvironmentFault, match="ignores conditional puts"):
        objects.check_usable()
    assert objects.held() == frozenset()


def test_a_conflict_of_two_puts_is_waited_for(objects: S3Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    client = meddle(monkeypatch, objects, conflicts=2)
    assert objects.put_new("a", b"1")
    client.conflicts = 2
    assert not objects.put_new("a", b"2")
    client.conflicts = 99
    with pytest.raises(EnvironmentFault) as caught:
        objects.put_new("b", b"1")
    assert caught.value.got == "ConditionalRequestConflict"


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(EnvironmentFault, match="boto3 is not installed") as caught:
        S3Blobs("bucket", "m", "http://nowhere", "us-east-1").held()
    assert "deletion-ready-model[s3]" in caught.value.next_step


def test_without_credentials_it_says_where_they_come_from(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    blobs = replace(fresh_blobs(s3), region="eu-nobody-1")
    with pytest.raises(EnvironmentFault) as caught:
        blobs.held()
    assert caught.value.got == "NoCredentialsError"
    assert "AWS_PROFILE" in caught.value.next_step
