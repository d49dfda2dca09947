"""Test what a ledger in PostgreSQL does in its own way.

Nothing of a removed row stays in a table or the catalogue. A lost connection, a missing server and a
lock are typed errors, which quote no value. A model's locks end with their session. Both databases get
the same tables, from the nouns and from all revisions.
"""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shutil import copytree
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from sisa.core.digest import digest_of
from sisa.core.domain import Head, HeldCheckpoint
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.ports import Change
from sisa.store.ledger import database, migrations
from sisa.store.ledger import postgres as postgres_module
from sisa.store.ledger.database import upgrade_ledger
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.postgres import advisory_lock
from sisa.store.ledger.tables import SCHEMA_VERSION, schema
from tests.contract.ledger.ledgers import answers, execute, full, named, opened, replies, row
from tests.examples import num_examples
from tests.fakes.postgres_server import PostgresServer


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_url()


@pytest.fixture
def ledger(url: str) -> Iterator[SqlLedger]:
    with opened(url, create=True) as found:
        yield found


def test_scrub_leaves_nothing_of_removed_rows_in_the_files(
    postgres: PostgresServer, ledger: SqlLedger, url: str
) -> None:
    held = [row(number, number) for number in range(5000, 5200)]
    gone, kept = held[:40], held[40:]
    old = HeldCheckpoint(named("job", 5000), 0, (0,), 1, "f", named("manifest", 5000), "a", 1, 1.0, 1)
    ledger.commit(Change(added=held, checkpoints=[old]))
    execute(url, "ANALYZE records")
    ledger.commit(Change(removed=gone, dropped=[old.key]))
    digests = [each for r in gone for each in (r.id_digest, r.record_digest, r.subject_digest or "")]
    digests += [old.key, old.manifest_sha256]
    before = postgres.bytes_at_rest()
    assert all(each.encode() in before for each in digests), "nothing to find: this proves nothing"
    ledger.scrub(gone)
    after = postgres.bytes_at_rest()
    assert [each for each in digests if each.encode() in after] == []
    assert all(each.id_digest.encode() in after for each in kept)
    assert ledger.lost() == []


def test_scrub_beside_a_reader_is_busy(
    ledger: SqlLedger, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "SCRUB_PATIENCE_S", 0.1)
    ledger.commit(Change(added=[row(1)]))
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM records")
        ledger.commit(Change(removed=[row(1)]))
        with pytest.raises(Busy):
            ledger.scrub([row(1)])
    ledger.scrub([row(1)])


def test_scrub_by_another_than_the_owner_is_refused(postgres: PostgresServer, url: str) -> None:
    """PostgreSQL merely warns that it leaves such tables out."""
    with opened(url, create=True) as ledger:
        ledger.commit(Change(added=[row(1)]))
    name = url.rpartition("%3D")[2]
    postgres.execute(f"CREATE ROLE guest_{name} LOGIN; GRANT USAGE ON SCHEMA {name} TO guest_{name}")
    postgres.execute(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {name} TO guest_{name}"
    )
    with opened(postgres.url(name, f"guest_{name}")) as guest:
        assert not guest.read_only
        guest.commit(Change(removed=[row(1)]))
        with pytest.raises(EnvironmentFault, match="can't be rewritten"):
            guest.scrub([row(1)])


def test_a_role_that_may_only_read_reads(postgres: PostgresServer, url: str) -> None:
    with opened(url, create=True) as ledger:
        full(ledger)
        before = answers(ledger)
    name = url.rpartition("%3D")[2]
    postgres.execute(f"CREATE ROLE reader_{name} LOGIN; GRANT USAGE ON SCHEMA {name} TO reader_{name}")
    postgres.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {name} TO reader_{name}")
    with opened(postgres.url(name, f"reader_{name}")) as reader:
        assert (reader.read_only, answers(reader)) == (True, before)
        with pytest.raises(EnvironmentFault, match="permission denied"):
            reader.commit(Change(removed=[row(1)]))


def test_a_second_writer_is_busy(ledger: SqlLedger, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "SCRUB_PATIENCE_S", 0.1)
    with psycopg.connect(url) as writer, opened(url) as impatient:
        key = postgres_module._lock_number("transaction")
        writer.execute(f"SELECT pg_advisory_xact_lock({key})".encode())
        with pytest.raises(Busy):
            impatient.commit(Change(added=[row(1)]))
    assert ledger.seq() == 0


def test_a_lost_connection_is_a_fault_of_the_surroundings(
    postgres: PostgresServer, ledger: SqlLedger
) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    ledger.commit(Change(added=[row(1)]))
    with ledger.snapshot():
        ledger.seq()
        postgres.execute(end)
        with pytest.raises(EnvironmentFault):
            ledger.seq()
    assert ledger.seq() == 1  # on a new connection
    postgres.execute(end)
    with pytest.raises(EnvironmentFault):
        _ = ledger.read_only


def test_a_server_that_is_not_there_is_a_fault_of_the_surroundings(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="can't be used"):
        SqlLedger(f"postgresql://sisa@/none?host={tmp_path}")


def test_a_text_with_nul_is_bad_input(ledger: SqlLedger) -> None:
    with pytest.raises(InvalidInput, match="NUL"):
        ledger.commit(Change(meta={"config": "a\0b"}))
    assert ledger.seq() == 0


def test_an_error_quotes_no_row(ledger: SqlLedger) -> None:
    """PostgreSQL's messages add the values of a violated key."""
    with pytest.raises(IntegrityError) as caught:
        ledger.commit(Change(added=[row(1), row(1)]))
    assert row(1).id_digest not in str(caught.value)
    assert row(1).id_digest in str(caught.value.__cause__), "nothing to leave out: this proves nothing"


def test_an_empty_schema_and_a_foreign_one_are_no_ledger(url: str) -> None:
    with pytest.raises(IntegrityError, match="empty"):
        SqlLedger(url)
    execute(url, "CREATE TABLE meta (whose integer)")
    for create in (False, True):
        with pytest.raises(ConfigConflict, match="not a ledger's"):
            SqlLedger(url, create=create)


@pytest.mark.usefixtures("ledger")
def test_another_schema_version_is_refused(url: str) -> None:
    execute(url, "UPDATE alembic_version SET version_num = ?", (f"{SCHEMA_VERSION + 1:04}",))
    with pytest.raises(IntegrityError, match="another version"):
        SqlLedger(url)


@pytest.mark.parametrize("table", ["records", "heads", "requests", "vaulted"])
def test_a_changed_and_a_lost_row_are_missed(ledger: SqlLedger, url: str, table: str) -> None:
    full(ledger)
    before = replies(ledger)
    column = next(iter(schema.tables[table].columns))
    value = 7 if isinstance(column.type, sa.Integer) else named("other", 1)
    which = f"crc = (SELECT min(crc) FROM {table})"  # noqa: S608
    changed = f"UPDATE {table} SET {column.name} = '{value}' WHERE {which}"  # noqa: S608
    for change in (changed, f"DELETE FROM {table} WHERE {which}"):  # noqa: S608
        execute(url, change)
        after = replies(ledger)
        assert {k: each for k, each in after.items() if each not in (None, before[k])} == {}
        assert None in after.values()
    assert ledger.lost() == [table]


# --- the locks of a model


def test_a_lock_is_held_once_and_ends_with_its_process(url: str) -> None:
    with advisory_lock(url, "writer"):
        with pytest.raises(Busy, match="is writing to this model"), advisory_lock(url, "writer"):
            pass
        with advisory_lock(url, "commit"):
            pass
    code = (
        "import os, sys; from sisa.store.ledger.postgres import advisory_lock\n"
        "with advisory_lock(sys.argv[1], 'writer'):\n    print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, url], stdin=-1, stdout=-1)
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        with pytest.raises(Busy), advisory_lock(url, "writer"):
            pass
        child.kill()
        with advisory_lock(url, "writer", patience_s=10):
            pass
    finally:
        child.kill()
        child.communicate()


def test_nothing_is_committed_once_a_lock_is_lost(postgres: PostgresServer, url: str) -> None:
    """The server ends a session whose node it can't reach: another node may write already."""
    end = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
    with opened(url, create=True) as ledger, advisory_lock(url, "writer"):
        ledger.commit(Change(added=[row(1)]))
        postgres.execute(end)
        with pytest.raises(EnvironmentFault):
            ledger.commit(Change(added=[row(2)]))
        assert ledger.seq() == 1


COMMITS = """
import sys
from sisa.core.domain import Head
from sisa.core.ports import Change
from sisa.core.requests import RequestEvent
from sisa.store.ledger.ledger import SqlLedger
ledger = SqlLedger(sys.argv[1])
for number in range(100_000):
    with ledger.exclusive():
        event = RequestEvent(f"r{number}", "received", "2026")
        ledger.commit(Change(heads=[Head(0, str(number), 1, None)], events=[event]))
    print(ledger.seq(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(num_examples(10, share=10)))
def test_a_killed_process_leaves_whole_commits_and_no_lock(url: str, seed: int) -> None:
    with opened(url, create=True) as ledger:
        child = subprocess.Popen([sys.executable, "-c", COMMITS, url], stdout=-1, text=True)
        assert child.stdout is not None
        line = [child.stdout.readline() for _ in range(3)][-1]
        time.sleep(random.Random(seed).random() / 20)
        child.kill()
        line = ([line, *child.communicate()[0].splitlines()])[-1]
        with ledger.exclusive():
            seq = ledger.commit(Change(heads=[Head(1, None, 0, None)]))
        assert seq - 1 in (int(line), int(line) + 1)
        (first, second) = ledger.heads()
        assert (first.key, second.key) == (str(seq - 2), None)
        assert ledger.event_head().num_events == seq - 1
        assert ledger.lost() == []


# --- one schema


def test_all_revisions_make_the_tables_of_the_nouns(tmp_path: Path, ledger: SqlLedger) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with ledger.backend.reading() as connection:
        options = {"compare_type": True, "include_name": lambda name, *_: name != "alembic_version"}
        found = compare_metadata(MigrationContext.configure(connection, opts=options), schema)
    assert found == []
    made, migrated = tmp_path / "made", tmp_path / "migrated"
    SqlLedger(made, create=True).close()
    engine = sa.create_engine(f"sqlite:///{migrated}")
    with engine.begin() as connection:
        migrations.upgrade(connection, 0)
    engine.dispose()
    assert tables(migrated) == tables(made)


def tables(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return [digest_of(each) for each in sorted(found)]


NEXT = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "{version:04}", "{before:04}"
def upgrade() -> None:
    op.create_table("later", sa.Column("name", sa.Text(), primary_key=True))
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_older_ledger_is_brought_up_by_one_command(
    kind: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The present version is made the older one: a revision that is not there yet follows it."""
    place = url if kind == "postgres" else tmp_path / "ledger.sqlite"
    with opened(place, create=True) as ledger:
        full(ledger)
        before = answers(ledger)
    copytree(migrations.LOCATION, tmp_path / "m")
    text = NEXT.format(version=SCHEMA_VERSION + 1, before=SCHEMA_VERSION)
    (tmp_path / "m" / "versions" / "v_next.py").write_text(text)
    real: Any = migrations.upgrade
    monkeypatch.setattr(migrations, "upgrade", lambda *given: real(*given, location=tmp_path / "m"))
    monkeypatch.setattr(database, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setattr(database, "UPGRADED", (SCHEMA_VERSION,))
    if kind == "postgres":  # a node of the older version may be using it
        with pytest.raises(IntegrityError, match="another version") as caught:
            SqlLedger(place)
        assert "sisa ledger upgrade" in caught.value.next_step
        assert upgrade_ledger(place)
    SqlLedger(place).close()
    assert not upgrade_ledger(place)
    execute(place, "INSERT INTO later VALUES (?)", ("there",))
    with opened(place) as ledger:
        assert answers(ledger) == before
