"""Add what identifies a record's person elsewhere, and the identifiers on deletion lists."""

from __future__ import annotations

from alembic import op

from sisa.store.ledger.migrations.columns import key_text, number, text
from sisa.store.ledger.rows import begin_counts

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "identities",
        key_text("key"),
        key_text("id_digest", index=True),
        number("crc"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "work_items",
        key_text("item"),
        text("key", index=True),
        text("file"),
        text("request_id"),
        number("num_consumers"),
        number("status"),
        text("reported_at"),
        number("crc"),
    )
    begin_counts(op.get_bind(), ["identities", "work_items"])
