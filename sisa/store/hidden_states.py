"""Hidden states at rest: one file per slice, the states of its records by their keyed digests.

    a file    sha256 of what follows, 64 characters and a line end; then safetensors, float32, lossless

The files are a cache. A file that is missing, cut short, changed or undecipherable counts as absent: its
states are computed and written again, so the ledger keeps no digest of it. A file holds nothing that the
records do not hold, and is erased with them, its key first. `planning/hidden_state_files.py` names the
files. Whoever can write to the storage could put other states there; `verify --replay` uses none and
detects that.
"""

from __future__ import annotations

from collections.abc import Mapping

from sisa.core.digest import sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import States
from sisa.store.areas import HIDDEN_STATES
from sisa.store.blobs.sealed_area import SealedArea

DIGEST_CHARS = 64


class FileHiddenStates(SealedArea):
    """A HiddenStateStore in a storage area."""

    area = HIDDEN_STATES

    def read(self, name: str) -> dict[str, States]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = self.plaintext(name, "file of hidden states")
            digest, body = data[:DIGEST_CHARS], data[DIGEST_CHARS + 1 :]
            return dict(load(body)) if digest.decode() == sha256_hex(body) else {}
        except (IntegrityError, SafetensorError, UnicodeDecodeError):
            return {}

    def write(self, name: str, states: Mapping[str, States]) -> None:
        import numpy as np
        from safetensors.numpy import save

        plain = {each: np.ascontiguousarray(found, np.float32) for each, found in states.items()}
        body = save(plain)
        self._put(name, sha256_hex(body).encode() + b"\n" + body)

    def num_bytes(self, start: str) -> int:
        return sum(self.blobs.num_bytes(each) for each in self.held() if each.startswith(start))

    def location(self, name: str) -> str:
        return self.blobs.location(name)
