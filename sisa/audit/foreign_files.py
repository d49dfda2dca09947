"""Read untrusted files, wherever they are: plaintext, record ids and vectors.

Files are read with the model's own keys. The path of a sealed file names its key: the file's own name,
or the name of its directory, so a copy in another folder opens like the original. The caller decides
whether a file may be parsed at all (`residue.py`).

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder) / "rows.jsonl"
...     _ = path.write_text('{"id": "r1"}\\n{"id": 7}\\nno JSON\\n')
...     list(json_ids(path))
['r1', '7', None]
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sisa.core.digest import file_sha256, sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import Keyring
from sisa.store import areas
from sisa.store.blobs.keyring import MAGIC, is_sealed
from sisa.store.blobs.sqlite_files import read_beside

BATCH_ROWS = 16_384  # looking up an unknown id reads every row, so it is done once a batch


class Unreadable(Exception):
    """Raised for bytes that can't be decoded."""


class Shredded(Exception):
    """Raised for a sealed file that no held key opens: destroyed, or another model's."""


class SealedFiles:
    """Read plain and sealed files; the keyring is listed once."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._held = {area: keyring.held(area) for area in (*areas.FILE_AREAS, *areas.GROUP_AREAS)}

    def plaintext(self, path: Path) -> bytes | None:
        """Return the plaintext of a sealed file; None for a plain file. Raise Shredded and OSError."""
        with read_beside(path) as file:
            head = file.read(len(MAGIC))
            if not is_sealed(head):
                return None
            data = head + file.read()
        alone, inside = (path.name, ""), (path.parent.name, path.name)
        places = dict.fromkeys(areas.FILE_AREAS, alone) | dict.fromkeys(areas.GROUP_AREAS, inside)
        for area, (name, part) in places.items():
            if name in self._held[area]:
                with contextlib.suppress(IntegrityError):
                    return self._keyring.unseal(area, name, part, data)
        raise Shredded

    def read(self, path: Path) -> bytes:
        """Return a file's plaintext, sealed or not. Raise the errors of `plaintext`."""
        found = self.plaintext(path)
        return path.read_bytes() if found is None else found

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's plaintext. Raise the errors of `plaintext`."""
        found = self.plaintext(path)
        return file_sha256(path) if found is None else sha256_hex(found)


def parquet_ids(source: Path | io.BytesIO) -> Iterator[str | None]:
    """Yield the id of each row, or None. Raise Unreadable for no Parquet, or without a column `id`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            if "id" not in file.schema_arrow.names:
                raise Unreadable
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["id"]):
                yield from (None if each is None else str(each) for each in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise Unreadable from error


def json_ids(path: Path) -> Iterator[str | None]:
    """Yield the id of each line of a JSON Lines file; None for a line without an object with an id."""
    with path.open("rb") as file:
        for line in file:
            try:
                value: Any = json.loads(line)
                found = value.get("id") if isinstance(value, dict) else None
                if isinstance(found, int) and not isinstance(found, bool):
                    found = str(found)  # as records are read
                yield found if isinstance(found, str) and found.encode() else None
            except (ValueError, RecursionError):  # not JSON, or an id that is not text
                yield None


def vector_ids(data: bytes) -> list[int]:
    """Return the sorted ids in a FAISS index, which C++ parses: verify the digest of `data` before."""
    import faiss
    import numpy as np

    index: Any = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    return sorted({int(each) for each in faiss.vector_to_array(index.id_map)})
