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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import Record
from sisa.core.errors import IntegrityError
from sisa.core.patch import VaultSet
from sisa.core.ports import Keyring
from sisa.store.blobs import files
from sisa.store.blobs.keyring import is_sealed, shred

VAULT_AREA, DRAFTS_AREA = "vault", "runs"


class FileVault:
    """A Vault in a directory; its keyring encrypts."""

    def __init__(self, root: Path, keyring: Keyring) -> None:
        if not keyring.seals:
            raise TypeError("a vault is always encrypted")
        self.root = root
        self.keyring = keyring

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        data = encode(records)
        sealed = self.keyring.seal(VAULT_AREA, name, "", data)
        files.write_atomic(self.root / name, sealed)
        return sha256_hex(data), len(data)

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        return decode(self._bytes(found), self.root / found.name)

    def check(self, found: VaultSet) -> None:
        self._bytes(found)

    def _bytes(self, found: VaultSet) -> bytes:
        path = self.root / found.name

        def unseal(data: bytes) -> bytes:
            if not is_sealed(data):
                raise IntegrityError(
                    "a set of the vault is not encrypted",
                    where=str(path),
                    expected="bytes that its key sealed",
                    got="plain bytes",
                    next_step="release it by `sisa approx release`, and give the texts again",
                )
            return self.keyring.unseal(VAULT_AREA, found.name, "", data)

        return files.read_checked(path, found.sha256, "set of the vault", unseal)

    def held(self) -> frozenset[str]:
        return files.held_names(self.root) | self.keyring.held(VAULT_AREA)

    def erase(self, names: Collection[str]) -> None:
        shred(self.keyring, VAULT_AREA, names, partial(files.erase_all, self.root))


@dataclass(frozen=True)
class FilePatchDrafts:
    """Drafts of unfinished patches, a directory for each patch's key."""

    root: Path
    keyring: Keyring

    def held(self) -> frozenset[str]:
        return files.held_names(self.root) | self.keyring.held(DRAFTS_AREA)

    def erase(self, keys: Collection[str]) -> None:
        shred(self.keyring, DRAFTS_AREA, keys, partial(files.erase_all, self.root))


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
