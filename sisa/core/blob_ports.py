"""The effect of keeping bytes somewhere, as a Protocol: a place of named blobs, and of groups of them.

A model's slices, checkpoints and patches rest in places: one for each room, on the driver's disk, on a
path that machines share, or in an object store. Stores (`ports.py`) say what the blobs are.

Rules: as `ports.py`. Names are made of digests and numbers. A place is plain names that travel to other
processes; how it is reached (credentials) is every machine's own matter.

Not covered: digests, keys and formats (`store/records.py`, `store/checkpoints.py`).

>>> KeptVersions("s3://bucket/m/records", "AccessDenied").why
'AccessDenied'
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KeptVersions:
    """What an erasure could not reach: where a bucket keeps (or may keep) old versions, and why."""

    where: str
    why: str


class BlobStore(Protocol):
    """Blobs by name on a disk or in an object store, and groups of them (`GROUP/PART`) that are whole
    or absent. It is plain names, so that it can travel to another process; credentials do not."""

    def below(self, name: str) -> BlobStore:
        """A place within this one."""

    def location(self, name: str = "") -> str:
        """Where a blob or a group rests, for people and programs: a path or a URI."""

    def check_usable(self) -> None:
        """Raises EnvironmentFault where it can't be reached, or can't do what is asked of it here."""

    def held(self) -> frozenset[str]:
        """Names of all blobs and whole groups, and what cut-short writings left, by other names that
        `erase` takes."""

    def parts(self, group: str) -> frozenset[str]:
        """Names of what is in a group; none of a blob."""

    def get(self, name: str, what: str) -> bytes:
        """A blob as it lies there. Raises IntegrityError that names it as `what` when it is absent."""

    def head(self, name: str, num_bytes: int) -> bytes:
        """Its first bytes. Raises as `get`."""

    def num_bytes(self, name: str) -> int:
        """Of a blob or a group; 0 when it is absent."""

    def put(self, name: str, data: bytes) -> None:
        """Store a blob, whole or not at all, in place of the one that had its name."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Store a blob unless there is one of that name, whoever else does so now; whether it did."""

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        """Store a group, whole or not at all, its `manifest.json` among the parts; one that is held
        is kept."""

    def erase(self, names: Collection[str]) -> None:
        """Remove blobs and groups, with all versions where that is allowed; absence is no error."""

    def clear(self) -> None:
        """Remove all that is below."""

    def lend(self, area: str, names: Collection[str]) -> BlobStore:
        """Make an area of this place for a run's workers; `erase([area])` takes it back for good.

        Blobs and parts of groups (`GROUP/PART`) of these names can be put there until then, and no
        others need to be possible. What is put fails once the area is erased, so that a worker which
        outlived its driver writes nothing. `area` begins as the name of what is temporary does."""

    def accept(self, area: str, name: str) -> None:
        """Take a blob or a whole group out of an area, under its name here; absence is no error, and
        a group that is held is kept."""

    def purge(self, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:
        """Remove the old versions of what was replaced or erased; what is left of them, or may be.
        `dry_run` counts what is there, and removes none."""
