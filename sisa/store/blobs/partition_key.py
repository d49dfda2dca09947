"""The secret of a model's partition at rest: 64 hexadecimal digits in a file of its owner's alone.

Rules: the content never reaches a message.

Not covered: where a model has it (`opening.py`); what is made of it (`digest.py`).

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     write_secret(Path(folder) / "key", bytes(KEY_BYTES))
...     read_secret(Path(folder) / "key") == bytes(KEY_BYTES)
True
"""

from __future__ import annotations

from pathlib import Path

from sisa.core.digest import KEY_BYTES
from sisa.core.errors import InvalidInput
from sisa.store.blobs import files


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
