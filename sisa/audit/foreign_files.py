"""Read untrusted files, wherever they are: plaintext, record ids and vectors.

Files are read with the model's own keys. The path of a sealed file names its key: the file's own name,
or the name of its directory, so a copy in another folder opens like the original. The caller decides
whether a file may be parsed at all (`residue.py`).

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder) / "rows.jsonl"
...     _ = path.write_text('{"id": "r1"}\\n{"id": 7}\\nno JSON\\n')
...     list(json_ids(path))
[('r1',), ('7',), ()]
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sisa.core.digest import file_sha256, sha256_hex
from sisa.core.errors import IntegrityError
from sisa.core.ports import Keyring
from sisa.store import areas
from sisa.store.blobs.keyring import MAGIC, is_sealed
from sisa.store.blobs.sqlite_files import read_beside

Ids = tuple[str, ...]  # of a row; several if several columns may hold its id
OWN_ID = ("id",)  # the column in files of a model
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


def parquet_ids(source: Path | io.BytesIO, columns: Sequence[str] = OWN_ID) -> Iterator[Ids]:
    """Yield the ids of each row. Raise Unreadable for no Parquet, or without any of the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            held = _held(columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=held):
                yield from _batch_ids(batch, held)
    except (pa.ArrowException, OSError) as error:
        raise Unreadable from error


def arrow_ids(path: Path, columns: Sequence[str]) -> Iterator[Ids]:
    """Yield the ids of each row of a file of a saved dataset. Raise Unreadable as `parquet_ids`."""
    import pyarrow as pa

    try:
        with path.open("rb") as file, pa.ipc.open_stream(file) as batches:
            held = _held(columns, batches.schema.names)
            for batch in batches:
                yield from _batch_ids(batch, held)
    except (pa.ArrowException, OSError) as error:
        raise Unreadable from error


def _held(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return those of the columns that a table has. Raise Unreadable if there are none."""
    if not (held := [each for each in columns if each in names]):
        raise Unreadable
    return held


def _batch_ids(batch: Any, held: Sequence[str]) -> Iterator[Ids]:
    for row in zip(*(batch.column(each).to_pylist() for each in held), strict=True):
        yield tuple(str(each) for each in row if each is not None)


def json_ids(path: Path, columns: Sequence[str] = OWN_ID) -> Iterator[Ids]:
    """Yield the ids of each line of a JSON Lines file; none for a line without an object with an id."""
    with path.open("rb") as file:
        for line in file:
            try:
                value: Any = json.loads(line)
            except (ValueError, RecursionError):  # not JSON
                value = None
            found = [value.get(each) for each in columns] if isinstance(value, dict) else []
            yield tuple(str(each) for each in found if _is_id(each))


def _is_id(value: Any) -> bool:
    """Return whether a JSON value may be an id: a whole number, or a string without lone surrogates."""
    if isinstance(value, str):
        return not any("\ud800" <= each <= "\udfff" for each in value)
    return isinstance(value, int) and not isinstance(value, bool)


def vector_ids(data: bytes) -> list[int]:
    """Return the sorted ids in a FAISS index, which C++ parses: verify the digest of `data` before."""
    import faiss
    import numpy as np

    index: Any = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    return sorted({int(each) for each in faiss.vector_to_array(index.id_map)})
