"""Unfinished patches at rest: what a run put aside, under the key of its patch, sealed as the vault is.

Rules: whoever makes a patch writes there, in a directory of the patch's key, with a key of the room
`runs`. The key goes before the files.

Not covered: what is in them (`approx/unlearning/saved_run.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sisa.core.ports import Keyring
from sisa.store.blobs import files
from sisa.store.blobs.keyring import shred

DRAFTS_AREA = "runs"


@dataclass(frozen=True)
class FilePatchDrafts:
    """Runs in a directory."""

    root: Path
    keyring: Keyring

    def held(self) -> frozenset[str]:
        return files.held_names(self.root) | self.keyring.held(DRAFTS_AREA)

    def erase(self, keys: Collection[str]) -> None:
        shred(self.keyring, DRAFTS_AREA, keys, partial(files.erase_all, self.root))
