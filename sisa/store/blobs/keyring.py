"""Keys at rest, one for each data file: destroying a key erases every copy of what it sealed.

    KEYRING/ROOM/NAME    32 random bytes (mode 0600, in directories of mode 0700) for the data file NAME
    a sealed file        magic line, nonce of 12 random bytes, ciphertext, tag of 16 bytes (AES-256-GCM)

Rules: the tag covers room, name and part (the file inside a checkpoint directory), so that no sealed
file passes for another. A key is durable before anything is sealed with it, and its name never bears
half a key: it appears by a link and goes by a rename, before it is overwritten. What a crash leaves
under a temporary name is among the held names, so that a sweep destroys it. Plain bytes are passed on
as they are: a model that is half sealed or half unsealed reads, and digests tell what is right.

Not covered: which keys are needed (`reconcile.py`); copies of the keyring itself; what a disk keeps of
overwritten or unlinked blocks.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     keyring = FileKeyring(Path(folder) / "keyring")
...     sealed = keyring.seal("records", "a.parquet", "", b"PAR1")
...     sealed.startswith(MAGIC), keyring.unseal("records", "a.parquet", "", sealed)
...     keyring.destroy("records", ["a.parquet"])
...     keyring.held("records")
(True, b'PAR1')
frozenset()
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sisa.core.digest import KEY_BYTES, canonical_json
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput, all_tried
from sisa.core.ports import BlobStore, Keyring
from sisa.store.blobs import files

MAGIC = b"SISA-AES-256-GCM\n"
NONCE_BYTES = 12
Erase = Callable[[Collection[str]], None]
RESTORE = "put the keyring back where `keyring:` of the run file names it, or restore it from a backup"


def is_sealed(data: bytes) -> bool:
    """Whether bytes are (or begin) a sealed file."""
    return data.startswith(MAGIC)


@dataclass(frozen=True)
class Plain:
    """The keyring of a model that has none: it seals nothing, and opens nothing that is sealed."""

    seals: bool = False

    def location(self, room: str, name: str) -> str:
        return f"{room}/{name}"

    def held(self, room: str) -> frozenset[str]:  # noqa: ARG002
        return frozenset()

    def seal(self, room: str, name: str, part: str, data: bytes) -> bytes:  # noqa: ARG002
        return data

    def unseal(self, room: str, name: str, part: str, data: bytes) -> bytes:  # noqa: ARG002
        if is_sealed(data):
            raise IntegrityError(
                "a file is encrypted, and there is no keyring",
                where=self.location(room, name),
                next_step=RESTORE,
            )
        return data

    def destroy(self, room: str, names: Collection[str]) -> None:
        """There is nothing to destroy."""


PLAIN = Plain()


@dataclass(frozen=True)
class FileKeyring:
    """A Keyring in a directory. With `seals=False` it opens what is sealed and seals nothing more."""

    root: Path
    seals: bool = True
    makes_keys: bool = True

    def lend(self, room: str, names: Iterable[str]) -> FileKeyring:
        """Make the keys of these files, for a run's workers: theirs is a keyring that makes none, so
        that nothing can be sealed any more once a key is destroyed."""
        for name in names if self.seals else ():
            if self._key(room, name) is None:
                self._create(room, name)
        return replace(self, makes_keys=False)

    def location(self, room: str, name: str) -> str:
        return str(self.root / room / name)

    def held(self, room: str) -> frozenset[str]:
        with files.disk_errors(self.root / room):
            return files.held_names(self.root / room)

    def seal(self, room: str, name: str, part: str, data: bytes) -> bytes:
        if not self.seals:
            return data
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key(room, name)
        if key is None and not self.makes_keys:
            raise EnvironmentFault(
                "the key of a file is not in the keyring any more: its run is over",
                where=self.location(room, name),
                next_step="run the command again: what is finished is kept",
            )
        key = key or self._create(room, name)
        nonce = os.urandom(NONCE_BYTES)
        return MAGIC + nonce + AESGCM(key).encrypt(nonce, data, _bound(room, name, part))

    def unseal(self, room: str, name: str, part: str, data: bytes) -> bytes:
        if not is_sealed(data):
            return data
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key(room, name)
        if key is None:
            raise IntegrityError(
                "a file is encrypted, and its key is missing from the keyring",
                where=self.location(room, name),
                expected="its key",
                got="no key",
                next_step=f"{RESTORE}; a key that was destroyed is gone, and the file with it",
            )
        body = memoryview(data)[len(MAGIC) :]
        try:
            nonce, sealed = bytes(body[:NONCE_BYTES]), body[NONCE_BYTES:]
            return AESGCM(key).decrypt(nonce, sealed, _bound(room, name, part))
        except (InvalidTag, ValueError):
            raise IntegrityError(
                "an encrypted file is not the one that was recorded",
                where=f"{room}/{name}/{part}" if part else f"{room}/{name}",
                expected="bytes that its key sealed",
                got="other bytes",
                next_step="restore the file from a backup, or run `sisa doctor`",
            ) from None

    def destroy(self, room: str, names: Collection[str]) -> None:
        folder = self.root / room
        with files.disk_errors(folder):
            doomed = []
            for name in names:
                aside = folder / f"{files.TEMPORARY_PREFIX}{uuid.uuid4().hex}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder / name, aside)
                    doomed.append((aside, name.startswith(files.TEMPORARY_PREFIX)))
            if not doomed:
                return
            files.sync_directory(folder)  # no name may come back with zeros as its key
            for path, temporary in doomed:
                # A temporary name with a second one may be that of a key in use: its maker was killed.
                if not temporary or path.lstat().st_nlink == 1:
                    files.overwrite(path)
                files.erase(path)
            files.sync_directory(folder)

    def _key(self, room: str, name: str) -> bytes | None:
        path = self.root / room / name
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

    def _create(self, room: str, name: str) -> bytes:
        folder = self.root / room
        with files.disk_errors(folder):
            files.make_directory(folder)
            handle, temporary = tempfile.mkstemp(prefix=files.TEMPORARY_PREFIX, dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(os.urandom(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):  # another worker's key is as good
                    os.link(temporary, folder / name)
            finally:
                os.unlink(temporary)
            files.sync_directory(folder)
        key = self._key(room, name)
        if key is None:
            raise IntegrityError("a new key vanished from the keyring", where=self.location(room, name))
        return key


def shred(keyring: Keyring, room: str, names: Collection[str], erase: Erase) -> None:
    """Destroy keys, then `erase` what they seal; one that fails does not keep the other from it."""
    with all_tried() as tried:
        with tried():
            keyring.destroy(room, names)
        with tried():
            erase(names)


def _bound(room: str, name: str, part: str) -> bytes:
    return canonical_json([room, name, part])


def reseal_blobs(place: BlobStore, room: str, names: Iterable[str], keyring: Keyring) -> None:
    """Bring held files to the form that a keyring gives now, under their names; digests stay.

    Cut short, some are sealed and some are plain, and all are read. A key goes when its file is plain.
    Raises IntegrityError when a file or its key is missing. Old versions are left to `Place.purge`.
    """
    for name in names:
        for part in sorted(place.parts(name)) or [""]:
            file = f"{name}/{part}" if part else name
            data = place.get(file, "file of the model")
            if is_sealed(data) != keyring.seals:
                plain = keyring.unseal(room, name, part, data)
                place.put(file, keyring.seal(room, name, part, plain))
        if not keyring.seals:
            keyring.destroy(room, [name])


def read_secret(path: Path) -> bytes:
    """A secret at rest: 64 hexadecimal digits. The content never reaches a message."""
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
            "that is not a partition key",
            where=str(path),
            expected="64 hexadecimal digits",
            next_step="copy the partition.key of a model, or write 32 random bytes in hexadecimal",
        )
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Keep the secret, readable by its owner alone."""
    files.write_atomic(path, secret.hex().encode() + b"\n")
