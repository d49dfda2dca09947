"""Sealed files: a storage area whose files a keyring encrypts as they are written.

A file is sealed under its area, its name and its part, so no sealed file passes for another. Plain files
can be read, too: an interrupted `reseal_blobs` leaves some of either kind. What form a file has at rest
is known here alone, and to the audits that search bytes wherever they are (`audit/residue.py`,
`audit/foreign_files.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from sisa.core.errors import all_tried
from sisa.core.ports import BlobStore, Keyring
from sisa.store.blobs import files
from sisa.store.blobs.keyring import is_sealed
from sisa.store.blobs.local_blobs import LocalBlobs


class SealedArea:
    """A storage area in a blob store, or in a directory of this machine."""

    area: str

    def __init__(self, blobs: BlobStore | Path, keyring: Keyring, area: str | None = None) -> None:
        self.blobs = LocalBlobs(blobs) if isinstance(blobs, Path) else blobs
        self.keyring = keyring
        self.area = self.area if area is None else area

    def held(self) -> frozenset[str]:
        return self.blobs.held()

    def erase(self, names: Collection[str]) -> None:
        with all_tried() as tried:  # an error of one step does not prevent the other
            with tried():
                self.keyring.destroy(self.area, names)
            with tried():
                self.blobs.erase(names)

    def _put(self, name: str, data: bytes) -> None:
        self.blobs.put(name, self.keyring.seal(self.area, name, "", data))

    def _put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        sealed = {part: self.keyring.seal(self.area, name, part, data) for part, data in parts.items()}
        self.blobs.put_group(name, sealed)

    def plaintext(self, name: str, what: str) -> bytes:
        """Return the plaintext of a file `NAME` or `GROUP/PART`, sealed or not.

        Raise IntegrityError, which names its location, if the `what` is missing or its seal is broken.
        """
        group, _, part = name.partition("/")
        data, where = self.blobs.get(name, what), self.blobs.location(name)
        return self.keyring.unseal(self.area, group, part, data, where)

    def checked(self, name: str, sha256: str, what: str) -> bytes:
        """Return the plaintext with the recorded digest. Raise IntegrityError for any other."""
        return files.verified(self.plaintext(name, what), sha256, what, self.blobs.location(name))


def reseal_blobs(blobs: BlobStore, area: str, names: Iterable[str], keyring: Keyring) -> None:
    """Bring stored files to the form that a keyring writes now, under their names; digests stay.

    After an interruption some files are sealed and some are plain, and all can be read. The key of a
    plain file is destroyed. Raise IntegrityError if a file or its key is missing. Old versions are
    left to `BlobStore.purge`.
    """
    for name in names:
        for part in sorted(blobs.parts(name)) or [""]:
            file = f"{name}/{part}" if part else name
            data = blobs.get(file, "file of the model")
            if is_sealed(data) != keyring.seals:
                plain = keyring.unseal(area, name, part, data)
                blobs.put(file, keyring.seal(area, name, part, plain))
        if not keyring.seals:
            keyring.destroy(area, [name])
