"""Files that are whole or absent, whenever the process dies, and one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sisa.core.digest import Keyed, sha256_hex
from sisa.core.domain import WitnessHead
from sisa.core.errors import Busy, EnvironmentFault, IntegrityError
from sisa.store.blobs import files, sqlite_files
from sisa.store.blobs.files import (
    TEMPORARY_PREFIX,
    erase,
    held_names,
    read_whole,
    verified,
    write_atomic,
    write_directory,
    writer_lock,
)
from sisa.store.blobs.sqlite_files import read_beside
from sisa.store.metrics import FileMetrics
from sisa.store.witness import FileWitness
from tests.crash import Crash, crash


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file"
    write_atomic(path, b"abc", mode=0o640)
    assert path.read_bytes() == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert held_names(path.parent) == {"file"}


@pytest.mark.parametrize("step", ["replace", "fsync", "fchmod"])
@pytest.mark.parametrize("end", [Crash, OSError(errno.ENOSPC, "No space left on device")])
def test_what_stops_before_the_rename_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, end: Any
) -> None:
    def stops(*_: Any) -> None:
        raise end

    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, step, stops)
    with pytest.raises(Crash if end is Crash else EnvironmentFault):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert held_names(tmp_path) == {"file"}


def test_a_killed_writer_leaves_a_temporary_name_only(tmp_path: Path) -> None:
    """No clean-up runs in a killed process: readers still see the old file."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom sisa.store.blobs.files import write_atomic\n"
        "os.replace = lambda *_: os._exit(9)\nwrite_atomic(Path(sys.argv[1]), b'new')"
    )
    path = tmp_path / "file"
    write_atomic(path, b"old")
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    (left,) = held_names(tmp_path) - {"file"}
    assert left.startswith(TEMPORARY_PREFIX)


def test_a_full_disk_names_the_file_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(EnvironmentFault, match="No space left") as caught:
        write_atomic(tmp_path / "file", b"x")
    assert caught.value.where == str(tmp_path / "file")
    assert "free disk space" in caught.value.next_step
    assert held_names(tmp_path) == frozenset()


def test_the_bytes_are_flushed_before_the_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a renamed file with unwritten bytes would be half a file."""
    steps: list[str] = []

    def noting(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def noted(*arguments: Any) -> Any:
            steps.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "replace", "rename"):
        noting(name)
    write_atomic(tmp_path / "file", b"x")
    assert steps == ["fsync", "replace", "fsync"]
    steps.clear()
    write_directory(tmp_path / "folder", {"a": b"1", "b": b"2"})
    assert steps == ["fsync", "fsync", "fsync", "rename", "fsync"]


@pytest.mark.parametrize("stops", [crash, full_disk])
@pytest.mark.parametrize("step", ["rename", "fsync"])
def test_a_directory_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, stops: Callable[..., None]
) -> None:
    monkeypatch.setattr(os, step, stops)
    with pytest.raises(Crash if stops is crash else EnvironmentFault):
        write_directory(tmp_path / "folder", {"a": b"1"})
    assert held_names(tmp_path) == frozenset()


def test_of_two_that_write_a_directory_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers store the same content: the later one arrives just before its rename."""
    path = tmp_path / "folder"
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        write_directory(path, {"a": b"first"})
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    write_directory(path, {"a": b"second", "b": b"2"})
    assert {each.name: each.read_bytes() for each in path.iterdir()} == {"a": b"first"}
    assert held_names(tmp_path) == {"folder"}


def test_a_file_in_the_way_of_a_directory_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"a file")
    with pytest.raises(EnvironmentFault):
        write_directory(tmp_path / "folder", {"a": b"1"})
    assert held_names(tmp_path) == {"folder"}


def test_checked_reads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert verified(read_whole(path, "slice file"), sha256_hex(b"abc"), "slice file", "") == b"abc"
    with pytest.raises(IntegrityError, match="slice file") as caught:
        verified(b"abc", sha256_hex(b"abd"), "slice file", str(path))
    assert (caught.value.expected, caught.value.got) == (
        f"sha256 {sha256_hex(b'abd')}",
        f"sha256 {sha256_hex(b'abc')}",
    )
    with pytest.raises(IntegrityError, match="missing"):
        read_whole(tmp_path / "none", "slice file")
    with pytest.raises(EnvironmentFault):
        read_whole(tmp_path, "slice file")


def test_erase_takes_files_directories_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_directory(outside, {"kept": b"1"})
    folder = tmp_path / "model"
    write_directory(folder / "checkpoint", {"a": b"1"})
    write_atomic(folder / "file", b"1")
    (folder / "link").symlink_to(outside)
    for name in ("checkpoint", "file", "link", "never-there"):
        erase(folder / name)
    assert held_names(folder) == frozenset()
    assert held_names(outside) == {"kept"}


def test_an_absent_folder_holds_nothing(tmp_path: Path) -> None:
    assert held_names(tmp_path / "none") == frozenset()


def test_a_second_writer_is_busy_until_the_first_has_finished(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys\nfrom pathlib import Path\nfrom sisa.store.blobs.files import writer_lock\n"
        "with writer_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Busy) as caught, writer_lock(lock):
            pytest.fail("two writers")
        assert caught.value.exit_code == 5
        other.kill()
    with writer_lock(lock):
        pass


def test_a_lock_is_its_owners_alone(tmp_path: Path) -> None:
    """Whoever can open a lock can hold it for ever; one of an earlier version is closed."""
    (tmp_path / "lock").touch(0o644)
    with writer_lock(tmp_path / "lock"):
        assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600


def test_no_lock_is_waited_for_without_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, witness = (
        FileMetrics(tmp_path / "metrics"),
        FileWitness(tmp_path / "witness.jsonl", Keyed(bytes(32))),
    )
    event = {"event": "erasure_failed", "num_requests": 2}
    line = {"at": "2026-11-25T21:37:49.123+00:00", "run": "20261125T213749Z-3f9a1c2b", **event}
    metrics.append(line)
    witness.append(WitnessHead("", 0), (), ())
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.1)
    waits: dict[Path, Callable[[], object]] = {
        metrics.root: lambda: metrics.append(line),
        witness.path: lambda: witness.append(WitnessHead("", 0), (), ()),
    }
    for path, act in waits.items():
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="locked") as caught:
            act()
        assert caught.value.where == str(path)
        os.close(handle)
        act()


def test_the_lock_is_free_again_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Crash), writer_lock(tmp_path / "lock"):
            raise Crash


def test_a_lock_that_cannot_be_made_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault), writer_lock(tmp_path / "none" / "lock"):
        pytest.fail("no lock")


def test_every_known_disk_error_has_its_next_step(tmp_path: Path) -> None:
    steps = set()
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        with pytest.raises(EnvironmentFault) as caught, files.disk_errors(tmp_path):
            raise OSError(code, os.strerror(code))
        steps.add(caught.value.next_step)
        assert os.strerror(code) in caught.value.what
    assert len(steps) == 5


USE = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM t'); c.close()"


@pytest.mark.parametrize(("read", "kept"), [(read_beside, True), (lambda p: p.open("rb"), False)])
def test_bytes_are_read_beside_an_open_database(
    tmp_path: Path, read: Callable[[Path], AbstractContextManager[BinaryIO]], kept: bool
) -> None:
    """Another process must not take the database for unused, and delete the log that is written to."""
    path = tmp_path / "a.sqlite"
    with sqlite_files.database_in_use(path), closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL").close()
        database.execute("CREATE TABLE t (a)").close()
        for name in (path, tmp_path / "a.sqlite-wal", tmp_path / "a.sqlite-shm", path):
            with read(name) as file:
                assert file.read(1)
        subprocess.run([sys.executable, "-c", USE, str(path)], check=True)
        assert (tmp_path / "a.sqlite-wal").exists() == kept
    assert not sqlite_files._databases
    assert not sqlite_files._users


def test_handles_of_one_file_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"abc")
    with sqlite_files.database_in_use(path):
        for _ in range(3):
            with read_beside(path) as one, read_beside(path) as other:
                assert (one.read(), other.read()) == (b"abc", b"abc")
        (kept,) = sqlite_files._databases.values()
        assert len(kept) == 2
        path.unlink()
        path.write_bytes(b"another")
        with read_beside(path) as file:
            assert file.read() == b"another"
        assert [os.fstat(each.fileno()).st_nlink for each in kept] == [1]
