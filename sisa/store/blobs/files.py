"""Files that are whole or absent: atomic writes, checked reads, one writer.

Bytes go to a temporary name in the same directory, are flushed to the disk, and get their name by one
rename or link; readers never see half a file. Names are made of digests and numbers, never of a record
id. What a disk, a snapshot or a server keeps of unlinked blocks is out of reach.

>>> with tempfile.TemporaryDirectory() as folder:
...     write_atomic(Path(folder) / "a", b"abc")
...     read_whole(Path(folder) / "a", "file"), held_names(Path(folder))
(b'abc', frozenset({'a'}))
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sisa.core.digest import sha256_hex
from sisa.core.errors import Busy, EnvironmentFault, IntegrityError, all_tried

TEMPORARY_PREFIX = ".tmp-"
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs"),
    *("ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"),
}
LOCK_PATIENCE_S = 10.0
FILE_MODE, DIRECTORY_MODE = 0o600, 0o700  # whatever the umask: weights may recite private text
_NEXT_STEPS = {
    errno.ENOSPC: "free disk space, then run the same command again",
    errno.EDQUOT: "raise the disk quota, then run the same command again",
    errno.EROFS: "make the file system writable, then run the same command again",
    errno.EACCES: "give this user access, then run the same command again",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error into an EnvironmentFault that names the path."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"the disk refused: {error.strerror or error}",
            where=str(path),
            next_step=_NEXT_STEPS.get(error.errno or 0, "repair the disk, then run the command again"),
        ) from error


def network_file_system(path: Path) -> str:
    """Return the network file system that holds a path, or "": SQLite's log is not safe on one."""
    import psutil

    real = path.resolve()
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    above = next((each for each in (real, *real.parents) if each in mounts), None)
    kind = "" if above is None else mounts[above]
    return kind if kind in NETWORK_FILE_SYSTEMS else ""


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    with opened_directory(path) as handle:
        os.fsync(handle)


@contextlib.contextmanager
def opened_directory(path: Path, *, follow: bool = True) -> Iterator[int]:
    """Open a directory while the block runs."""
    no_link = 0 if follow else os.O_NOFOLLOW
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | no_link)
    try:
        yield handle
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents for their owner alone; existing ones stay as they are."""
    with disk_errors(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                each.mkdir(DIRECTORY_MODE)
                each.chmod(DIRECTORY_MODE)
            sync_directory(each.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def write_atomic(
    path: Path,
    data: bytes,
    mode: int = FILE_MODE,
    temporary_in: Path | None = None,
    *,
    make_parents: bool = True,
    keep_existing: bool = False,
) -> None:
    """Write a whole file or nothing.

    A killed process may leave a temporary file in `temporary_in`, by default the file's directory.
    """
    if make_parents:
        make_directory(path.parent)
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=temporary_in or path.parent)
        try:
            _write(os.fdopen(handle, "wb"), data, mode)
            if keep_existing:
                with contextlib.suppress(FileExistsError):
                    os.link(name, path)
                os.unlink(name)
            else:
                os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_directory(path.parent)


def _write(file: BinaryIO, data: bytes, mode: int = FILE_MODE) -> None:
    """Write bytes to the disk, set the file's mode, and close it."""
    with file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def write_directory(path: Path, files: Mapping[str, bytes], *, make_parents: bool = True) -> None:
    """Write a directory of flat files, whole or not at all; an existing one is kept."""
    if make_parents:
        make_directory(path.parent)
    with disk_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        try:
            for name, data in files.items():
                _write((temporary / name).open("wb"), data)
            temporary.chmod(DIRECTORY_MODE)
            sync_directory(temporary)
            try:
                os.rename(temporary, path)
            except OSError as error:
                # Another worker stored the same content first; its bytes are equal.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_directory(path.parent)


def verified(data: bytes, sha256: str, what: str, where: str) -> bytes:
    """Return plaintext with the recorded digest. Raise IntegrityError for any other."""
    found = sha256_hex(data)
    if found != sha256:
        raise tampered(where, what, sha256, found)
    return data


def read_whole(path: Path, what: str, num_bytes: int = -1) -> bytes:
    """Return a file's bytes as stored, or its first ones. Raise IntegrityError if it is missing."""
    with disk_errors(path):
        try:
            with path.open("rb") as file:
                return file.read(num_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IntegrityError(
                f"a {what} is missing",
                where=str(path),
                got="no file",
                next_step="restore the model directory from a backup, or train it again",
            ) from error


def tampered(where: str, what: str, expected: str, got: str) -> IntegrityError:
    """Return the error for bytes that are not the recorded ones."""
    return IntegrityError(
        f"a {what} is not the one that was recorded",
        where=where,
        expected=f"sha256 {expected}",
        got=f"sha256 {got}",
        next_step="run `sisa verify`; restore the file from a backup, or train the model again",
    )


def held_names(folder: Path) -> frozenset[str]:
    """Return all names in a directory, leftover temporary ones included."""
    with disk_errors(folder), contextlib.suppress(FileNotFoundError):
        return frozenset(os.listdir(folder))
    return frozenset()


def num_bytes(path: Path) -> int:
    """Return the size of a file or of all files below a directory, following no link; 0 if absent."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(num_bytes(each) for each in path.iterdir())
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def erase(path: Path) -> None:
    """Remove a file or a directory, and as much as possible of one that can't be removed whole.

    An absent path is ignored, and so is a process that writes into it meanwhile. Raise EnvironmentFault
    for the first entry that stays.
    """
    refused: list[OSError] = []

    def refuse(_function: Any, _path: str, found: Any) -> None:
        if not isinstance(found[1], FileNotFoundError):
            refused.append(found[1])

    with disk_errors(path):
        while path.is_dir() and not path.is_symlink():
            refused.clear()
            shutil.rmtree(path, onerror=refuse)
            for each in refused:
                if each.errno != errno.ENOTEMPTY:  # else another process wrote meanwhile: try again
                    raise each
        path.unlink(missing_ok=True)


def overwrite(path: Path) -> None:
    """Write zeros over the bytes of a regular file."""
    found = path.lstat()
    if stat.S_ISREG(found.st_mode):
        with path.open("r+b") as file:
            file.write(bytes(found.st_size))
            file.flush()
            os.fsync(file.fileno())


def erase_all(folder: Path, names: Collection[str]) -> None:
    """Remove entries of a directory durably: all that can be, before the first error is raised."""
    with all_tried() as tried:
        for name in names:
            with tried():
                erase(folder / name)
        for parent in sorted({(folder / name).parent for name in names}):
            with tried(), disk_errors(parent):
                if parent.is_dir():
                    sync_directory(parent)


@contextlib.contextmanager
def writer_lock(path: Path, patience_s: float | None = 0) -> Iterator[None]:
    """Hold a lock on a file, which only its owner can open; `take_lock` explains `patience_s`.

    Raise Busy if another process, or another thread of this one, holds it.
    """
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        if os.fstat(handle).st_mode & 0o077:  # whoever can open a lock can hold it
            with contextlib.suppress(PermissionError):  # another user's; `sisa doctor` reports it
                os.fchmod(handle, FILE_MODE)
        take_lock(handle, path.parent, "is writing to this model", patience_s)
        if not os.fstat(handle).st_nlink:  # its last holder removed it, and a new file may be locked
            raise Busy("another process has just finished", where=str(path), next_step="try again")
        yield
    finally:
        os.close(handle)


def take_lock(handle: int, where: Path, doing: str, patience_s: float | None = None) -> None:
    """Lock an open file or directory. Raise Busy after `patience_s` seconds (LOCK_PATIENCE_S)."""
    deadline = time.monotonic() + (LOCK_PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise Busy(
                    f"another process {doing}",
                    where=str(where),
                    next_step="wait until it has finished, then run the same command again",
                ) from error
        time.sleep(0.05)


def walk(place: Path, unlisted: Callable[[Path, OSError], None] | None = None) -> Iterator[Path]:
    """Yield a path and all below it, in order; `unlisted` receives directories that can't be listed."""
    yield place
    if place.is_dir() and not place.is_symlink():
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            if unlisted and not isinstance(error, FileNotFoundError):
                unlisted(place, error)
            return
        for name in names:
            yield from walk(place / name, unlisted)
