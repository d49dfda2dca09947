"""Canonical bytes and digests: the one way to turn an object into a name.

`canonical_json` is the only serialisation that is ever hashed (sorted keys, no spaces, UTF-8, no NaN).
Plain digests name weights, files and jobs. Anything derived from a record (its id, subject or content)
is hashed with the model's secret, so that it can't be found by guessing. Each purpose has its own
derived key; parts are length-prefixed, so ("ab", "c") is not ("a", "bc").

>>> canonical_json({"b": 1, "a": [2.5, None]})
b'{"a":[2.5,null],"b":1}'
>>> keyed = Keyed(b"0" * 32)
>>> keyed.digest("id", "r1") == keyed.digest("subject", "r1")
False
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEY_BYTES = 32
BLOCK_BYTES = 1 << 24  # between two small ones the process would often wait for other threads


def canonical_json(value: Any) -> bytes:
    """Return the one byte string of a JSON value. Raise ValueError for NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def sha256_hex(data: bytes) -> str:
    """Return the hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """Return the hex SHA-256 of a JSON value's canonical bytes."""
    return sha256_hex(canonical_json(value))


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks. Raise OSError as `open` does."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def file_sha256_once(path: Path) -> str:
    """Return a file's hex SHA-256; read the file again only when its state on disk has changed."""
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _sha256_once(path, state)


@functools.lru_cache(maxsize=256)
def _sha256_once(path: Path, _state: tuple[int, ...]) -> str:
    return file_sha256(path)


def patched_digest(base: str, adapters: Sequence[str]) -> str:
    """Return the digest of a base with patches on it, given their adapters' sha256, lowest first."""
    return digest_of({"base": base, "patches": list(adapters)}) if adapters else base


class Keyed:
    """Keyed digests (HMAC-SHA256) under one secret, a derived key for each purpose."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes, expected {KEY_BYTES}")
        self._secret = secret
        self._derived: dict[str, hmac.HMAC] = {}

    def digest(self, purpose: str, *parts: str) -> str:
        """Return the hex HMAC of the length-prefixed parts under the key of `purpose`."""
        base = self._derived.get(purpose)
        if base is None:
            key = hmac.digest(self._secret, b"sisa/" + purpose.encode(), "sha256")
            base = self._derived[purpose] = hmac.new(key, digestmod="sha256")
        mac = base.copy()
        for part in parts:
            data = part.encode("utf-8")
            mac.update(len(data).to_bytes(8, "big") + data)
        return mac.hexdigest()

    def number(self, purpose: str, bound: int, *parts: str) -> int:
        """Return a number in [0, bound), uniform up to a bias below bound / 2**256."""
        return int(self.digest(purpose, *parts), 16) % bound

    @property
    def name(self) -> str:
        """Return the public name of the secret; it does not reveal the secret."""
        return self.digest("name")
