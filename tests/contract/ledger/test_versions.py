"""The tables of a ledger stay, and ledgers of earlier versions get the tables of this one."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from sisa.core.domain import Identity
from sisa.core.errors import IntegrityError
from sisa.core.ports import Change
from sisa.store.ledger import rows as rows_module
from sisa.store.ledger.database import upgrade_ledger
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.tables import SCHEMA_VERSION
from tests.contract.ledger.ledgers import (
    NUMBERS,
    SCHEMAS,
    answers,
    back_to_version_4,
    back_to_version_5,
    full,
    named,
    opened,
    row,
    tables_digest,
)
from tests.fakes.ledger import FakeLedger


def test_another_schema_version_is_refused(path: Path) -> None:
    with opened(path, create=True) as ledger:
        ledger.commit(Change(added=[row(1)]))
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(IntegrityError, match="another version"):
        SqlLedger(path)


def test_the_tables_of_this_schema_stay(in_file: SqlLedger, path: Path) -> None:
    """The tables follow the fields of the nouns: a field more is another schema."""
    in_file.close()
    assert tables_digest(path) == SCHEMAS[SCHEMA_VERSION]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_ledger_of_version_5_is_indexed_anew(
    in_file: SqlLedger, path: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    full(in_file)
    older = path.with_name("older")
    place = older if kind == "sqlite" else request.getfixturevalue("postgres").new_url()
    back_to_version_5(place, in_file, tmp_path)
    if kind == "sqlite":
        assert tables_digest(older) == SCHEMAS[5]
    assert upgrade_ledger(place)
    with opened(place) as ledger:
        assert answers(ledger) == answers(in_file)
        for each in (in_file, ledger):
            each.commit(Change(removed=[row(1)], added=[row(3), row(5)]))
        assert answers(ledger) == answers(in_file)
    if kind == "sqlite":
        assert tables_digest(older) == SCHEMAS[SCHEMA_VERSION]


def test_indexes_are_built_after_a_large_commit(
    in_file: SqlLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MANY_ROWS", 3)
    fake, built = FakeLedger(), []
    listened = (in_file.backend.engine, "before_cursor_execute")
    sa.event.listen(*listened, lambda *given: built.append(given[2].startswith("CREATE")))
    for numbers, anew in ((range(5), True), (range(5, 20), True), (range(20, 30), False)):
        change = Change(added=[row(number, number % 3) for number in numbers])
        assert in_file.commit(change) == fake.commit(change)
        assert answers(in_file) == answers(fake)
        assert any(built) == anew
        built.clear()
    with pytest.raises(IntegrityError):
        in_file.commit(Change(added=[row(number) for number in range(29, 90)]))
    assert answers(in_file) == answers(fake)
    in_file.close()
    assert tables_digest(path) == SCHEMAS[SCHEMA_VERSION]


def test_a_ledger_of_version_4_gets_the_tables_that_it_lacks(path: Path) -> None:
    with opened(path, create=True) as ledger:
        full(ledger)
        ledger.commit(Change(unidentified=[named("record id", n) for n in NUMBERS]))
        before = answers(ledger)
    back_to_version_4(path)
    with opened(path) as ledger:
        assert answers(ledger) == {**before, "work_items": [], "work_items of keys": []}
        ledger.commit(Change(identities=[Identity(named("identity", 1), named("record id", 1))]))
        assert len(ledger.identities(keys=[named("identity", 1)])) == 1
        assert ledger.lost() == []
    assert tables_digest(path) == SCHEMAS[SCHEMA_VERSION]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_ledger_of_version_4_that_is_read_only_says_how_to_go_on(path: Path) -> None:
    with opened(path, create=True) as ledger:
        full(ledger)
    back_to_version_4(path)
    path.chmod(0o400)
    with pytest.raises(IntegrityError, match="another version") as refused:
        SqlLedger(path)
    assert "open it once" in refused.value.next_step
    path.chmod(0o600)
