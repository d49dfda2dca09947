"""The part of the scan for residue that concerns an object store: what `residue.py` asks of a directory.

    slice files          as recorded, and every row of a held record
    checkpoints          as recorded, and made of records that are all still held
    patches              as recorded, served or trained over
    old versions         none; where they can't be listed they can't be excluded
    all objects          known to the ledger, and without the strings that the caller gives

Rules: nothing is changed, and no byte touches a disk: objects are read into memory one at a time. The
rest is as in `residue.py`. Places are named by URI.

Not covered: objects outside the model's own prefix, replicas of the bucket, its access logs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sisa.audit.foreign_files import Residue, Unreadable, not_held, parquet_ids
from sisa.audit.found_groups import NONE, FoundGroups
from sisa.audit.search_strings import SearchStrings
from sisa.core.digest import sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import BlobStore
from sisa.flows.wiring.opening import CHECKPOINTS, PATCHES, RECORDS
from sisa.flows.wiring.world import World, known_by_area
from sisa.store.blobs.keyring import is_sealed
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import MANIFEST


def scan_objects(
    world: World, strings: SearchStrings, residue: list[Residue], counts: dict[str, int]
) -> tuple[str, ...]:
    """Scan the rooms that lie in an object store; adds to `residue` and `counts`, and names them."""
    rooms = {
        room: place for room, place in sorted(world.places.items()) if not isinstance(place, LocalBlobs)
    }
    for room, place in rooms.items():
        residue += _Room(world, room, place, strings, counts).scan()
    return tuple(place.location() for place in rooms.values())


@dataclass
class _Room:
    world: World
    room: str
    place: BlobStore
    strings: SearchStrings
    counts: dict[str, int]

    def scan(self) -> Iterator[Residue]:
        known = known_by_area(self.world).get(self.room, frozenset())
        for name in sorted(self.place.held()):
            parts = sorted(self.place.parts(name))
            if name not in known:
                yield self._found("unknown_file", name, "unknown to the ledger")
            plain = {part: self._read(f"{name}/{part}" if part else name) for part in parts or [""]}
            for part, data in plain.items():
                yield from self._strings(f"{name}/{part}" if part else name, data)
            if self.room == RECORDS:
                yield from self._slice(name, plain.get(""))
            elif MANIFEST in plain and self.room in (CHECKPOINTS, PATCHES):
                yield from self._group(name, plain)
        for kept in self.place.purge(dry_run=True):
            yield Residue("old_versions", kept.where, "", f"kept by the bucket: {kept.why}")

    def _found(self, kind: str, name: str, what: str, position: str = "") -> Residue:
        return Residue(kind, self.strings.hidden(self.place.location(name)), position, what)

    def _read(self, name: str) -> bytes | None:
        """An object's plaintext; None for one that no held key opens."""
        data = self.place.get(name, "object")
        self.counts["files"] += 1
        self.counts["bytes"] += len(data)
        group, _, part = name.partition("/")
        try:
            return self.world.keyring.unseal(self.room, group, part, data)
        except IntegrityError:
            self.counts["shredded"] += is_sealed(data)
            return None

    def _strings(self, name: str, data: bytes | None) -> Iterator[Residue]:
        for number in self.strings.in_value(name):
            yield self._found("string", "", f"string {number + 1} is in a name here", "name")
        for found in self.strings.in_file(Path(name), data or b""):
            what = f"string {found.number + 1} of {len(self.strings)} is here"
            yield self._found("string", name, what, found.position)

    def _slice(self, name: str, data: bytes | None) -> Iterator[Residue]:
        recorded = self._slices.get(name)
        if data is None or (recorded and sha256_hex(data) != recorded):
            if recorded:
                what = "not the recorded file, so that its content proves nothing"
                yield self._found("damaged", name, what)
            return
        ids: list[tuple[int, str | None]] = []
        try:
            ids.extend(enumerate(parquet_ids(io.BytesIO(data))))
        except Unreadable:
            what = "can't be decoded, so that its rows prove nothing"
            yield self._found("unreadable", name, what)
        self.counts["rows"] += len(ids)
        for kind, what, position in not_held(self.world, ids, ours=True):
            yield self._found(kind, name, what, position)

    def _group(self, key: str, plain: dict[str, bytes | None]) -> Iterator[Residue]:
        manifest = plain[MANIFEST]
        if manifest is None:
            return  # shredded; unknown above, or damaged below
        digests = {part: sha256_hex(data) for part, data in plain.items() if data is not None}
        found = self._groups.judge(manifest, lambda names: names.items() <= digests.items())
        self.counts[found.room] += 1
        if found.fault != NONE:
            yield self._found(found.fault[0], key, found.fault[1])
        elif (found.room, found.key) != (self.room, key):
            yield self._found("damaged", key, "its bytes are not those of its name")
        if not found.key:
            return
        for part in sorted(plain.keys() - found.names.keys() - {MANIFEST}):
            what = "a file that the manifest beside it does not name"
            yield self._found("unknown_file", f"{key}/{part}", what)

    @cached_property
    def _groups(self) -> FoundGroups:
        return FoundGroups(self.world)

    @cached_property
    def _slices(self) -> dict[str, str]:
        return {each.name: each.sha256 for each in self.world.ledger.slices()}
