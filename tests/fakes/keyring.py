"""Fake a keyring in memory: sealing by a stream of hashes, with keys as readable tokens.

Like the real one, it binds a sealed file to storage area, name, part and key, and makes a new key after
a destruction. `log` lists the destroyed keys, in order. It keeps nothing secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count

from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError
from sisa.store.blobs.keyring import MAGIC, RESTORE, is_sealed

TAG_BYTES, NONCE_BYTES = 32, 8


@dataclass(frozen=True)
class Plain:
    """Keyring of a model without encryption: it seals nothing, and refuses sealed bytes."""

    seals: bool = False

    def location(self, area: str, name: str) -> str:
        return f"{area}/{name}"

    def held(self, area: str) -> frozenset[str]:  # noqa: ARG002
        return frozenset()

    def seal(self, area: str, name: str, part: str, data: bytes) -> bytes:  # noqa: ARG002
        return data

    def unseal(self, area: str, name: str, part: str, data: bytes, where: str = "") -> bytes:  # noqa: ARG002
        if is_sealed(data):
            raise IntegrityError(
                "a file is encrypted, and there is no keyring",
                where=self.location(area, name),
                next_step=RESTORE,
            )
        return data

    def destroy(self, area: str, names: Collection[str]) -> None:
        """Do nothing: there are no keys."""


PLAIN = Plain()


class FakeKeyring:
    """A Keyring of tokens."""

    def __init__(self, *, seals: bool = True) -> None:
        self.seals = seals
        self.keys: dict[tuple[str, str], int] = {}
        self.log: list[tuple[str, str]] = []
        self._fresh = count(1)

    def location(self, area: str, name: str) -> str:
        return f"keyring/{area}/{name}"

    def held(self, area: str) -> frozenset[str]:
        return frozenset(name for where, name in self.keys if where == area)

    def seal(self, area: str, name: str, part: str, data: bytes) -> bytes:
        if not self.seals:
            return data
        token = self.keys.setdefault((area, name), next(self._fresh))
        nonce = next(self._fresh).to_bytes(NONCE_BYTES, "big")
        hidden = _stream(token, nonce, data)
        return MAGIC + nonce + _tag(token, nonce, area, name, part, hidden) + hidden

    def unseal(self, area: str, name: str, part: str, data: bytes, where: str = "") -> bytes:
        if not data.startswith(MAGIC):
            return data
        token = self.keys.get((area, name))
        if token is None:
            raise IntegrityError("the key is missing from the keyring")
        body = data[len(MAGIC) :]
        nonce, tag = body[:NONCE_BYTES], body[NONCE_BYTES : NONCE_BYTES + TAG_BYTES]
        hidden = body[NONCE_BYTES + TAG_BYTES :]
        if tag != _tag(token, nonce, area, name, part, hidden):
            raise IntegrityError("an encrypted file is not the one that was recorded", where=where)
        return _stream(token, nonce, hidden)

    def destroy(self, area: str, names: Collection[str]) -> None:
        for name in names:
            if self.keys.pop((area, name), None) is not None:
                self.log.append((area, name))


def _stream(token: int, nonce: bytes, data: bytes) -> bytes:
    pad = hashlib.shake_256(canonical_json([token, nonce.hex()])).digest(len(data))
    return bytes(one ^ other for one, other in zip(data, pad, strict=True))


def _tag(token: int, nonce: bytes, area: str, name: str, part: str, hidden: bytes) -> bytes:
    bound = canonical_json([token, nonce.hex(), area, name, part])
    return hashlib.sha256(bound + hidden).digest()
