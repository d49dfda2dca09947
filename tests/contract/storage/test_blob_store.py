"""Test the contract of BlobStore over a directory and buckets of a real S3 server.

The buckets keep versions, or do not. A blob is whole or absent, and a group counts when all of it is
there. An erased blob is gone: no version of it is left, or the result says where one is and why.
"""

from __future__ import annotations

import errno
import http.server
import importlib
import os
import pickle
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from sisa.core.errors import EnvironmentFault, IntegrityError, TransientError
from sisa.core.ports import BlobStore
from sisa.store.blobs import files, object_blobs, object_client
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.lease import Lease
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.blobs.object_blobs import LAST, ObjectBlobs
from tests.fakes.s3_server import Server, fresh_blobs

GROUP = {"weights": b"w" * 100, "state": b"{}", LAST: b"{}"}


@pytest.fixture(params=["disk", "objects", "plain objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "disk":
        return LocalBlobs(tmp_path / "blobs")
    return fresh_blobs(request.getfixturevalue("s3"), versions=request.param == "objects")


@pytest.fixture
def objects(s3: Server) -> ObjectBlobs:
    """Return a store in a bucket that keeps versions."""
    return fresh_blobs(s3)


def versions(server: Server, blobs: ObjectBlobs) -> list[tuple[str, bytes | None]]:
    """Return all versions and delete markers below a store, by name."""
    found = server.versions(blobs.bucket).items()
    start = f"{blobs.prefix}/"
    return [(key.removeprefix(start), data) for (key, _), data in found if key.startswith(start)]


def test_nothing_is_held_at_first(blobs: BlobStore) -> None:
    assert blobs.held() == blobs.parts("a") == frozenset()
    assert blobs.num_bytes("") == blobs.num_bytes("a") == 0
    for read in (blobs.get, lambda name, what: blobs.get(name, what, 1)):
        with pytest.raises(IntegrityError) as caught:
            read("a", "slice file")
        assert caught.value.where == blobs.location("a")
    with pytest.raises(IntegrityError, match="a slice file is missing"):
        blobs.get("a/b", "slice file")
    assert blobs.purge() == ()


def test_what_is_put_is_got(blobs: BlobStore) -> None:
    blobs.put("a", b"first")
    blobs.put("a", b"second")
    blobs.put("g/part", b"x" * 10)
    assert (blobs.get("a", "file"), blobs.get("a", "file", 3), blobs.num_bytes("a")) == (
        b"second",
        b"sec",
        6,
    )
    assert blobs.num_bytes("") == 16
    blobs.put("empty", b"")
    assert blobs.get("empty", "file") == b""


def test_a_usable_place_is_as_it_was(blobs: BlobStore) -> None:
    blobs.put("a", b"1")
    blobs.check_usable()
    assert blobs.held() == {"a"}
    assert blobs.purge() == ()


def test_a_group_is_whole_and_is_kept(blobs: BlobStore) -> None:
    blobs.put_group("g", GROUP)
    blobs.put_group("g", {**GROUP, "weights": b"other"})
    assert blobs.held() == {"g"}
    assert blobs.parts("g") == GROUP.keys()
    assert blobs.num_bytes("g") == sum(map(len, GROUP.values()))
    assert {part: blobs.get(f"g/{part}", "file") for part in GROUP} == GROUP


def test_erased_is_gone_and_its_neighbours_stay(blobs: BlobStore) -> None:
    for name in ("a", "ab"):
        blobs.put(name, b"1")
        blobs.put(name, b"2")
    blobs.put_group("g", GROUP)
    blobs.put_group("gh", GROUP)
    blobs.erase(["a", "g", "never"])
    assert blobs.held() == {"ab", "gh"}
    assert blobs.parts("g") == frozenset()
    blobs.erase(["a", "g"])
    assert blobs.purge() == blobs.purge(dry_run=True) == ()


def test_stores_below_are_apart(blobs: BlobStore) -> None:
    one, other = blobs.below("one"), blobs.below("two")
    one.put("a", b"1")
    one.put_group("g", GROUP)
    other.put("a", b"2")
    one.clear()
    one.clear()
    assert not one.held()
    assert other.held() == {"a"}
    assert other.location("a") == blobs.location("two/a")
    assert one.purge() == ()


def test_a_place_travels_without_credentials(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    blobs.put("a", b"1")
    packed = pickle.dumps(blobs)
    assert b"hush-hush" not in packed
    again: BlobStore = pickle.loads(packed)  # noqa: S301
    assert (again, again.get("a", "file")) == (blobs, b"1")


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_files_and_directories_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    blobs = LocalBlobs(tmp_path / "above" / "blobs")
    before = os.umask(umask)
    try:
        blobs.put("a", b"1")
        blobs.put("b", b"1")
        blobs.put_group("g", {"part": b"1"})
    finally:
        os.umask(before)
    (blobs.root / "a").chmod(0o644)
    blobs.put("a", b"2")
    paths = sorted((tmp_path / "above").rglob("*"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "above", *paths)}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}
    assert len(modes) == 6


def test_what_can_be_erased_is_and_stays_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that can't be erased does not stop the others; then the directory is flushed."""
    blobs, done = LocalBlobs(tmp_path), []
    for name in "abc":
        blobs.put_group(name, {"part": b"1", "other": b"1"})
    unlink, sync = os.unlink, files.sync_directory

    def refuses(path: Any, *, dir_fd: int | None = None) -> None:
        if os.fspath(path) == "part" and "a" in os.readlink(f"/proc/self/fd/{dir_fd}")[-1:]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, dir_fd=dir_fd)

    def syncs(path: Path) -> None:
        done.append((path, blobs.held()))
        sync(path)

    monkeypatch.setattr(os, "unlink", refuses)
    monkeypatch.setattr(files, "sync_directory", syncs)
    with pytest.raises(EnvironmentFault, match="refused"):
        blobs.erase(["a", "b", "c", "never held"])
    assert [sorted(blobs.held()), sorted(blobs.parts("a"))] == [["a"], ["part"]]
    assert done == [(tmp_path, frozenset({"a"}))]


AREA = f"{TEMPORARY_PREFIX}run"
LENT = ["a", *(f"g/{part}" for part in GROUP)]


def test_what_is_put_into_an_area_is_known_once_it_is_accepted(blobs: BlobStore) -> None:
    blobs.put("a", b"old")
    lease = Lease(blobs, pickle.loads(pickle.dumps(blobs.lend(AREA, LENT))))  # noqa: S301
    assert lease.get("a", "file") == b"old"
    assert lease.held() & {"a", "g"} == {"a"}
    lease.put("a", b"new")
    lease.put_group("g", GROUP)
    lease.put_group("g", GROUP)  # by a worker that was started again
    assert (lease.get("a", "file"), lease.num_bytes("a"), lease.get("a", "file", 1)) == (b"new", 3, b"n")
    assert {part: lease.get(f"g/{part}", "file") for part in lease.parts("g")} == GROUP
    assert (blobs.get("a", "file"), blobs.parts("g")) == (b"old", frozenset())
    for name in ("a", "g", "g", "never"):
        blobs.accept(AREA, name)
    assert (blobs.get("a", "file"), blobs.held() >= {"a", "g"}) == (b"new", True)
    assert {part: lease.get(f"g/{part}", "file") for part in lease.parts("g")} == GROUP
    blobs.erase([AREA])
    assert blobs.held() == {"a", "g"}
    assert {part: blobs.get(f"g/{part}", "file") for part in GROUP} == GROUP
    assert blobs.purge() == ()


def test_half_a_group_is_not_accepted(blobs: BlobStore) -> None:
    area = blobs.lend(AREA, LENT)
    if isinstance(area, ObjectBlobs):
        area.put("g/weights", b"half")
    blobs.accept(AREA, "g")
    blobs.erase([AREA])
    assert blobs.held() == frozenset()


def test_nothing_can_be_put_into_an_area_that_was_erased(blobs: BlobStore) -> None:
    """A worker may try after its driver was killed and the next command has erased the area."""
    area = blobs.lend(AREA, LENT)
    if isinstance(area, ObjectBlobs):
        area.put("g/weights", b"half")
    blobs.put_group("h", GROUP)
    blobs.erase(blobs.held() - {"h"})
    with pytest.raises(EnvironmentFault):
        area.put("a", b"text")
    with pytest.raises(EnvironmentFault):
        area.put_group("g", GROUP)
    assert blobs.held() == {"h"}
    assert area.held() == frozenset()
    blobs.erase(["h"])
    assert blobs.num_bytes("") == 0
    assert blobs.purge(dry_run=True) == ()


def test_a_writer_does_not_outlive_the_erasure_of_its_area(blobs: BlobStore) -> None:
    area = blobs.lend(AREA, LENT)
    begun = threading.Event()

    def write() -> None:
        while True:
            area.put("a", b"text")
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        begun.wait(30)
        blobs.erase([AREA])
        assert writer.exception(30) is not None
    assert blobs.held() == frozenset()
    assert blobs.purge(dry_run=True) == ()


# --- object stores alone -------------------------------------------------------------------------


def test_one_of_many_writers_of_a_name_is_first(objects: ObjectBlobs) -> None:
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda n: objects.put_new("a", str(n).encode()), range(4)))
    assert won.count(True) == 1
    assert objects.get("a", "file") == str(won.index(True)).encode()
    assert not objects.put_new("a", b"late")


def test_parts_without_their_manifest_are_no_group(objects: ObjectBlobs) -> None:
    objects.put("g/weights", b"half")
    (left,) = objects.held()
    assert left != "g"
    assert (objects.get(f"{left}/weights", "file"), objects.num_bytes(left)) == (b"half", 4)
    objects.put_group("g", GROUP)
    assert objects.held() == {"g"}
    objects.erase([left])  # finished meanwhile: it stays
    assert objects.parts("g") == GROUP.keys()
    objects.put("h/weights", b"half")
    objects.erase(objects.held() - {"g"})
    assert objects.held() == {"g"}


def test_no_version_is_left(s3: Server, objects: ObjectBlobs) -> None:
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
    blobs = ObjectBlobs(s3.bucket("locked", lock=True), "m", s3.url, "us-east-1")
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
    blobs = ObjectBlobs("nowhere", "m", s3.url, "us-east-1")
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
def scripted(*statuses: int) -> Iterator[tuple[ObjectBlobs, list[str]]]:
    handler = type("Handler", (Scripted,), {"left": list(statuses), "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield ObjectBlobs("bucket", "m", url, "us-east-1"), handler.seen  # type: ignore[attr-defined]
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


def meddle(monkeypatch: pytest.MonkeyPatch, objects: ObjectBlobs, **how: Any) -> Meddling:
    client = Meddling(object_client.boto(objects.endpoint, objects.region), **how)
    monkeypatch.setattr(object_client, "boto", lambda *_: client)
    monkeypatch.setattr(object_blobs, "CONFLICT_PAUSE_S", 0.001)
    return client


def test_a_server_that_ignores_conditions_is_refused(
    objects: ObjectBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle(monkeypatch, objects, ignores=True)
    with pytest.raises(EnvironmentFault, match="ignores conditional puts"):
        objects.check_usable()
    assert objects.held() == frozenset()


def test_a_conflict_of_two_puts_is_waited_for(
    objects: ObjectBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = meddle(monkeypatch, objects, conflicts=2)
    assert objects.put_new("a", b"1")
    client.conflicts = 2
    assert not objects.put_new("a", b"2")
    client.conflicts = 99
    with pytest.raises(EnvironmentFault) as caught:
        objects.put_new("b", b"1")
    assert caught.value.got == "ConditionalRequestConflict"


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str) -> ModuleType:
        if name == "boto3":
            raise ImportError
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(EnvironmentFault, match="needs boto3") as caught:
        ObjectBlobs("bucket", "m", "http://nowhere", "us-east-1").held()
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
