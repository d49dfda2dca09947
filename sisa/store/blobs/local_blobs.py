"""A place on a disk: a directory of files, and of directories that appear by one rename.

Rules: those of `files.py`; files and directories are for their owner alone. A path that several
machines share is such a place on each of them. An area that is lent is a directory within: once it is
removed, no process can put anything there.

Not covered: what a disk, a snapshot or a server keeps of unlinked blocks: a path has no versions to
purge, and those of what is mounted there are out of sight.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     place = LocalBlobs(Path(folder) / "records")
...     place.put("a", b"abc")
...     place.put_new("a", b"other"), place.get("a", "file"), place.held()
(False, b'abc', frozenset({'a'}))
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sisa.core.ports import BlobStore, KeptVersions
from sisa.store.blobs import files


@dataclass(frozen=True, slots=True)
class LocalBlobs:
    """A Place in a directory, which is made when something is put there."""

    root: Path
    lent: bool = False  # an area, which may be gone: what is put there does not bring it back

    def below(self, name: str) -> LocalBlobs:
        return replace(self, root=self.root / name)

    def location(self, name: str = "") -> str:
        return str(self.root.absolute() / name)

    def check_usable(self) -> None:
        with files.disk_errors(self.root):
            files.make_directory(self.root)
            with tempfile.TemporaryFile(dir=self.root):
                pass

    def held(self) -> frozenset[str]:
        return files.held_names(self.root) if self.root.is_dir() else frozenset()

    def parts(self, group: str) -> frozenset[str]:
        return self.below(group).held()

    def get(self, name: str, what: str) -> bytes:
        return files.read_whole(self.root / name, what)

    def head(self, name: str, num_bytes: int) -> bytes:
        return files.read_whole(self.root / name, "file of the model", num_bytes)

    def num_bytes(self, name: str) -> int:
        return files.num_bytes(self.root / name)

    def put(self, name: str, data: bytes) -> None:
        path, made = self.root / name, not self.lent
        files.write_atomic(path, data, temporary_in=self.root, make_parents=made)

    def put_new(self, name: str, data: bytes) -> bool:
        path, made = self.root / name, not self.lent
        return files.write_new(path, data, temporary_in=self.root, make_parents=made)

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        files.write_directory(self.root / name, dict(parts), make_parents=not self.lent)

    def erase(self, names: Collection[str]) -> None:
        files.erase_all(self.root, names)

    def clear(self) -> None:
        files.erase_all(self.root.parent, [self.root.name])

    def lend(self, area: str, names: Collection[str]) -> LocalBlobs:  # noqa: ARG002
        lent = replace(self.below(area), lent=True)
        files.make_directory(lent.root)
        return lent

    def accept(self, area: str, name: str) -> None:
        with files.disk_errors(self.root / name):
            try:
                os.rename(self.root / area / name, self.root / name)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            files.sync_directory(self.root)

    def purge(self, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:  # noqa: ARG002
        return ()


def absolute(place: BlobStore) -> BlobStore:
    """The same place for a process in another working directory."""
    return replace(place, root=place.root.absolute()) if isinstance(place, LocalBlobs) else place
