"""Records at rest: one Parquet file per (shard, slice), named by its content.

A file never changes; deleting a record writes one small new file and erases the old one. Rows are in
canonical order (by keyed id), so a file's bytes equal those of a file that never held the deleted
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
from sisa.core.domain import GENERATION_COLUMN, Part, Record, SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import StoredRecord
from sisa.planning.bands import RISK_COLUMN
from sisa.store.blobs.keyring import SealedArea

RECORDS_AREA = "records"


class FileRecords(SealedArea):
    """A RecordStore in a storage area."""

    area = RECORDS_AREA

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
        return self._get_checked(file.name, file.sha256, "slice file")


def _encode(records: Sequence[StoredRecord]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {
        "id_digest": [each.id_digest for each in records],
        "id": [each.record.id for each in records],
        "subject_id": [each.record.subject_id for each in records],
        "kind": [each.record.kind for each in records],
        "roles": [[part.role for part in each.record.parts] for each in records],
        "texts": [[part.text for part in each.record.parts] for each in records],
    }
    schema = pa.schema(
        [
            ("id_digest", pa.string()),
            ("id", pa.string()),
            ("subject_id", pa.string()),
            ("kind", pa.string()),
            ("roles", pa.list_(pa.string())),
            ("texts", pa.list_(pa.string())),
        ]
    )
    risks = [each.record.deletion_risk for each in records]
    if any(risk is not None for risk in risks):
        columns[RISK_COLUMN] = [None if risk is None else json.dumps(risk) for risk in risks]
        schema = schema.append(pa.field(RISK_COLUMN, pa.string()))
    if any(each.record.generation for each in records):
        columns[GENERATION_COLUMN] = [each.record.generation for each in records]
        schema = schema.append(pa.field(GENERATION_COLUMN, pa.int64()))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _decode(data: bytes, where: str) -> tuple[StoredRecord, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
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
