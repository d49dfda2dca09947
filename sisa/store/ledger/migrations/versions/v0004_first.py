"""Make the tables of schema 4, the first with revisions. Earlier ledgers have none.

The definitions are of that time: later changes of the nouns do not change them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sisa.store.ledger.migrations.columns import key_text, number, position, text

revision = "0004"
down_revision = None


def upgrade() -> None:
    _settings()
    _records()
    _files()
    _checkpoints()
    _requests()
    _patches()


def _settings() -> None:
    op.create_table(
        "counts",
        key_text("name"),
        position("shard"),
        position("slice"),
        key_text("kind"),
        number("num_rows"),
        number("crc"),
    )
    op.create_table("meta", key_text("key"), text("value"), number("crc"))


def _records() -> None:
    op.create_table(
        "records",
        position("shard"),
        position("slice"),
        key_text("id_digest"),
        text("subject_digest", nullable=True, index=True),
        text("record_digest"),
        text("text_digest", index=True),
        text("kind"),
        number("vector_id"),
        number("num_tokens"),
        number("seq"),
        number("crc"),
        sa.UniqueConstraint("id_digest"),
        sa.UniqueConstraint("shard", "vector_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tombstones",
        key_text("id_digest"),
        text("subject_digest", nullable=True, index=True),
        text("text_digest", index=True),
        number("shard"),
        number("slice"),
        text("request_id"),
        text("deleted_at"),
        number("checkpoints_erased"),
        number("crc"),
    )


def _files() -> None:
    op.create_table(
        "slices",
        position("shard"),
        position("slice"),
        text("root"),
        number("num_records"),
        text("sha256"),
        number("num_bytes"),
        number("crc"),
    )
    op.create_table(
        "indexes",
        position("shard"),
        text("root"),
        number("num_vectors"),
        text("sha256"),
        number("num_bytes"),
        number("crc"),
    )
    op.create_table(
        "heads",
        position("shard"),
        text("key", nullable=True),
        number("depth"),
        text("target", nullable=True),
        number("crc"),
    )


def _checkpoints() -> None:
    op.create_table(
        "checkpoints",
        key_text("key"),
        number("shard", index=True),
        text("prefix"),
        number("seq"),
        text("fingerprint"),
        text("manifest_sha256"),
        text("adapter_sha256"),
        number("num_bytes"),
        sa.Column("seconds", sa.Float(), nullable=False),
        number("record_epochs"),
        number("crc"),
    )
    op.create_table(
        "exports",
        key_text("path"),
        key_text("key"),
        number("shard"),
        text("prefix"),
        number("seq"),
        text("adapter_sha256"),
        text("made_at"),
        text("state"),
        text("request_id"),
        text("patches"),
        text("form"),
        number("crc"),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        key_text("request_id"),
        number("seq"),
        number("num_named"),
        text("body"),
        number("crc"),
    )
    op.create_table("named", key_text("request_id"), key_text("id_digest"), number("crc"))
    op.create_table(
        "events",
        position("position"),
        text("request_id"),
        text("state"),
        text("at"),
        text("note"),
        text("link", index=True),
        number("crc"),
    )


def _patches() -> None:
    op.create_table(
        "patches",
        key_text("key"),
        number("version"),
        text("job"),
        text("state"),
        text("wanted_at"),
        text("made_at"),
        text("manifest_sha256"),
        text("adapter_sha256"),
        number("num_bytes"),
        text("request_id"),
        text("report"),
        number("crc"),
        sa.UniqueConstraint("version"),
    )
    op.create_table(
        "vault",
        key_text("name"),
        text("role"),
        number("num_records"),
        text("consent"),
        text("put_at"),
        text("sha256"),
        number("num_bytes"),
        number("held"),
        text("request_id"),
        number("crc"),
    )
    op.create_table("vaulted", key_text("name"), key_text("id_digest", index=True), number("crc"))
