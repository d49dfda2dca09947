"""The ledger's tables.

Rows hold keyed digests, positions, counts and digests of files; never an id, a subject or text. What a
person writes about a request (reason, approver, external id, consent) is kept as given, and so are the
paths of exports. The last column of every table is the checksum of the others; `counts` holds how many
rows each table should have (`rows.py`). There are no migrations: a ledger of another version is refused.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

SCHEMA_VERSION = 4

schema = sa.MetaData()


def _text(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, **options)


def _integer(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, **options)


def _table(name: str, *parts: Any, **options: Any) -> sa.Table:
    columns = [each for each in parts if isinstance(each, sa.Column)]
    constraints = [each for each in parts if not isinstance(each, sa.Column)]
    return sa.Table(name, schema, *columns, _integer("crc", nullable=False), *constraints, **options)


COUNTS = _table(
    "counts",
    _text("name", primary_key=True),
    _integer("shard", primary_key=True),  # or NO_POSITION; so is the slice
    _integer("slice", primary_key=True),
    _text("kind", primary_key=True),
    _integer("num_rows", nullable=False),
)
META = _table("meta", _text("key", primary_key=True), _text("value", nullable=False))
RECORDS = _table(
    "records",
    _integer("shard", primary_key=True),
    _integer("slice", primary_key=True),
    _text("id_digest", primary_key=True),
    _text("subject_digest", index=True),
    _text("record_digest", nullable=False),
    _text("text_digest", nullable=False, index=True),
    _text("kind", nullable=False),
    _integer("vector_id", nullable=False),
    _integer("num_tokens", nullable=False),
    _integer("seq", nullable=False),
    sa.UniqueConstraint("id_digest"),
    sa.UniqueConstraint("shard", "vector_id"),
    sqlite_with_rowid=False,  # stores a shard's rows side by side
)
TOMBSTONES = _table(
    "tombstones",
    _text("id_digest", primary_key=True),
    _text("subject_digest", index=True),
    _text("text_digest", nullable=False, index=True),
    _integer("shard", nullable=False),
    _integer("slice", nullable=False),
    _text("request_id", nullable=False),
    _text("deleted_at", nullable=False),
    _integer("checkpoints_erased", nullable=False),
)
SLICES = _table(
    "slices",
    _integer("shard", primary_key=True),
    _integer("slice", primary_key=True),
    _text("root", nullable=False),
    _integer("num_records", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
INDEXES = _table(
    "indexes",
    _integer("shard", primary_key=True),
    _text("root", nullable=False),
    _integer("num_vectors", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
HEADS = _table(
    "heads",
    _integer("shard", primary_key=True),
    _text("key"),
    _integer("depth", nullable=False),
    _text("target"),
)
CHECKPOINTS = _table(
    "checkpoints",
    _text("key", primary_key=True),
    _integer("shard", nullable=False, index=True),
    _text("prefix", nullable=False),  # JSON list of slices
    _integer("seq", nullable=False),
    _text("fingerprint", nullable=False),
    _text("manifest_sha256", nullable=False),
    _text("adapter_sha256", nullable=False),
    _integer("num_bytes", nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    _integer("record_epochs", nullable=False),
)
REQUESTS = _table(
    "requests",
    _text("request_id", primary_key=True),
    _integer("seq", nullable=False),
    _integer("num_named", nullable=False),
    _text("body", nullable=False),
)
NAMED = _table(
    "named",
    _text("request_id", primary_key=True),
    _text("id_digest", primary_key=True),
)
EXPORTS = _table(
    "exports",
    _text("path", primary_key=True),
    _text("key", primary_key=True),
    _integer("shard", nullable=False),
    _text("prefix", nullable=False),  # JSON list of slices
    _integer("seq", nullable=False),
    _text("adapter_sha256", nullable=False),
    _text("made_at", nullable=False),
    _text("state", nullable=False),
    _text("request_id", nullable=False),
    _text("patches", nullable=False),  # JSON list of their keys
    _text("form", nullable=False),
)
PATCHES = _table(
    "patches",
    _text("key", primary_key=True),
    _integer("version", nullable=False, unique=True),
    _text("job", nullable=False),  # JSON
    _text("state", nullable=False),
    _text("wanted_at", nullable=False),
    _text("made_at", nullable=False),
    _text("manifest_sha256", nullable=False),
    _text("adapter_sha256", nullable=False),
    _integer("num_bytes", nullable=False),
    _text("request_id", nullable=False),
    _text("report", nullable=False),  # JSON
)
VAULT = _table(
    "vault",
    _text("name", primary_key=True),
    _text("role", nullable=False),
    _integer("num_records", nullable=False),
    _text("consent", nullable=False),
    _text("put_at", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
    _integer("held", nullable=False),  # 0 or 1
    _text("request_id", nullable=False),
)
VAULTED = _table(
    "vaulted",
    _text("name", primary_key=True),
    _text("id_digest", primary_key=True, index=True),
)
EVENTS = _table(
    "events",
    _integer("position", primary_key=True),
    _text("request_id", nullable=False),
    _text("state", nullable=False),
    _text("at", nullable=False),
    _text("note", nullable=False),
    _text("link", nullable=False, index=True),
)
