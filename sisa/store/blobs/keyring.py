"""Keys at rest: one for each data file, and the partition key.

    KEYRING/AREA/NAME    32 random bytes (mode 0600, in directories of mode 0700) for the data file NAME
    a sealed file        magic line, nonce of 12 random bytes, ciphertext, tag of 16 bytes (AES-256-GCM)
    partition.key        64 hexadecimal digits

Destroying a key erases every copy of what it sealed. The tag covers area, name and part (the file inside
a checkpoint directory), so that no sealed file passes for another. A key is durable before anything is
sealed with it, and its name never holds half a key: the name appears by a link, and disappears by a
rename before the key is overwritten. A crash leaves keys under temporary names, which `held` lists, so
that a later command destroys them. Plain bytes are returned as they are: a model that is partly
encrypted can be read, and digests show what is right.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     keyring = FileKeyring(Path(folder) / "keyring")
...     sealed = keyring.seal("records", "a.parquet", "", b"PAR1")
...     sealed.startswith(MAGIC), keyring.unseal("records", "a.parquet", "", sealed)
(True, b'PAR1')
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sisa.core.digest import KEY_BYTES, canonical_json
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.store.blobs import files

MAGIC = b"SISA-AES-256-GCM\n"
NONCE_BYTES = 12
RESTORE = "put the keyring back where `keyring:` of the run file names it, or restore it from a backup"


def is_sealed(data: bytes) -> bool:
    """Return whether bytes are, or begin, a sealed file."""
    return data.startswith(MAGIC)


@dataclass(frozen=True)
class FileKeyring:
    """A Keyring in a directory. With `seals=False` it reads sealed files and seals no new ones."""

    root: Path
    seals: bool = True
    makes_keys: bool = True

    def lend(self, area: str, names: Iterable[str]) -> FileKeyring:
        """Create the keys for a run's workers, and return a keyring that creates none."""
        for name in names if self.seals else ():
            if self._key(area, name) is None:
                self._create(area, name)
        return replace(self, makes_keys=False)

    def location(self, area: str, name: str) -> str:
        return str(self.root / area / name)

    def held(self, area: str) -> frozenset[str]:
        return files.held_names(self.root / area)

    def seal(self, area: str, name: str, part: str, data: bytes) -> bytes:
        if not self.seals:
            return data
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key(area, name)
        if key is None and not self.makes_keys:
            raise EnvironmentFault(
                "the key of a file is no longer in the keyring: its run is over",
                where=self.location(area, name),
                next_step="run the command again: what is finished is kept",
            )
        key = key or self._create(area, name)
        nonce = os.urandom(NONCE_BYTES)
        return MAGIC + nonce + AESGCM(key).encrypt(nonce, data, _associated_data(area, name, part))

    def unseal(self, area: str, name: str, part: str, data: bytes, where: str = "") -> bytes:
        if not is_sealed(data):
            return data
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key(area, name)
        if key is None:
            raise IntegrityError(
                "a file is encrypted, and its key is missing from the keyring",
                where=self.location(area, name),
                expected="its key",
                got="no key",
                next_step=f"{RESTORE}; a key that was destroyed is gone, and the file with it",
            )
        body = memoryview(data)[len(MAGIC) :]
        try:
            nonce, sealed = bytes(body[:NONCE_BYTES]), body[NONCE_BYTES:]
            return AESGCM(key).decrypt(nonce, sealed, _associated_data(area, name, part))
        except (InvalidTag, ValueError):
            raise IntegrityError(
                "an encrypted file is not the one that was recorded",
                where=where or "/".join(filter(None, (area, name, part))),
                expected="bytes that its key sealed",
                got="other bytes",
                next_step="restore the file from a backup, or run `sisa doctor`",
            ) from None

    def destroy(self, area: str, names: Collection[str]) -> None:
        folder = self.root / area
        with files.disk_errors(folder):
            doomed = []
            for name in names:
                aside = folder / f"{files.TEMPORARY_PREFIX}{uuid.uuid4().hex}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder / name, aside)
                    doomed.append((aside, name.startswith(files.TEMPORARY_PREFIX)))
            if not doomed:
                return
            files.sync_directory(folder)  # after a crash no name may hold a key of zeros
            for path, temporary in doomed:
                # A temporary name with a second link may be a key in use, whose creator was killed.
                if not temporary or path.lstat().st_nlink == 1:
                    files.overwrite(path)
                files.erase(path)
            files.sync_directory(folder)

    def _key(self, area: str, name: str) -> bytes | None:
        path = self.root / area / name
        with files.disk_errors(path):
            try:
                key = path.read_bytes()
            except FileNotFoundError:
                return None
        if len(key) != KEY_BYTES or not any(key):
            raise IntegrityError(
                "a key of the keyring is damaged",
                where=str(path),
                expected=f"{KEY_BYTES} random bytes",
                next_step="restore the keyring from a backup",
            )
        return key

    def _create(self, area: str, name: str) -> bytes:
        # Another worker's key serves as well.
        files.write_atomic(self.root / area / name, os.urandom(KEY_BYTES), keep_existing=True)
        key = self._key(area, name)
        if key is None:
            raise IntegrityError("a new key vanished from the keyring", where=self.location(area, name))
        return key


def _associated_data(area: str, name: str, part: str) -> bytes:
    return canonical_json([area, name, part])


def read_secret(path: Path) -> bytes:
    """Return a partition key from its file. Raise InvalidInput."""
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise InvalidInput(
            "the partition key can't be read", where=str(path), got=str(error.strerror)
        ) from None
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise InvalidInput(
            "the file is not a partition key",
            where=str(path),
            expected="64 hexadecimal digits",
            next_step="copy the partition.key of a model, or write 32 random bytes in hexadecimal",
        )
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Write a partition key, readable by its owner alone."""
    files.write_atomic(path, secret.hex().encode() + b"\n")
