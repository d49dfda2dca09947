"""Test the contract of BlobStore over a directory and buckets of a real S3 server.

The buckets keep versions, or do not. A blob is whole or absent, and a group counts when all of it is
there. An erased blob is gone. What buckets do in their own way is in `test_s3_blobs.py`.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sisa.core.checkpoint_files import MANIFEST_FILE
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.ports import BlobStore
from sisa.store.blobs import files
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.lease import Lease
from sisa.store.blobs.local_blobs import LocalBlobs
from tests.contract.storage.forms import BACKENDS, blobs_in

GROUP = {"weights": b"w" * 100, "state": b"{}", MANIFEST_FILE: b"{}"}


@pytest.fixture(params=[*BACKENDS, "plain objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return blobs_in(request.param, request, tmp_path / "blobs")


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
    if not isinstance(area, LocalBlobs):  # a directory gets a group by one rename
        area.put("g/weights", b"half")
    blobs.accept(AREA, "g")
    blobs.erase([AREA])
    assert blobs.held() == frozenset()


def test_nothing_can_be_put_into_an_area_that_was_erased(blobs: BlobStore) -> None:
    """A worker may try after its driver was killed and the next command has erased the area."""
    area = blobs.lend(AREA, LENT)
    if not isinstance(area, LocalBlobs):  # a directory gets a group by one rename
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
