"""Rows that are not the ones that were written, and rows that are lost: damage is a typed error."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sisa.core.domain import Export, SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import Change
from sisa.core.requests import Request
from sisa.planning.layout import slice_root
from sisa.store.ledger import rows as rows_module
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.tables import schema
from tests.contract.ledger.ledgers import (
    NUMBERS,
    answers,
    execute,
    full,
    named,
    opened,
    replies,
    row,
    tombstone,
)
from tests.examples import is_full
from tests.fakes.ledger import FakeLedger


@pytest.mark.parametrize("column", ["record_digest", "id_digest", "slice"])
def test_a_damaged_or_lost_row_is_no_content_of_a_slice(place: Path | str, column: str) -> None:
    held = [row(number) for number in range(0, 60, 6)]  # all of one slice
    root = SliceFile(0, 0, slice_root(held), len(held), "f", 9)
    with opened(place, create=True) as ledger:
        ledger.commit(Change(added=held, slices=[root]))
        assert len(ledger.contents(0, 0)) == len(held)
        value = 1 if column == "slice" else named("other", 1)
        change = f"UPDATE records SET {column} = ? WHERE id_digest = ?"  # noqa: S608
        execute(place, change, (value, held[0].id_digest))
        with pytest.raises(IntegrityError, match="damaged"):
            ledger.contents(0, 0)


def test_a_missing_ledger_is_an_integrity_error(path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        SqlLedger(path)
    assert not path.exists()


@pytest.mark.parametrize("place", [0, 200])
def test_a_file_that_is_no_database_is_an_integrity_error(path: Path, place: int) -> None:
    with opened(path, create=True) as ledger:
        ledger.commit(Change(added=[row(number) for number in range(50)]))
    data = bytearray(path.read_bytes())
    data[place : place + 4000] = b"\xaa" * 4000
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged"), opened(path) as ledger:
        answers(ledger)


def test_an_emptied_file_is_an_integrity_error(path: Path) -> None:
    path.touch()
    with pytest.raises(IntegrityError), opened(path) as ledger:
        answers(ledger)


TABLES = [table.name for table in rows_module.COUNTED]

COLUMNS = [(table.name, column.name) for table in schema.sorted_tables for column in table.columns]


@dataclass(frozen=True)
class Full:
    """Hold a ledger with a row in every table: its file's bytes, and its replies."""

    data: bytes
    replies: dict[str, Any]

    def put(self, path: Path) -> dict[str, Any]:
        path.write_bytes(self.data)
        return self.replies


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Full:
    path = tmp_path_factory.mktemp("full") / "ledger.sqlite"
    with opened(path, create=True) as ledger:
        full(ledger)
        found = replies(ledger)
        ledger.scrub()
    assert None not in found.values()
    return Full(path.read_bytes(), found)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
@pytest.mark.parametrize("value", ["y", 7])
def test_a_changed_value_is_refused_or_does_not_matter(
    whole: Full, path: Path, table: str, column: str, value: Any
) -> None:
    before = whole.put(path)
    one = f"SELECT {column} FROM {table} LIMIT 1"  # noqa: S608
    change = f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {column} IS ({one})"  # noqa: S608
    try:
        execute(path, change, (value,))
    except sqlite3.IntegrityError:
        pytest.skip("SQLite itself refuses such a value")
    with opened(path) as ledger:
        after = replies(ledger)
        assert {name: each for name, each in after.items() if each not in (None, before[name])} == {}
        if table != "counts" or column == "num_rows":
            assert None in after.values()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("which", ["= (SELECT min(crc)", "= (SELECT max(crc)", "IN (SELECT crc"])
def test_a_lost_row_is_missed(whole: Full, path: Path, table: str, which: str) -> None:
    before = whole.put(path)
    execute(path, f"DELETE FROM {table} WHERE crc {which} FROM {table})")  # noqa: S608
    with opened(path) as ledger:
        after = replies(ledger)
        assert {name: each for name, each in after.items() if each not in (None, before[name])} == {}
        assert None in after.values()
        assert ledger.lost() == [table]


@pytest.mark.parametrize("sort", ["record id", "text", "subject", "identity"])
def test_a_flipped_bit_in_a_row_or_an_index_is_refused(path: Path, sort: str) -> None:
    """SQLite notices neither: a row that its index does not name is as good as gone."""
    with opened(path, create=True) as ledger:
        full(ledger)
        before = replies(ledger)
        ledger.scrub()
    whole, refused, places = path.read_bytes(), 0, 0
    for number in NUMBERS:
        digest = named(sort, number).encode()
        found = [at for at in range(len(whole)) if whole.startswith(digest, at)]
        places += len(found)
        for at in found:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with opened(path) as ledger:
                after = replies(ledger)
            assert {k: each for k, each in after.items() if each not in (None, before[k])} == {}
            refused += None in after.values()
    assert refused > places // 2 > 1


def test_a_commit_does_not_repair_a_loss(place: Path | str) -> None:
    with opened(place, create=True) as ledger:
        full(ledger)
    execute(place, "DELETE FROM named WHERE crc = (SELECT min(crc) FROM named)")
    execute(place, "DELETE FROM tombstones WHERE id_digest = ?", (named("record id", 5),))
    with opened(place) as ledger:
        ledger.commit(Change(tombstones=[tombstone(3)], removed=[row(1)]))
        with contextlib.suppress(IntegrityError):
            ledger.commit(Change(named=[("r0", named("record id", 1)), ("r0", named("record id", 5))]))
        assert ledger.lost() == ["named", "tombstones"]
        for question in (lambda: ledger.named_by("r0"), lambda: ledger.lookup([named("record id", 5)])):
            with pytest.raises(IntegrityError, match="damaged"):
                question()


def test_what_is_removed_is_checked_first(place: Path | str) -> None:
    with opened(place, create=True) as ledger:
        full(ledger)
    execute(place, "UPDATE records SET num_tokens = 99")
    with opened(place) as ledger, pytest.raises(IntegrityError, match="damaged"):
        ledger.commit(Change(removed=[row(1)]))


def index_pages(path: Path) -> dict[str, int]:
    """Return where the root page of each index begins."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        indexes = "SELECT name, rootpage FROM sqlite_master WHERE type = 'index'"
        return {name: (page - 1) * size for name, page in connection.execute(indexes)}


@pytest.mark.slow
def test_an_emptied_index_hides_no_row_from_a_commit(whole: Full, path: Path) -> None:
    """A checkpoint that is not found would stay held, although the commit drops it."""
    whole.put(path)
    data, pages, done = whole.data, index_pages(path), 0
    step = 1 if is_full() else 9  # one pair in so many: every index, and every change
    changes_ = [
        Change(removed=[row(1)]),
        Change(dropped=[named("job", 1)]),
        Change(emptied=[(1, 1)]),
        Change(unexported=[("/out", "k")]),
        Change(exports=[Export("/out", 1, (0, 1), 1, "k", "a", "2026", "tainted", "r0")]),
        Change(requests=[Request("r0", "2026", "2027", 3)]),
        Change(slices=[SliceFile(1, 1, "r", 5, "s", 1)]),
        Change(unidentified=[named("record id", 4)]),
        Change(meta={"config": "y"}),
    ]
    expected = [answers_after(change) for change in changes_]
    blank = bytes([10, 0, 0, 0, 0, 16, 0, 0])  # an index leaf without cells
    pairs = list(zip(changes_, expected, strict=True))
    for turn, (name, at) in enumerate(pages.items()):
        for change, right in pairs[turn % step :: step]:
            path.write_bytes(data[:at] + blank + data[at + len(blank) :])
            with opened(path) as ledger:
                try:
                    ledger.commit(change)
                except IntegrityError:
                    continue
            done += 1
            execute(path, "REINDEX")
            with opened(path) as ledger:
                assert answers(ledger) == right, (name, change)
    assert done


def answers_after(change: Change) -> dict[str, Any]:
    fake = FakeLedger()
    full(fake)
    fake.commit(change)
    return answers(fake)
