"""Upgrade the tables of an older ledger with alembic, in any database.

A revision is a file in `versions/`, named after the schema that it makes; SQLite keeps the number in the
file (`user_version`), PostgreSQL in the table `alembic_version`. A new PostgreSQL ledger is made by all
revisions, a new SQLite file by `tables.schema`; a test holds both equal. To change the tables, change
the nouns and `tables.py`, raise SCHEMA_VERSION and add a revision. A row's checksum covers its columns,
so a revision that changes columns rewrites the checksums (`rows.checksum`); one that adds a table begins
its count (`rows.begin_counts`).
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

LOCATION = Path(__file__).parent


def upgrade(connection: sa.Connection, version: int, location: Path = LOCATION) -> None:
    """Run all revisions after a version, in the caller's transaction."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(location))
    lower = f"{version:04}" if version else "base"
    revisions = reversed(list(script.iterate_revisions("head", lower)))
    with Operations.context(MigrationContext.configure(connection)):
        for revision in revisions:
            revision.module.upgrade()
