"""The vault at rest: the texts that patches are made from, and drafts of unfinished patches.

Both are always encrypted, even without `encrypt:`, with keys outside the model's directory. A set is one
file under the set's name: the canonical JSON of its records in the order they were put. A file that is
not encrypted is refused, even with the right bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import Record
from sisa.core.errors import IntegrityError
from sisa.core.patches import VaultSet
from sisa.core.ports import BlobStore, Keyring
from sisa.store.areas import RUNS, VAULT
from sisa.store.blobs import files
from sisa.store.blobs.keyring import is_sealed
from sisa.store.blobs.sealed_area import SealedArea


class AlwaysSealedArea(SealedArea):
    """A storage area that is encrypted even without `encrypt:`; keys without a file are listed, too."""

    def __init__(self, blobs: BlobStore | Path, keyring: Keyring) -> None:
        if not keyring.seals:
            raise TypeError("a vault is always encrypted")
        super().__init__(blobs, keyring)

    def held(self) -> frozenset[str]:
        return super().held() | self.keyring.held(self.area)


class FilePatchDrafts(AlwaysSealedArea):
    """Drafts of unfinished patches, a directory for each patch's key."""

    area = RUNS


class FileVault(AlwaysSealedArea):
    """A Vault in a directory."""

    area = VAULT

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        data = canonical_json([each.to_list() for each in records])
        self._put(name, data)
        return sha256_hex(data), len(data)

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        data = self._bytes(found)
        try:
            return tuple(Record.from_list(each) for each in json.loads(data))
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                "a set of the vault can't be parsed",
                where=self.blobs.location(found.name),
                expected="records as this version writes them",
                got=type(error).__name__,
            ) from error

    def check(self, found: VaultSet) -> None:
        self._bytes(found)

    def _bytes(self, found: VaultSet) -> bytes:
        what, where = "set of the vault", self.blobs.location(found.name)
        data = self.blobs.get(found.name, what)
        if not is_sealed(data):
            raise IntegrityError(
                f"a {what} is not encrypted",
                where=where,
                expected="bytes that its key sealed",
                got="plain bytes",
                next_step="release it by `sisa approx release`, and give the texts again",
            )
        plain = self.keyring.unseal(self.area, found.name, "", data, where)
        return files.verified(plain, found.sha256, what, where)
