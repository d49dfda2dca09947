"""The ledger's tables.

Rules: rows hold keyed digests, places, counts and digests of files; never an id, a subject or text. What
a person writes about a request (reason, approver, external id) is kept as given.

Not covered: migrations: a ledger of another version is refused.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

SCHEMA_VERSION = 2

schema = sa.MetaData()


def _text(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, **options)


def _integer(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, **options)


META = sa.Table("meta", schema, _text("key", primary_key=True), _text("value", nullable=False))
RECORDS = sa.Table(
    "records",
    schema,
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
    sqlite_with_rowid=False,  # rows rest by place: a shard's lie side by side
)
TOMBSTONES = sa.Table(
    "tombstones",
    schema,
    _text("id_digest", primary_key=True),
    _text("subject_digest", index=True),
    _text("text_digest", nullable=False, index=True),
    _integer("shard", nullable=False),
    _integer("slice", nullable=False),
    _text("request_id", nullable=False),
    _text("deleted_at", nullable=False),
    _integer("checkpoints_erased", nullable=False),
)
SLICES = sa.Table(
    "slices",
    schema,
    _integer("shard", primary_key=True),
    _integer("slice", primary_key=True),
    _text("root", nullable=False),
    _integer("num_records", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
INDEXES = sa.Table(
    "indexes",
    schema,
    _integer("shard", primary_key=True),
    _text("root", nullable=False),
    _integer("num_vectors", nullable=False),
    _text("sha256", nullable=False),
    _integer("num_bytes", nullable=False),
)
HEADS = sa.Table(
    "heads",
    schema,
    _integer("shard", primary_key=True),
    _text("key"),
    _integer("depth", nullable=False),
    _text("target"),
)
CHECKPOINTS = sa.Table(
    "checkpoints",
    schema,
    _text("key", primary_key=True),
    _integer("shard", nullable=False, index=True),
    _integer("slice", nullable=False),
    _integer("seq", nullable=False),
    _text("fingerprint", nullable=False),
    _text("manifest_sha256", nullable=False),
    _text("adapter_sha256", nullable=False),
    _integer("num_bytes", nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    _integer("record_epochs", nullable=False),
)
REQUESTS = sa.Table(
    "requests",
    schema,
    _text("request_id", primary_key=True),
    _integer("seq", nullable=False),
    _text("body", nullable=False),
)
NAMED = sa.Table(
    "named",
    schema,
    _text("request_id", primary_key=True),
    _text("id_digest", primary_key=True),
)
EVENTS = sa.Table(
    "events",
    schema,
    _integer("position", primary_key=True),
    _text("request_id", nullable=False),
    _text("state", nullable=False),
    _text("at", nullable=False),
    _text("note", nullable=False),
    _text("link", nullable=False, index=True),
)
