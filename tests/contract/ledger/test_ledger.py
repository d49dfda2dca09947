"""Test the contract of Ledger over the fake, SQLite and a real PostgreSQL.

Any sequence of changes gives equal answers from all to every question. A change is applied completely
or not at all. What PostgreSQL does in its own way is in `test_postgres_ledger.py`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.domain import (
    Export,
    Head,
    HeldCheckpoint,
    Identity,
    IndexFile,
    RecordRow,
    SliceFile,
    WorkItem,
)
from sisa.core.errors import Busy, SisaError
from sisa.core.patches import Patch, VaultSet
from sisa.core.ports import Change, Ledger
from sisa.core.requests import Request, RequestEvent
from sisa.planning.layout import root_of, slice_root
from sisa.store.ledger import ledger as ledger_module
from sisa.store.ledger import rows as rows_module
from sisa.store.ledger import sqlite as sqlite_module
from sisa.store.ledger.ledger import SqlLedger
from tests.contract.ledger.ledgers import (
    NUMBERS,
    SHARDS,
    answers,
    named,
    opened,
    patch_job,
    row,
    tombstone,
)
from tests.crash import crashing
from tests.examples import num_examples
from tests.fakes.ledger import FakeLedger
from tests.fakes.postgres_server import PostgresServer

T = TypeVar("T")


def some(values: st.SearchStrategy[T], key: Callable[[T], Any]) -> st.SearchStrategy[list[T]]:
    return st.lists(values, max_size=4, unique_by=key)


numbers, shards = st.sampled_from(NUMBERS), st.sampled_from(SHARDS)

sizes = st.integers(1, 2**40)

digests = st.builds(named, st.just("bytes"), st.integers(0, 9))

records_of_subjects = st.builds(
    lambda number, alone: row(number, None if alone else number % 3), numbers, st.booleans()
)

places = st.tuples(shards, st.integers(0, 1))

requests = st.builds(
    lambda number, records, state, shards, seconds: Request(
        f"req-{number}",
        "2026-01-01T00:00:00+00:00",
        "2026-02-01",
        records,
        state=state,
        shards=shards,
        seconds=seconds,
    ),
    numbers,
    sizes,
    st.sampled_from(["received", "completed"]),
    st.lists(st.tuples(shards, shards, shards), max_size=2).map(tuple),
    st.floats(0, 1e6),
)

events = st.builds(
    RequestEvent,
    numbers.map("req-{}".format),
    st.sampled_from(["received", "completed"]),
    st.just("2026-01-01T00:00:00+00:00"),
    st.text("ab'\";-- ", max_size=5),
)

checkpoints = st.builds(
    lambda number, seconds, size: HeldCheckpoint(
        named("job", number),
        number % 3,
        tuple(range(number % 2 + 1)),
        number,
        "f",
        "m" * 64,
        "a" * 64,
        size,
        seconds,
        5,
    ),
    numbers,
    st.floats(0, 1e6),
    sizes,
)

heads = st.builds(Head, shards, st.none() | digests, shards, st.none() | digests)

exports = st.builds(
    lambda number, shard, state, keys: Export(
        f"/out {number}",
        shard,
        tuple(range(number % 2 + 1)),
        number,
        named("job", number % 2),
        "a",
        "2026",
        state,
        "r",
        tuple(keys),
    ),
    numbers,
    shards,
    st.sampled_from(["clean", "tainted", "erasing"]),
    st.lists(digests, max_size=2),
)

set_names = numbers.map(lambda number: named("set", number))

patches = st.builds(
    lambda number, again, state, size, score: Patch(
        version=10 * number + again,  # a key may come again, under a new version
        job=patch_job(number),
        state=state,
        wanted_at="2026",
        num_bytes=size,
        report={"metrics": [{"score": score}], "note": "'; --"},
    ),
    numbers,
    st.integers(1, 9),
    st.sampled_from(["wanted", "active", "dropped"]),
    sizes,
    st.floats(0, 1),
)

vault_sets = st.builds(
    VaultSet,
    set_names,
    st.sampled_from(["forget", "retain"]),
    sizes,
    st.text("ab'\";-- ", max_size=5),
    st.just("2026"),
    digests,
    sizes,
    st.booleans(),
    numbers.map("req-{}".format),
)

identity_keys = numbers.map(lambda number: named("identity", number % 3))

record_ids = numbers.map(lambda number: named("record id", number))

work_items = st.builds(
    WorkItem,
    numbers.map(lambda number: f"item{number:08d}"),
    identity_keys | st.just(""),
    st.sampled_from(["20260801_4821_Email", "20260801_4821_NDZ"]),
    numbers.map("req-{}".format),
    st.integers(0, 3),
    st.sampled_from([0, 3, 5]),
)

changes = st.builds(
    Change,
    added=some(records_of_subjects, lambda each: each.id_digest),
    removed=some(st.builds(row, numbers), lambda each: each.id_digest),
    tombstones=some(
        st.builds(tombstone, numbers, st.none() | st.sampled_from(SHARDS)), lambda each: each.id_digest
    ),
    slices=some(
        st.builds(SliceFile, shards, st.integers(0, 1), digests, sizes, digests, sizes),
        lambda each: (each.shard, each.slice),
    ),
    emptied=some(places, lambda each: each),
    indexes=some(st.builds(IndexFile, shards, digests, sizes, digests, sizes), lambda each: each.shard),
    unindexed=some(shards, lambda each: each),
    heads=some(heads, lambda each: each.shard),
    headless=some(shards, lambda each: each),
    checkpoints=some(checkpoints, lambda each: each.key),
    dropped=some(numbers.map(lambda number: named("job", number)), lambda each: each),
    requests=some(requests, lambda each: each.request_id),
    named=some(st.tuples(st.sampled_from(["r0", "r1"]), numbers.map(str)), lambda each: each),
    events=st.lists(events, max_size=2),
    exports=some(exports, lambda each: each.name),
    unexported=some(exports.map(lambda each: each.name), lambda each: each),
    patches=some(patches, lambda each: each.key),
    vault=some(vault_sets, lambda each: each.name),
    vaulted=some(
        st.tuples(set_names, numbers.map(lambda number: named("record id", number))), lambda each: each
    ),
    unvaulted=some(set_names, lambda each: each),
    identities=some(st.builds(Identity, identity_keys, record_ids), lambda each: each),
    unidentified=some(record_ids, lambda each: each),
    work_items=some(work_items, lambda each: each.item),
    meta=st.dictionaries(st.sampled_from(["config", "base"]), st.text("ab'\";-- ", max_size=5)),
)


def test_exclusive_blocks_keep_each_other_out_and_nest(place: Path | str) -> None:
    def count(ledger: Ledger) -> None:
        for _ in range(5):
            with ledger.exclusive(), contextlib.suppress(KeyError), ledger.exclusive():
                number = int(ledger.meta().get("config", "0"))
                with ledger.exclusive():
                    ledger.commit(Change(meta={"config": str(number + 1)}))
                raise KeyError

    def count_apart() -> None:
        with opened(place) as other:
            count(other)

    with opened(place, create=True) as ledger:
        doing = (partial(count, ledger), partial(count, ledger), count_apart, count_apart)
        threads = [threading.Thread(target=each) for each in doing]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert ledger.meta()["config"] == "20"


def without_rows_held(ledger: Ledger, change: Change) -> Change:
    """Drop added rows that are held and stay: flows never add them, and they are refused."""
    found = ledger.lookup(each.id_digest for each in change.added)
    held = {digest for digest, each in found.items() if isinstance(each, RecordRow)}
    held -= {each.id_digest for each in change.removed}
    return replace(change, added=[each for each in change.added if each.id_digest not in held])


@pytest.mark.slow
@settings(max_examples=num_examples(100))
@given(history=st.lists(changes, max_size=5))
def test_any_history_gives_equal_answers(
    tmp_path_factory: pytest.TempPathFactory, history: list[Change]
) -> None:
    _compare(history, tmp_path_factory.mktemp("ledger") / "ledger.sqlite")


@pytest.mark.slow
@settings(max_examples=num_examples(100, share=34))
@given(history=st.lists(changes, min_size=1, max_size=5))
def test_any_history_gives_equal_answers_from_postgres(
    postgres: PostgresServer, history: list[Change]
) -> None:
    _compare(history, postgres.new_url())


def _compare(history: list[Change], place: Path | str) -> None:
    fake = FakeLedger()
    with opened(place, create=True) as sql:
        assert answers(sql) == answers(fake)
        for change in history:
            possible = without_rows_held(fake, change)
            assert sql.commit(possible) == fake.commit(possible)
            assert answers(sql) == answers(fake)
        sql.scrub()
    for create in (False, True):
        with opened(place, create=create) as again:
            assert answers(again) == answers(fake)


def test_added_rows_get_the_number_of_their_commit(ledger: Ledger) -> None:
    assert ledger.seq() == 0
    assert ledger.commit(Change(added=[row(1)])) == 1
    assert ledger.commit(Change(added=[row(2)])) == 2
    assert [ledger.rows(row(n).shard)[0].seq for n in (1, 2)] == [1, 2]


def test_a_held_row_comes_before_its_tombstone(ledger: Ledger) -> None:
    ledger.commit(Change(tombstones=[tombstone(1)]))
    assert ledger.lookup([row(1).id_digest]) == {row(1).id_digest: tombstone(1)}
    ledger.commit(Change(added=[row(1)]))
    assert isinstance(ledger.lookup([row(1).id_digest])[row(1).id_digest], RecordRow)


def test_a_row_can_move_in_one_change(ledger: Ledger) -> None:
    """A changed layout removes and adds the same ids in one transaction."""
    ledger.commit(Change(added=[row(1)]))
    moved = replace(row(1), shard=2, slice=0)
    ledger.commit(Change(removed=[row(1)], added=[moved]))
    assert (ledger.rows(1), ledger.rows(2)) == ([], [replace(moved, seq=2)])


def test_requests_stay_in_the_order_of_their_coming(ledger: Ledger) -> None:
    def request(name: str, state: Any = "committed") -> Request:
        return Request(name, "2026-01-01", "2026-02-01", 1, state=state, shards=((0, 0, 1),))

    for name in ("b", "a", "c"):
        ledger.commit(Change(requests=[request(name)]))
    ledger.commit(Change(requests=[request("b", "completed")]))
    assert [(each.request_id, each.state) for each in ledger.requests()] == [
        ("b", "completed"),
        ("a", "committed"),
        ("c", "committed"),
    ]


def test_a_patch_that_is_wanted_again_is_a_new_version(ledger: Ledger) -> None:
    first = Patch(1, patch_job(1), "reverted", "2026", report={"steps": 3})
    ledger.commit(Change(patches=[first, Patch(2, patch_job(2), "active", "2026")]))
    again = Patch(3, patch_job(1), "wanted", "2027")
    ledger.commit(Change(patches=[again]))
    assert [(each.version, each.state) for each in ledger.patches()] == [(2, "active"), (3, "wanted")]
    assert ledger.patches()[1] == again


def test_a_set_goes_with_the_rows_of_its_records(ledger: Ledger) -> None:
    one, two = (VaultSet(named("set", n), "retain", 1, "asked", "2026", "s", 1) for n in (1, 2))
    pairs = [(each.name, named("record id", 0)) for each in (one, two)]
    ledger.commit(Change(vault=[one, two], vaulted=pairs))
    assert ledger.sets_with([named("record id", 0)]) == {
        named("record id", 0): sorted([one.name, two.name])
    }
    ledger.commit(Change(unvaulted=[one.name], vault=[replace(two, held=False)]))
    assert ledger.vault() == [replace(two, held=False)]
    assert ledger.sets_with([named("record id", 0)]) == {named("record id", 0): [two.name]}
    assert ledger.vaulted(one.name) == []


def test_more_ids_than_one_query_takes(ledger: Ledger) -> None:
    rows = [row(number) for number in range(1200)]
    ledger.commit(Change(added=rows))
    assert len(ledger.lookup(each.id_digest for each in rows)) == 1200
    asked = [each.vector_id for each in rows]
    assert sum(len(ledger.by_vector(shard, asked)) for shard in SHARDS) == 1200
    ledger.commit(Change(removed=rows[:1100]))
    assert sum(len(ledger.rows(shard)) for shard in SHARDS) == 100


@pytest.mark.parametrize(
    "double",
    [
        pytest.param([row(1), row(1)], id="the same id twice"),
        pytest.param([row(2), row(0)], id="an id that is held"),
        pytest.param(
            [row(2), RecordRow("x", None, "y", "z", "text", 2, 0, row(2).vector_id, 1)],
            id="the same vector id in one shard",
        ),
    ],
)
def test_a_failing_commit_changes_nothing(sql: SqlLedger, double: list[RecordRow]) -> None:
    sql.commit(Change(added=[row(0)], heads=[Head(0, "k", 1, "k")], meta={"config": "old"}))
    before = answers(sql)
    change = Change(
        removed=[],
        added=double,
        tombstones=[tombstone(0)],
        heads=[Head(0, None, 0, None)],
        headless=[0],
        requests=[Request("r", "2026", "2027", 1)],
        events=[RequestEvent("r", "received", "2026")],
        meta={"config": "new"},
    )
    with pytest.raises(SisaError):
        sql.commit(change)
    assert answers(sql) == before


def test_a_change_that_dies_halfway_changes_nothing(sql: SqlLedger) -> None:
    sql.commit(Change(added=[row(0)]))
    before = answers(sql)
    with crashing((ledger_module, "_append_events")):
        sql.commit(Change(removed=[row(0)], heads=[Head(0, None, 0, None)]))
    assert answers(sql) == before


def test_writers_follow_one_another(place: Path | str) -> None:
    """Each commit continues from the last one, also from several threads and connections."""
    numbers = range(8)
    with opened(place, create=True):
        pass

    def write(number: int) -> int:
        with opened(place) as ledger:
            event = RequestEvent(f"r{number}", "received", "2026")
            return ledger.commit(Change(added=[row(number)], events=[event]))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(write, numbers))
    with opened(place) as ledger:
        assert sorted(found) == [number + 1 for number in numbers]
        assert (ledger.seq(), ledger.event_head().num_events, ledger.lost()) == (8, 8, [])


def test_whoever_watches_is_woken_by_a_commit(place: Path | str) -> None:
    with opened(place, create=True) as ledger, opened(place) as other, ledger.watch() as wait:
        assert not wait(0.05)
        other.commit(Change(heads=[Head(0, None, 0, None)]))
        assert wait(5)
        with ThreadPoolExecutor(1) as pool:
            woken = pool.submit(wait, 30)
            other.commit(Change(heads=[Head(1, None, 0, None)]))
            assert woken.result(10)
        assert ledger.seq() == 2


def test_watching_leaves_errors_of_another_database_alone(place: Path | str) -> None:
    foreign = sqlite3.DatabaseError("of another database")
    with (
        opened(place, create=True) as ledger,
        pytest.raises(sqlite3.DatabaseError) as caught,
        ledger.watch(),
    ):
        raise foreign
    assert caught.value is foreign


def test_the_contents_of_a_slice_are_those_of_its_root(ledger: Ledger) -> None:
    held = [row(number) for number in range(60)]
    places = sorted({(each.shard, each.slice) for each in held})
    here = {place: [each for each in held if (each.shard, each.slice) == place] for place in places}
    files = [SliceFile(*place, slice_root(its), len(its), "f", 9) for place, its in here.items()]
    ledger.commit(Change(added=held, slices=files[1:]))
    ledger.commit(Change(slices=files[:1]))
    for file in files:
        assert root_of(ledger.contents(file.shard, file.slice)) == file.root
        assert len(ledger.contents(file.shard, file.slice)) == file.num_records
    assert ledger.contents(0, 9) == []


def test_a_second_writer_is_busy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_engine = sa.create_engine
    monkeypatch.setattr(
        sa, "create_engine", lambda url, **_: create_engine(url, connect_args={"timeout": 0.05})
    )
    with opened(path, create=True) as ledger:
        writer = sqlite3.connect(path, isolation_level=None)
        try:
            writer.execute("BEGIN IMMEDIATE")
            with pytest.raises(Busy):
                ledger.commit(Change(added=[row(1)]))
        finally:
            writer.close()
        assert ledger.seq() == 0


def test_a_statement_is_compiled_once_for_all_ledgers(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        with opened(tmp_path / str(number), create=True) as ledger:
            ledger.commit(Change(added=[row(number)]))
            digest = row(number).id_digest
            assert list(ledger.lookup([digest])) == [digest]
        found.append(len(sqlite_module._STATEMENTS))
    assert 0 < found[0] == found[1]


def test_only_the_owner_may_read_the_ledger(in_file: SqlLedger, path: Path) -> None:
    in_file.commit(Change(added=[row(1)]))
    for each in path.parent.glob(path.name + "*"):
        assert stat.S_IMODE(os.stat(each).st_mode) == 0o600, each.name


def test_a_reader_sees_one_state_while_another_process_writes(place: Path | str) -> None:
    """Rows and their number are read separately: another process may commit in between."""
    with opened(place, create=True) as ledger, opened(place) as reader:
        read = rows_module.read

        def slow(connection: Any, table: sa.Table, *where: Any, **options: Any) -> Any:
            found = read(connection, table, *where, **options)
            if table.name == "heads":
                with pytest.MonkeyPatch.context() as undone:
                    undone.setattr(rows_module, "read", read)
                    ledger.commit(Change(heads=[Head(len(found), None, 0, None)]))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows_module, "read", slow)
            assert [len(reader.heads()) for _ in range(3)] == [0, 1, 2]


def test_a_record_that_arrives_while_vectors_are_looked_up_is_no_damage(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(place, create=True) as ledger, opened(place) as reader:
        read = rows_module.read

        def slow(*asked: Any, **options: Any) -> Any:
            monkeypatch.undo()
            found = read(*asked, **options)
            ledger.commit(Change(added=[row(1)]))
            return found

        monkeypatch.setattr(rows_module, "read", slow)
        assert reader.by_vector(row(1).shard, [row(1).vector_id]) == {}
        assert list(reader.by_vector(row(1).shard, [row(1).vector_id])) == [row(1).vector_id]
