"""The tree of records at rest: a function of the set alone, and what it proves."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.digest import canonical_json
from sisa.core.domain import SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.events import Event, Notice
from sisa.core.ports import StoredRecord
from sisa.evidence import membership
from sisa.evidence.database import VERSION, transaction
from sisa.evidence.keys.vrf_key import VrfKey
from sisa.evidence.membership import SCHEMA, TABLES, Membership, Tree, tree_hash
from sisa.flows.ingest import add, train
from sisa.flows.locations import lookup
from sisa.verifier.envelope import Refused
from sisa.verifier.membership import EMPTY_TREE, LABEL_BYTES, verify_absent, verify_present
from sisa.verifier.vrf import verify_output
from tests.fakes.ports import FakeModel, changed, fake_model, fake_record

KEY = VrfKey(b"v" * 32)
DAY, LATER = "2026-11-02", "2026-11-29"


@st.composite
def label_sets(draw: st.DrawFn) -> list[set[bytes]]:
    """Return successive sets of labels; many share long prefixes."""
    label = st.tuples(st.sampled_from([0, 1, 2, 64, 128, 255]), st.integers(0, 7)).map(
        lambda ends: bytes([ends[0]]) + bytes(30) + bytes([ends[1]])
    )
    return draw(st.lists(st.sets(label, max_size=20), min_size=1, max_size=4))


def rows_of(labels: set[bytes]) -> list[membership.Row]:
    return [(label, label, label[0] % 5, 0, DAY) for label in labels]


def fresh(labels: set[bytes]) -> Tree:
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    tree = Tree(db)
    tree.replace([], rows_of(labels))
    return tree


@given(sets=label_sets(), bucket=st.integers(1, 4))
@settings(max_examples=40)
def test_the_tree_is_a_function_of_the_set_alone(sets: list[set[bytes]], bucket: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "BUCKET", bucket)
        tree, before = fresh(set()), set[bytes]()
        for labels in sets:
            tree.replace(before - labels, rows_of(labels - before))
            again = fresh(labels)
            assert tree.root == again.root == tree_hash(again.leaves("", -1))
            for table in ("leaves", "nodes"):
                query = f"SELECT * FROM {table}"  # noqa: S608
                assert tree.db.execute(query).fetchall() == again.db.execute(query).fetchall()
            tree.check()
            before = labels


@given(sets=label_sets())
@settings(max_examples=20)
def test_each_label_proves_what_it_is_and_nothing_else(sets: list[set[bytes]]) -> None:
    labels, other = sets[0], sets[-1]
    tree = fresh(labels)
    for label in labels | other:
        path, end = tree.path(label)
        value = tree.value(label)
        if label in labels:
            assert value is not None
            verify_present(tree.root, label, canonical_json(value), path)
            with pytest.raises(Refused):
                verify_present(tree.root, label, canonical_json({**value, "since": LATER}), path)
            with pytest.raises(Refused):
                verify_absent(tree.root, label, path, end)
        else:
            assert value is None
            verify_absent(tree.root, label, path, end)
            with pytest.raises(Refused):
                verify_absent(fresh(labels | {label}).root, label, path, end)


class Kept:
    """A fake model with a tree beside it."""

    def __init__(self, path: Path) -> None:
        self.model: FakeModel = fake_model(num_shards=2)
        self.events: list[Event] = []
        self.read: list[SliceFile] = []
        self.today = f"{DAY}T00:00:00.000+00:00"
        records = self.model.context.stores.records

        class Reading:
            def __getattr__(_self, name: str) -> Any:
                return getattr(records, name)

            def read(_self, file: SliceFile) -> tuple[StoredRecord, ...]:
                self.read.append(file)
                return records.read(file)

        self.context = self.model.context = changed(
            self.model.context, records=Reading(), now=lambda: self.today, report=self.events.append
        )
        self.tree = Membership(path, b"v" * 32)

    def sync(self) -> tuple[str, str]:
        self.read.clear()
        return self.tree.sync(self.context)

    def forget(self, *numbers: int) -> None:
        self.model.forget(*numbers)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    kept = Kept(tmp_path / "evidence.sqlite")
    train(kept.context, [fake_record(number) for number in range(60)], {"config": "{}"})
    return kept


def answer(kept: Kept, number: int) -> dict[str, Any] | None:
    """Return what the tree proves of a record, verified with public things alone."""
    record_id = fake_record(number).id
    proof = kept.tree.prove(record_id)
    label = verify_output(KEY.public, record_id.encode(), bytes.fromhex(proof["vrf"]))[:LABEL_BYTES]
    path = [bytes.fromhex(each) for each in proof["path"]]
    root, found = bytes.fromhex(kept.tree.root), proof["leaf"]
    if found and "shard" in found:
        verify_present(root, label, canonical_json(found), path)
        return dict(found)
    neighbour = found and (bytes.fromhex(found["label"]), bytes.fromhex(found["value_hash"]))
    verify_absent(root, label, path, neighbour)
    return None


def shard_of(kept: Kept, number: int) -> int:
    (row,) = lookup(kept.context, [fake_record(number).id])
    return row.shard


def test_the_tree_follows_additions_and_deletions(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MANY", 60)
    empty, first = kept.sync()
    assert [each.text for each in kept.events if isinstance(each, Notice)] == [
        "computing the labels of 60 records for membership proofs"
    ]
    assert (empty, kept.tree.num_records) == (EMPTY_TREE.hex(), 60)
    assert answer(kept, 7) == {"shard": shard_of(kept, 7), "since": DAY}
    assert answer(kept, 60) is None

    kept.today = f"{LATER}T00:00:00.000+00:00"
    kept.forget(7, 8)
    assert kept.sync()[0] == first
    assert kept.read == []  # a deletion reads no slice file
    assert (answer(kept, 7), answer(kept, 8)) == (None, None)
    assert answer(kept, 9) == {"shard": shard_of(kept, 9), "since": DAY}

    add(kept.context, [fake_record(number) for number in (7, 61)], allow_deleted=True)
    kept.sync()
    assert answer(kept, 7) == {"shard": shard_of(kept, 7), "since": LATER}
    assert (kept.tree.num_records, kept.sync()) == (60, (kept.tree.root, kept.tree.root))
    assert kept.read == []
    kept.tree.check()


def test_what_moves_to_another_slice_keeps_its_label_and_its_date(kept: Kept) -> None:
    kept.sync()
    root = kept.tree.root
    with closing(sqlite3.connect(kept.tree.path)) as db:  # as another layout would have placed them
        db.execute("UPDATE leaves SET slice = slice + 100")
        db.execute("UPDATE taken SET slice = slice + 100")
        db.commit()
    kept.today = f"{LATER}T00:00:00.000+00:00"
    assert kept.sync() == (root, root)
    assert kept.read == []


def test_what_moves_to_another_shard_is_there_since_then(kept: Kept) -> None:
    kept.sync()
    with closing(sqlite3.connect(kept.tree.path)) as db:
        tree = Tree(db)
        moved = [
            (label, key, 1 - shard, *rest)
            for label, key, shard, *rest in db.execute("SELECT * FROM leaves")
        ]
        tree.replace([row[0] for row in moved], moved)
        db.execute("UPDATE taken SET shard = shard + 100")
        db.execute("UPDATE taken SET shard = 1 - (shard - 100)")
        db.commit()
    kept.today = f"{LATER}T00:00:00.000+00:00"
    kept.sync()
    assert kept.read == []
    assert answer(kept, 7) == {"shard": shard_of(kept, 7), "since": LATER}


def test_nothing_of_a_deleted_record_stays_but_keyed_digests(kept: Kept) -> None:
    kept.sync()
    label = KEY.output(fake_record(7).id.encode())[:LABEL_BYTES]
    assert label in kept.tree.path.read_bytes()
    kept.forget(7)
    kept.sync()
    found = kept.tree.path.read_bytes()
    assert label not in found
    assert not any(fake_record(number).id.encode() in found for number in range(60))


def test_a_neighbour_shows_its_label_and_a_hash_alone(kept: Kept) -> None:
    kept.sync()
    known = {fake_record(number).id for number in range(60)}
    for number in range(100, 140):
        proof = kept.tree.prove(fake_record(number).id)
        assert set(proof["leaf"] or {}) <= {"label", "value_hash"}
        assert not any(each in str(proof) for each in known)


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 64] = bytes(each ^ 0x55 for each in data[at : at + 64])
    path.write_bytes(data)


def test_a_damaged_file_is_an_error_and_is_built_again(kept: Kept) -> None:
    kept.sync()
    root, whole = kept.tree.root, kept.tree.path.read_bytes()
    for at in range(0, len(whole), 997):
        kept.tree.path.write_bytes(whole)
        damage(kept.tree.path, at)
        with suppress(IntegrityError):
            assert kept.tree.root == root
            kept.tree.check()
            assert answer(kept, 7) == {"shard": shard_of(kept, 7), "since": DAY}
    damage(kept.tree.path, 0)
    with pytest.raises(IntegrityError, match="damaged") as caught:
        kept.tree.prove("r7")
    assert "sisa doctor --repair" in caught.value.next_step
    with pytest.raises(IntegrityError):  # what else is in the file is not thrown away
        kept.sync()
    kept.tree.path.unlink()
    assert kept.sync() == (EMPTY_TREE.hex(), root)


@pytest.mark.parametrize("table", TABLES)
def test_a_damaged_table_is_not_built_upon(
    kept: Kept, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "BUCKET", 2)
    kept.sync()
    with closing(sqlite3.connect(kept.tree.path)) as db:
        column = {"leaves": "since", "nodes": "hash", "taken": "root", "tree": "value"}[table]
        other = f"'{LATER}'" if column in ("since", "root") else "zeroblob(32)"
        db.execute(f"UPDATE {table} SET {column} = {other}")  # noqa: S608
        db.commit()
    if table != "taken":  # which only names what is to be compared again
        with pytest.raises(IntegrityError):
            kept.tree.check()
    kept.forget(7)
    kept.sync()
    kept.tree.check()
    assert answer(kept, 7) is None
    assert answer(kept, 9) == {"shard": shard_of(kept, 9), "since": DAY}
    assert any(isinstance(each, Notice) for each in kept.events) == (table != "taken")


@pytest.mark.parametrize("table", TABLES)
def test_a_cell_may_hold_anything(kept: Kept, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage does not keep to the types of columns, to unique keys or to the length of a label."""
    monkeypatch.setattr(membership, "BUCKET", 2)
    kept.sync()
    with closing(sqlite3.connect(kept.tree.path)) as db:
        columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")]
        db.execute(f"CREATE TABLE loose AS SELECT * FROM {table}")  # noqa: S608
        db.execute(f"DROP TABLE {table}")
        db.execute(f"ALTER TABLE loose RENAME TO {table}")
    loose = kept.tree.path.read_bytes()
    for column, cell in product(columns, (None, 1.5, 2**62, "text", b"x", bytes(32))):
        kept.tree.path.write_bytes(loose)
        with closing(sqlite3.connect(kept.tree.path)) as db:
            db.execute(f"UPDATE {table} SET {column} = ?", (cell,))  # noqa: S608
            db.commit()
        with suppress(IntegrityError):
            kept.tree.check()
        with suppress(IntegrityError):
            kept.tree.is_behind(kept.context)
        with suppress(IntegrityError):
            assert answer(kept, 7) == {"shard": shard_of(kept, 7), "since": DAY}
        with suppress(IntegrityError):
            kept.tree.check_records(kept.context, [0, 1])


def test_an_error_of_the_slices_is_no_damage_of_the_tree(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept.tree, "_labels", lambda *_: int("a fault of the code"))
    with pytest.raises(ValueError, match="a fault of the code"):
        kept.sync()


def test_damage_is_told_without_a_word_of_what_is_damaged(kept: Kept) -> None:
    """An audit publishes the errors that it meets."""
    kept.sync()
    with closing(sqlite3.connect(kept.tree.path)) as db:
        db.execute("UPDATE leaves SET since = CAST(x'ff' || 'Ada' AS TEXT)")
        db.commit()
    with pytest.raises(IntegrityError) as caught:
        kept.tree.check()
    assert caught.value.got == "text that is not UTF-8"
    assert "Ada" not in str(caught.value)


def test_what_a_killed_writer_left_is_rolled_back(kept: Kept) -> None:
    kept.sync()
    root, path = kept.tree.root, kept.tree.path
    with transaction(path, "") as db:
        db.execute("PRAGMA cache_size = 1")  # writes pages before the transaction ends
        db.execute("UPDATE leaves SET since = 'never'")
        pages, journal = path.read_bytes(), Path(f"{path}-journal").read_bytes()
        db.execute("UPDATE leaves SET since = ?", (DAY,))
    path.write_bytes(pages)
    Path(f"{path}-journal").write_bytes(journal)
    assert kept.tree.root == root
    kept.tree.check()


def test_another_key_and_another_version_build_the_tree_again(kept: Kept) -> None:
    kept.sync()
    other = Membership(kept.tree.path, b"w" * 32)
    with pytest.raises(IntegrityError):
        other.prove("r7")
    assert other.sync(kept.context)[0] == EMPTY_TREE.hex()
    with closing(sqlite3.connect(kept.tree.path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(IntegrityError, match="damaged"):
        _ = other.root


def test_a_model_without_a_tree_proves_nothing(kept: Kept) -> None:
    with pytest.raises(IntegrityError, match="no evidence"):
        kept.tree.prove("r7")


def test_a_deletion_writes_a_number_of_nodes_that_hardly_grows(tmp_path: Path) -> None:
    written = []
    for size in (500, 8_000):
        with closing(sqlite3.connect(tmp_path / f"{size}")) as db:
            db.executescript(SCHEMA)
            tree = Tree(db)
            labels = [sha256(b"%d" % number).digest() for number in range(size)]
            tree.replace([], rows_of(set(labels)))
            before = db.total_changes
            tree.replace(labels[:1], [])
            written.append(db.total_changes - before)
    assert written[0] <= 12
    assert written[1] <= written[0] + 6  # sixteen times as many records: four levels more


@pytest.mark.parametrize("lie", ["a record left out", "a record under another label"])
def test_a_false_tree_is_found_by_the_ledger_and_the_ids(kept: Kept, lie: str) -> None:
    kept.sync()
    context, shard = kept.model.context, shard_of(kept, 7)
    kept.tree.check_records(context, [shard])
    label = KEY.output(fake_record(7).id.encode())[:LABEL_BYTES]
    with kept.tree._tree(write=True) as tree:
        query = "SELECT label, id_digest, shard, slice, since FROM leaves WHERE label = ?"
        (row,) = tree.db.execute(query, (label,)).fetchall()
        tree.replace([label], [(bytes(32), *row[1:])] if "another" in lie else [])
    kept.tree.check()  # in itself it is whole
    with pytest.raises(IntegrityError) as caught:
        kept.tree.check_records(context, [shard])
    assert ("labels" if "another" in lie else "other records") in caught.value.got
