"""The vault at rest: encrypted sets of texts, and drafts of patches, whatever the model's `encrypt:`
says.

A set is one file, written whole or not at all. Its name is the set's name, so that nothing of its
content can be guessed from it. Its key is outside the model's directory and is destroyed before the file
is erased. A file that is not encrypted is refused, even with the right bytes. Digests and sizes are of
the plaintext: the canonical JSON of the records in the order they were put.

>>> import tempfile
>>> from sisa.core.domain import Part
>>> from sisa.store.blobs.keyring import FileKeyring
>>> with tempfile.TemporaryDirectory() as folder:
...     vault = FileVault(Path(folder) / "vault", FileKeyring(Path(folder) / "keys"))
...     record = Record("r1", None, "text", (Part("text", "Ada wrote it."),))
...     sha256, num_bytes = vault.put("a" * 64, [record])
...     vault.read(VaultSet("a" * 64, "forget", 1, "asked", "now", sha256, num_bytes)) == (record,)
True
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import Record
from sisa.core.errors import IntegrityError
from sisa.core.patch import VaultSet
from sisa.core.ports import Keyring
from sisa.store.blobs import files
from sisa.store.blobs.keyring import SealedArea, is_sealed

VAULT_AREA, DRAFTS_AREA = "vault", "runs"


class FileVault(SealedArea):
    """A Vault in a directory; its keyring encrypts."""

    area = VAULT_AREA

    def __init__(self, root: Path, keyring: Keyring) -> None:
        if not keyring.seals:
            raise TypeError("a vault is always encrypted")
        super().__init__(root, keyring)
        self.root = root

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        data = encode(records)
        self._put(name, data)
        return sha256_hex(data), len(data)

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        return decode(self._bytes(found), self.root / found.name)

    def check(self, found: VaultSet) -> None:
        self._bytes(found)

    def _bytes(self, found: VaultSet) -> bytes:
        what, where = "set of the vault", str(self.root / found.name)
        data = self.blobs.get(found.name, what)
        if not is_sealed(data):
            raise IntegrityError(
                f"a {what} is not encrypted",
                where=where,
                expected="bytes that its key sealed",
                got="plain bytes",
                next_step="release it by `sisa approx release`, and give the texts again",
            )
        plain = self.keyring.unseal(self.area, found.name, "", data)
        return files.verified(plain, found.sha256, what, where)

    def held(self) -> frozenset[str]:
        return super().held() | self.keyring.held(self.area)


class FilePatchDrafts(SealedArea):
    """Drafts of unfinished patches, a directory for each patch's key."""

    area = DRAFTS_AREA

    def held(self) -> frozenset[str]:
        return super().held() | self.keyring.held(self.area)


def encode(records: Sequence[Record]) -> bytes:
    """Return records as the one byte string of their content."""
    return canonical_json([each.to_list() for each in records])


def decode(data: bytes, path: Path) -> tuple[Record, ...]:
    """Return the records that `encode` wrote.

    Raises IntegrityError, which names `path`, for anything else.
    """
    try:
        return tuple(Record.from_list(each) for each in json.loads(data))
    except (ValueError, TypeError) as error:
        raise IntegrityError(
            "a set of the vault can't be parsed",
            where=str(path),
            expected="records as this version writes them",
            got=type(error).__name__,
        ) from error
