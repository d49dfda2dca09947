"""A BlobStore in a directory: blobs are files, and groups are directories of files.

>>> with tempfile.TemporaryDirectory() as folder:
...     blobs = LocalBlobs(Path(folder) / "records")
...     blobs.put("a", b"abc")
...     blobs.get("a", "file"), blobs.held()
(b'abc', frozenset({'a'}))
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
    """A BlobStore in a directory, which the first put creates."""

    root: Path
    lent: bool = False  # an area, which a put does not create again once it is erased

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

    def get(self, name: str, what: str, num_bytes: int = -1) -> bytes:
        return files.read_whole(self.root / name, what, num_bytes)

    def num_bytes(self, name: str) -> int:
        return files.num_bytes(self.root / name)

    def put(self, name: str, data: bytes) -> None:
        files.write_atomic(self.root / name, data, temporary_in=self.root, make_parents=not self.lent)

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        files.write_directory(self.root / name, parts, make_parents=not self.lent)

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


def absolute(blobs: BlobStore) -> BlobStore:
    """Return the same store for a process in another working directory."""
    return replace(blobs, root=blobs.root.absolute()) if isinstance(blobs, LocalBlobs) else blobs


def local_root(blobs: BlobStore) -> Path | None:
    """Return the directory of a blob store; None for an object store."""
    return blobs.root if isinstance(blobs, LocalBlobs) else None
