"""Hidden states at rest: one file per slice, the states of its records by their keyed digests.

    a file    sha256 of what follows, 64 characters and a line end; then safetensors, float32, lossless

Rules: a cache. A file that is missing, cut short, changed or can't be opened is as good as none: its
states are computed again and it is written anew, so the ledger keeps no digest of it. It holds nothing
that the records do not hold, and goes with them: what the ledger's slices do not name is swept, its key
first. Keys and places are as those of slices.

Not covered: what names a file (`planning/prefix_names.py`); computing states
(`lm/train/frozen_prefix.py`). Whoever may write to the model's places could put other states there:
`verify --replay` uses none and would tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from sisa.core.digest import sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import BlobStore, Keyring, States
from sisa.store.blobs.keyring import PLAIN, shred
from sisa.store.blobs.local_blobs import LocalBlobs

PREFIXES_AREA = "prefixes"
DIGEST_CHARS = 64


class FilePrefixes:
    """A PrefixStore in a place; a path is a directory on this machine's disk."""

    def __init__(self, place: BlobStore | Path, keyring: Keyring = PLAIN) -> None:
        self.place = LocalBlobs(place) if isinstance(place, Path) else place
        self.keyring = keyring

    def read(self, name: str) -> dict[str, States]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = self.keyring.unseal(
                PREFIXES_AREA, name, "", self.place.get(name, "file of hidden states")
            )
            digest, body = data[:DIGEST_CHARS], data[DIGEST_CHARS + 1 :]
            return dict(load(body)) if digest.decode() == sha256_hex(body) else {}
        except (IntegrityError, SafetensorError, UnicodeDecodeError):
            return {}

    def write(self, name: str, states: Mapping[str, States]) -> None:
        from safetensors.numpy import save

        plain = {each: np.ascontiguousarray(found, np.float32) for each, found in states.items()}
        body = save(plain)
        data = sha256_hex(body).encode() + b"\n" + body
        self.place.put(name, self.keyring.seal(PREFIXES_AREA, name, "", data))

    def num_bytes(self, start: str) -> int:
        return sum(self.place.num_bytes(each) for each in self.held() if each.startswith(start))

    def held(self) -> frozenset[str]:
        return self.place.held()

    def erase(self, names: Collection[str]) -> None:
        shred(self.keyring, PREFIXES_AREA, names, self.place.erase)

    def location(self, name: str) -> str:
        return self.place.location(name)
