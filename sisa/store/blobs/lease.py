"""A place as a run's workers see it: all of it can be read, and only an area of it can be written.

A worker may outlive its driver, by seconds or, on another node, without bound. So it never puts anything
under a name that others look for: the driver lends an area, accepts what it hears is finished, and takes
the area back. Whoever erases what the ledger does not know erases the area of a driver that was killed,
too; from then on its workers can store nothing.

>>> import tempfile
>>> from pathlib import Path
>>> from sisa.store.blobs.local_blobs import LocalBlobs
>>> with tempfile.TemporaryDirectory() as folder:
...     place = LocalBlobs(Path(folder))
...     lease = Lease(place, place.lend(".tmp-run", ["a"]))
...     lease.put("a", b"abc")
...     seen = lease.get("a", "file"), sorted(place.held())
...     place.accept(".tmp-run", "a")
...     seen, sorted(place.held())
((b'abc', ['.tmp-run']), ['.tmp-run', 'a'])
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sisa.core.errors import IntegrityError
from sisa.core.ports import BlobStore, KeptVersions


@dataclass(frozen=True, slots=True)
class Lease:
    """A Place whose changes go to the area. What is in both is read from the area, and first there: what
    is accepted meanwhile is in the place by then."""

    place: BlobStore
    area: BlobStore

    def below(self, name: str) -> Lease:
        return Lease(self.place.below(name), self.area.below(name))

    def location(self, name: str = "") -> str:
        return self.place.location(name)

    def check_usable(self) -> None:
        self.place.check_usable()

    def held(self) -> frozenset[str]:
        return self.area.held() | self.place.held()

    def parts(self, group: str) -> frozenset[str]:
        return self.area.parts(group) or self.place.parts(group)

    def get(self, name: str, what: str) -> bytes:
        try:
            found = self.area.get(name, what)
        except IntegrityError:
            found = b""  # as is what an object store lends
        return found or self.place.get(name, what)

    def head(self, name: str, num_bytes: int) -> bytes:
        try:
            found = self.area.head(name, num_bytes)
        except IntegrityError:
            found = b""
        return found or self.place.head(name, num_bytes)

    def num_bytes(self, name: str) -> int:
        return self.area.num_bytes(name) or self.place.num_bytes(name)

    def put(self, name: str, data: bytes) -> None:
        self.area.put(name, data)

    def put_new(self, name: str, data: bytes) -> bool:
        return self.area.put_new(name, data)

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
