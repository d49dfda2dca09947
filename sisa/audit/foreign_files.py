"""Ids and vectors out of files that are found anywhere, whoever wrote them; what the ledger says of ids.

Rules: only what is asked for is read, a batch at a time. Bytes that can't be decoded are `Unreadable`.

Not covered: whether a file may be parsed at all (`residue.py`, `stored_residue.py`).

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder) / "rows.jsonl"
...     _ = path.write_text('{"id": "r1"}\\nno JSON\\n')
...     list(json_ids(path))
['r1', None]
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.core.domain import Tombstone
from sisa.flows.wiring.world import World

BATCH_ROWS = 16_384  # an unknown id costs a look at every row: once a batch


@dataclass(frozen=True, slots=True)
class Residue:
    """One thing that is left or can't be excluded: `kind` for programs, `what` for people."""

    kind: str
    where: str
    position: str
    what: str


class Unreadable(Exception):
    """Bytes that can't be decoded."""


def parquet_ids(source: Path | io.BytesIO) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            if "id" not in file.schema_arrow.names:
                raise Unreadable
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["id"]):
                yield from (str(each) for each in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise Unreadable from error


def json_ids(path: Path) -> Iterator[str | None]:
    """Ids of JSON lines; None for a line that is no object with an id."""
    with path.open("rb") as file:
        for line in file:
            try:
                value: Any = json.loads(line)
                found = value.get("id") if isinstance(value, dict) else None
                yield found if isinstance(found, str) and found.encode() else None
            except (ValueError, RecursionError):  # no JSON, or an id that is no text
                yield None


def not_held(
    world: World, ids: Sequence[tuple[int, str | None]], *, ours: bool
) -> Iterator[tuple[str, str, str]]:
    """(kind, what, position) of each row, given by its place and id, that is residue: a tombstone is
    anywhere, an unknown id in what is `ours`."""
    digests = {at: world.assigner.id_digest(each) for at, each in ids if each is not None}
    found = world.ledger.lookup(digests.values())
    for at, digest in digests.items():
        row = found.get(digest)
        if isinstance(row, Tombstone):
            yield "deleted_row", f"a row of a record that request {row.request_id} deleted", f"row {at}"
        elif row is None and ours:
            yield "unknown_row", "a row of no held record", f"row {at}"


def vector_ids(data: bytes) -> list[int]:
    import faiss
    import numpy as np

    index: Any = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    return sorted({int(each) for each in faiss.vector_to_array(index.id_map)})
