"""Name a record by a short number in the indexes of SQLite, and let a large commit build them anew.

No value changes, so checksums stay. PostgreSQL has such numbers already: its table stays where it is.
"""

from __future__ import annotations

from alembic import op

from sisa.store.ledger.migrations.columns import number, text

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        _copy()
    else:
        for name in ("pkey", "id_digest_key", "shard_vector_id_key"):
            op.drop_constraint(f"records_{name}", "records")
    op.create_index("ix_records_id_digest", "records", ["id_digest"], unique=True)
    op.create_index("ix_records_place", "records", ["shard", "slice"])
    op.create_index("ix_records_vector_id", "records", ["shard", "vector_id"], unique=True)


def _copy() -> None:
    op.rename_table("records", "former_records")
    op.create_table(
        "records",
        number("shard"),
        number("slice"),
        text("id_digest"),
        text("subject_digest", nullable=True),
        text("record_digest"),
        text("text_digest"),
        text("kind"),
        number("vector_id"),
        number("num_tokens"),
        number("seq"),
        number("crc"),
    )
    op.execute("INSERT INTO records SELECT * FROM former_records ORDER BY shard, slice, id_digest")
    op.drop_table("former_records")
    for name in ("subject_digest", "text_digest"):
        op.create_index(f"ix_records_{name}", "records", [name])
