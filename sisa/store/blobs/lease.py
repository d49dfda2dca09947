"""A blob store as a run's workers see it: they can read all of it and write only to a lent area.

A worker may outlive its driver, by seconds or, on another node, without bound. So it never writes under
a name that others use: the driver lends an area, accepts finished results from it, and erases it.
Whoever erases blobs that the ledger does not know also erases the area of a killed driver.

>>> import tempfile
>>> from pathlib import Path
>>> from sisa.store.blobs.local_blobs import LocalBlobs
>>> with tempfile.TemporaryDirectory() as folder:
...     store = LocalBlobs(Path(folder))
...     lease = Lease(store, store.lend(".tmp-run", ["a"]))
...     lease.put("a", b"abc")
...     seen = lease.get("a", "file"), sorted(store.held())
...     store.accept(".tmp-run", "a")
...     seen, sorted(store.held())
((b'abc', ['.tmp-run']), ['.tmp-run', 'a'])
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sisa.core.errors import IntegrityError
from sisa.core.ports import BlobStore, KeptVersions


@dataclass(frozen=True, slots=True)
class Lease:
    """A BlobStore whose changes go to the area; reads look there first, then into the store."""

    store: BlobStore
    area: BlobStore

    def below(self, name: str) -> Lease:
        return Lease(self.store.below(name), self.area.below(name))

    def location(self, name: str = "") -> str:
        return self.store.location(name)

    def check_usable(self) -> None:
        self.store.check_usable()

    def held(self) -> frozenset[str]:
        return self.area.held() | self.store.held()

    def parts(self, group: str) -> frozenset[str]:
        return self.area.parts(group) or self.store.parts(group)

    def get(self, name: str, what: str, num_bytes: int = -1) -> bytes:
        with contextlib.suppress(IntegrityError):
            if found := self.area.get(name, what, num_bytes):  # else a lent name without bytes
                return found
        return self.store.get(name, what, num_bytes)

    def num_bytes(self, name: str) -> int:
        return self.area.num_bytes(name) or self.store.num_bytes(name)

    def put(self, name: str, data: bytes) -> None:
        self.area.put(name, data)

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        self.area.put_group(name, parts)

    def erase(self, names: Collection[str]) -> None:
        self.area.erase(names)

    def clear(self) -> None:
        self.area.clear()

    def lend(self, area: str, names: Collection[str]) -> BlobStore:
        return self.area.lend(area, names)

    def accept(self, area: str, name: str) -> None:
        self.area.accept(area, name)

    def purge(self, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:
        return self.area.purge(dry_run=dry_run)
