"""Records at rest: a Parquet file per (shard, slice), named by its content.

A slice's file never changes; deleting a record writes one small new file and erases the old one. Rows
are in canonical order (by keyed id), so a file's bytes equal those of a file that never held the deleted
record. Plain ids and text are stored here and nowhere else. Digests and sizes are of the plaintext.

Columns: id_digest, id, subject_id, kind, roles (list), texts (list); deletion_risk (JSON) if a record of
the slice has one; generation if it was appended.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sisa.core.digest import sha256_hex
from sisa.core.domain import GENERATION_COLUMN, RISK_COLUMN, Part, Record, SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import StoredRecord
from sisa.store.areas import RECORDS
from sisa.store.blobs.sealed_area import SealedArea


class FileRecords(SealedArea):
    """A RecordStore in a storage area."""

    area = RECORDS

    def write(self, shard: int, slice_: int, root: str, records: Sequence[StoredRecord]) -> SliceFile:
        data = _encode(records)
        file = SliceFile(shard, slice_, root, len(records), sha256_hex(data), len(data))
        self._put(file.name, data)
        return file

    def read(self, file: SliceFile) -> tuple[StoredRecord, ...]:
        return _decode(self._bytes(file), self.blobs.location(file.name))

    def check(self, file: SliceFile) -> None:
        self._bytes(file)

    def _bytes(self, file: SliceFile) -> bytes:
        return self.checked(file.name, file.sha256, "slice file")


def _encode(records: Sequence[StoredRecord]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = [each.record for each in records]
    text, texts = pa.string(), pa.list_(pa.string())
    columns = {
        "id_digest": pa.array([each.id_digest for each in records], text),
        "id": pa.array([each.id for each in held], text),
        "subject_id": pa.array([each.subject_id for each in held], text),
        "kind": pa.array([each.kind for each in held], text),
        "roles": pa.array([[part.role for part in each.parts] for each in held], texts),
        "texts": pa.array([[part.text for part in each.parts] for each in held], texts),
    }
    risks = [None if each.deletion_risk is None else json.dumps(each.deletion_risk) for each in held]
    if any(risks):
        columns[RISK_COLUMN] = pa.array(risks, text)
    if any(each.generation for each in held):
        columns[GENERATION_COLUMN] = pa.array([each.generation for each in held], pa.int64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def _decode(data: bytes, where: str) -> tuple[StoredRecord, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(io.BytesIO(data)).read().to_pylist()
        return tuple(StoredRecord(row["id_digest"], _record(row)) for row in rows)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise IntegrityError(
            "a slice file can't be parsed",
            where=where,
            expected="the columns that this version writes",
            got=type(error).__name__,
        ) from error


def _record(row: Mapping[str, Any]) -> Record:
    parts = tuple(Part(role, text) for role, text in zip(row["roles"], row["texts"], strict=True))
    risk = row.get(RISK_COLUMN)
    risk = None if risk is None else json.loads(risk)
    generation = row.get(GENERATION_COLUMN)
    return Record(row["id"], row["subject_id"], row["kind"], parts, risk, generation)
