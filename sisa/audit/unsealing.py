"""Files found anywhere, read with a model's own keys.

A sealed file's key is told by its place: its own name, or the name of the directory that it lies in. A
copy in another folder is opened like the original.

Rules: nothing is written. Plain files are left to be read where they lie. What no held key opens is
`Shredded`: either its key was destroyed, or it was never this model's; the bytes alone don't tell which.

Not covered: judging what was read (`residue.py`).

>>> from sisa.store.blobs.keyring import PLAIN
>>> SealedFiles(PLAIN).plaintext(Path(__file__)) is None
True
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sisa.core.digest import file_sha256, sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import Keyring
from sisa.flows.wiring.opening import (
    CHECKPOINTS,
    INDEX,
    PATCHES,
    PREFIXES,
    RECORDS,
    RUNS,
    SCRATCH,
    VAULT,
)
from sisa.store.blobs.keyring import MAGIC, is_sealed

ALONE = (RECORDS, INDEX, VAULT, PREFIXES)  # rooms of files
INSIDE = (CHECKPOINTS, PATCHES, RUNS, SCRATCH)  # rooms of directories of files


class Shredded(Exception):
    """A sealed file that no held key opens."""


class SealedFiles:
    """Reads files, plain and sealed; what keys there are is asked once."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._held = {room: keyring.held(room) for room in (*ALONE, *INSIDE)}

    def plaintext(self, path: Path) -> bytes | None:
        """What a sealed file holds; None for a plain one. Raises Shredded; OSError as `open` does."""
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            if not is_sealed(head):
                return None
            data = head + file.read()
        alone, inside = (path.name, ""), (path.parent.name, path.name)
        places = dict.fromkeys(ALONE, alone) | dict.fromkeys(INSIDE, inside)
        for room, (name, part) in places.items():
            if name in self._held[room]:
                with contextlib.suppress(IntegrityError):
                    return self._keyring.unseal(room, name, part, data)
        raise Shredded

    def read(self, path: Path) -> bytes:
        """A file's plaintext, sealed or not. Raises as `plaintext`."""
        found = self.plaintext(path)
        return path.read_bytes() if found is None else found

    def sha256(self, path: Path) -> str:
        """The digest of a file's plaintext. Raises as `plaintext`."""
        found = self.plaintext(path)
        return file_sha256(path) if found is None else sha256_hex(found)
