"""Test the contract of Ledger over the fake, SQLite and a real PostgreSQL.

Any sequence of changes gives equal answers from both to every question. A change is applied completely
or not at all. Nothing of a removed row stays in the file. Damage is a typed error. What PostgreSQL does
in its own way is in `test_postgres_ledger.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copytree, ignore_patterns, move
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.digest import digest_of
from sisa.core.domain import (
    WRITTEN,
    Export,
    Head,
    HeldCheckpoint,
    Identity,
    IndexFile,
    Patch,
    PatchJob,
    RecordRow,
    Request,
    RequestEvent,
    SliceFile,
    Tombstone,
    VaultSet,
    WorkItem,
)
from sisa.core.errors import Busy, IntegrityError, SisaError
from sisa.core.ports import Change, Ledger
from sisa.planning.layout import root_of, slice_root
from sisa.store.ledger import ledger as ledger_module
from sisa.store.ledger import migrations
from sisa.store.ledger import rows as rows_module
from sisa.store.ledger import sqlite as sqlite_module
from sisa.store.ledger.database import backend_at, upgrade_ledger
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.tables import SCHEMA_VERSION, schema
from tests.examples import is_full, num_examples
from tests.fakes.ledger import FakeLedger
from tests.fakes.postgres_server import PostgresServer

T = TypeVar("T")
NUMBERS = range(6)
SHARDS = range(3)


def named(sort: str, number: int) -> str:
    return hashlib.sha256(f"{sort} {number}".encode()).hexdigest()


def row(number: int, subject: int | None = None) -> RecordRow:
    """Return record n, in shard n % 3; no record of its subject is in another shard."""
    who = None if subject is None else named("subject", subject)
    vector_id = int(named("record id", number)[:15], 16)
    digests = named("record id", number), who, named("content", number), named("text", number % 4)
    return RecordRow(*digests, "completion", number % 3, number % 2, vector_id, number + 1)


def tombstone(number: int, subject: int | None = None) -> Tombstone:
    who = None if subject is None else named("subject", subject)
    place = number % 3, number % 2
    text = named("text", number % 4)
    return Tombstone(
        named("record id", number), who, text, *place, f"req-{number}", "2026-01-01", number
    )


def patch_job(number: int) -> PatchJob:
    settings = {"method": "npo", "learning_rate": 1e-4, "stop": None}
    beneath = (named("patch", number),) if number % 2 else ()
    return PatchJob("base", beneath, (named("set", number),), WRITTEN, settings, "f")


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


def answers(ledger: Ledger) -> dict[str, Any]:
    """Return the answers to every question, for all possible arguments."""
    ids = [named("record id", number) for number in NUMBERS]
    vectors = [row(number).vector_id for number in NUMBERS]
    each_shard: list[int | None] = [None, *SHARDS]
    return {
        "seq": ledger.seq(),
        "meta": ledger.meta(),
        "lookup": ledger.lookup([*ids, named("record id", 999)]),
        "by_subject": [ledger.by_subject(named("subject", each), each) for each in SHARDS],
        "by_subject anywhere": [ledger.by_subject(named("subject", each)) for each in SHARDS],
        "num_without_subject": ledger.num_without_subject(),
        "by_vector": [ledger.by_vector(shard, vectors) for shard in SHARDS],
        "no vectors": ledger.by_vector(0, []),
        "rows": [ledger.rows(shard, slice_) for shard in SHARDS for slice_ in (None, 0, 1)],
        "counts": ledger.counts(),
        "kinds": ledger.kinds(),
        "slices": [ledger.slices(shard) for shard in each_shard],
        "indexes": [ledger.indexes(shard) for shard in each_shard],
        "heads": ledger.heads(),
        "checkpoints": [ledger.checkpoints(shard) for shard in each_shard],
        "requests": ledger.requests(),
        "events": ledger.events(),
        "exports": ledger.exports(),
        "named_by": [ledger.named_by(each) for each in ("r0", "r1", "r2")],
        "by_text": ledger.by_text({named("text", 0), named("text", 3), "none"}),
        "surely by_text": ledger.by_text({named("text", 0), named("text", 3), "none"}, full_scan=True),
        "patches": ledger.patches(),
        "vault": ledger.vault(),
        "vaulted": [ledger.vaulted(named("set", number)) for number in NUMBERS],
        "sets_with": ledger.sets_with(ids),
        "sets_with none": ledger.sets_with([]),
        "identities": ledger.identities(),
        "identities of keys": ledger.identities(keys=[named("identity", 1), "none"]),
        "identities of records": ledger.identities(id_digests=ids),
        "identities of none": ledger.identities(keys=[]),
        "work_items": ledger.work_items(),
        "work_items of keys": ledger.work_items([named("identity", 1), "none"]),
        "num_tombstones": ledger.num_tombstones(),
        "lost": ledger.lost(),
    }


@contextlib.contextmanager
def opened(place: Path | str, *, create: bool = False) -> Iterator[SqlLedger]:
    ledger = SqlLedger(place, create=create)
    try:
        yield ledger
    finally:
        ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, path: Path) -> Path | str:
    """Return where a ledger can be made, in either database."""
    return path if request.param == "sqlite" else request.getfixturevalue("postgres").new_url()


@pytest.fixture
def sql(place: Path | str) -> Iterator[SqlLedger]:
    with opened(place, create=True) as ledger:
        yield ledger


@pytest.fixture
def in_file(path: Path) -> Iterator[SqlLedger]:
    with opened(path, create=True) as ledger:
        yield ledger


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


@pytest.fixture(params=["fake", "sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, path: Path) -> Iterator[Ledger]:
    if request.param == "fake":
        yield FakeLedger()
    else:
        server = request.getfixturevalue("postgres") if request.param == "postgres" else None
        with opened(server.new_url() if server else path, create=True) as found:
            yield found


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
    with opened(place) as again:
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


def test_a_change_that_dies_halfway_changes_nothing(
    sql: SqlLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql.commit(Change(added=[row(0)]))
    before = answers(sql)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger_module, "_append_events", dies)
    with pytest.raises(KeyboardInterrupt):
        sql.commit(Change(removed=[row(0)], heads=[Head(0, None, 0, None)]))
    monkeypatch.undo()
    assert answers(sql) == before


def test_reopening_gives_the_same_answers(place: Path | str) -> None:
    with opened(place, create=True) as ledger:
        ledger.commit(Change(added=[row(1), row(2, subject=2)], meta={"config": "x"}))
        before = answers(ledger)
    with opened(place) as again:
        assert answers(again) == before
    with opened(place, create=True) as again:
        assert answers(again) == before


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


def bytes_at_rest(path: Path) -> bytes:
    """Return the bytes of the database, its write-ahead log and SQLite's other files."""
    return b"".join(each.read_bytes() for each in path.parent.glob(path.name + "*"))


def test_scrub_leaves_nothing_in_the_unused_part_of_pages(path: Path) -> None:
    """Balancing a B-tree leaves copies that `secure_delete` does not zero: in 11 of 40 such ledgers.

    If nothing of the removed rows is left, nothing is rewritten.
    """
    piece = {n: row(n).vector_id.to_bytes(8, "big")[2:] for n in (*range(400), *range(1000, 1390))}
    for seed in (12, 13):
        source, file = random.Random(seed), path.with_name(f"{seed}.sqlite")
        with opened(file, create=True) as ledger:
            held = set(range(400))
            ledger.commit(Change(added=[row(number) for number in held]))
            for start in range(1000, 1360, 30):
                removed = set(source.sample(sorted(held), source.choice([1, 2, 40])))
                fresh = set(range(start, start + source.randrange(30)))
                ledger.commit(Change(removed=[row(number) for number in removed]))
                ledger.commit(Change(added=[row(number) for number in fresh]))
                held = held - removed | fresh
            gone = {*range(400), *range(1000, 1360)} - held
            ledger.scrub()
            before = file.read_bytes()
            left = {each for each in gone if piece[each] in before}
            assert left, "nothing to find: this proves nothing"
            ledger.scrub([row(each) for each in sorted(gone - left)[: sqlite_module.FEW_ROWS]])
            assert file.read_bytes() == before
            ledger.scrub([row(each) for each in (min(gone - left), min(left))] if seed == 12 else None)
            after = bytes_at_rest(file)
            assert not any(piece[each] in after for each in gone)
            assert len(ledger.rows(row(1).shard)) > 0


def test_scrub_leaves_no_key_of_a_removed_identity(path: Path) -> None:
    """One in fifteen of such ledgers keeps a copy until then."""

    def identity(number: int) -> Identity:
        return Identity(named("identity", number), named("record id", number))

    source, held = random.Random(23), set(range(400))
    with opened(path, create=True) as ledger:
        ledger.commit(Change(identities=[identity(number) for number in held]))
        for start in range(1000, 1360, 30):
            removed = set(source.sample(sorted(held), source.choice([1, 2, 40])))
            fresh = set(range(start, start + source.randrange(30)))
            ledger.commit(Change(unidentified=[identity(n).id_digest for n in removed]))
            ledger.commit(Change(identities=[identity(number) for number in fresh]))
            held = held - removed | fresh
        gone = {*range(400), *range(1000, 1360)} - held
        ledger.backend._empty_log()  # type: ignore[attr-defined]
        keys = [identity(n).key[: sqlite_module.PIECE_BYTES].encode() for n in gone]
        assert any(key in path.read_bytes() for key in keys), "nothing to find: this proves nothing"
        ledger.scrub()
        assert not any(key in bytes_at_rest(path) for key in keys)
        assert len(ledger.identities()) == len(held)


def test_scrub_finds_the_end_of_a_row_whose_beginning_is_overwritten(path: Path) -> None:
    with opened(path, create=True) as ledger:
        backend: Any = ledger.backend
        ledger.commit(Change(added=[row(1)]))
        ledger.scrub()
        assert (backend.holds([row(1)]), backend.holds([row(2)])) == (True, False)
        path.write_bytes(path.read_bytes().replace(named("content", 1).encode(), bytes(64)))
        assert (backend.holds([row(1)]), backend.holds([row(2)])) == (True, False)


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


@pytest.mark.parametrize("count", [30, 800])
def test_scrub_leaves_no_digest_of_a_removed_row(path: Path, count: int) -> None:
    """This covers many pages that split, merge and are freed, while the ledger stays open."""
    source = random.Random(count)
    with opened(path, create=True) as ledger:
        held: set[int] = set()
        gone: set[int] = set()
        for start in range(0, count, count // 5):
            fresh = range(start, start + count // 5)
            ledger.commit(Change(added=[row(number, number // 3) for number in fresh]))
            held |= set(fresh)
            removed = set(source.sample(sorted(held), len(held) // 3))
            ledger.commit(Change(removed=[row(number) for number in removed]))
            held -= removed
            gone |= removed
        ledger.scrub([row(number, number // 3) for number in sorted(gone)])
        data = bytes_at_rest(path)
    digests = {
        sort: {number for number in range(count) if named(sort, number).encode() in data}
        for sort in ("record id", "content")
    }
    assert digests["content"] == digests["record id"] == held
    subjects_left = {n for n in range(count) if named("subject", n).encode() in data}
    assert subjects_left == {number // 3 for number in held}


def test_every_connection_zeroes_what_it_removes(in_file: SqlLedger) -> None:
    """Some builds of SQLite do so by default, others do not; the test above can't tell them apart."""
    with in_file.backend.engine.connect() as one, in_file.backend.engine.connect() as other:
        for connection in (one, other):
            assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_before_the_scrub_the_log_still_holds_the_row(path: Path) -> None:
    """This is why there is a scrub; if this failed, the test above would prove nothing."""
    with opened(path, create=True) as ledger:
        ledger.commit(Change(added=[row(1)]))
        ledger.commit(Change(removed=[row(1)]))
        assert named("content", 1).encode() in bytes_at_rest(path)
        ledger.scrub()
        assert named("content", 1).encode() not in bytes_at_rest(path)
    assert named("content", 1).encode() not in bytes_at_rest(path)


def test_scrub_also_takes_replaced_files_and_dropped_checkpoints(path: Path) -> None:
    old = named("root", 1)
    with opened(path, create=True) as ledger:
        checkpoint = HeldCheckpoint(old, 0, (0,), 1, "f", "m", "a", 1, 1.0, 1)
        ledger.commit(
            Change(
                slices=[SliceFile(0, 0, old, 1, old, 1)],
                indexes=[IndexFile(0, old, 1, old, 1)],
                heads=[Head(0, old, 1, old)],
                checkpoints=[checkpoint],
            )
        )
        ledger.commit(
            Change(
                slices=[SliceFile(0, 0, "new", 1, "new", 1)],
                unindexed=[0],
                heads=[Head(0, None, 0, "new")],
                dropped=[old],
            )
        )
        ledger.scrub()
        assert old.encode() not in bytes_at_rest(path)


def test_scrub_with_an_open_reader_is_busy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite reports a busy log in a result row: if it is not read, deleted bytes stay unnoticed."""
    monkeypatch.setattr(sqlite_module, "SCRUB_PATIENCE_S", 0.05)
    create_engine = sa.create_engine
    monkeypatch.setattr(
        sa, "create_engine", lambda url, **_: create_engine(url, connect_args={"timeout": 0.05})
    )
    with opened(path, create=True) as ledger:
        ledger.commit(Change(added=[row(1)]))
        reader = sqlite3.connect(path, isolation_level=None)
        try:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM records").fetchall()
            ledger.commit(Change(removed=[row(1)]))
            with pytest.raises(Busy, match="reader"):
                ledger.scrub()
            reader.execute("COMMIT")
        finally:
            reader.close()
        ledger.scrub()
        assert named("content", 1).encode() not in bytes_at_rest(path)


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


def test_another_schema_version_is_refused(path: Path) -> None:
    with opened(path, create=True) as ledger:
        ledger.commit(Change(added=[row(1)]))
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(IntegrityError, match="another version"):
        SqlLedger(path)


SCHEMAS = {
    4: "ae2ebf4c3a4c1bf09218cd1ca2bd1dce0031832baf46b4df0f9cca5a3c36ea84",
    5: "a6e52b547be3af37de4f4decc89674420f90c4b6c92b81d882e1f6209a3edc59",
    6: "b320a4fede593346318d0487465e1f76f2da5ef735b5a9f587c37955af2baa83",
}


def tables_digest(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        found = raw.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return digest_of(sorted(statement for (statement,) in found))


def test_the_tables_of_this_schema_stay(in_file: SqlLedger, path: Path) -> None:
    """The tables follow the fields of the nouns: a field more is another schema."""
    in_file.close()
    assert tables_digest(path) == SCHEMAS[SCHEMA_VERSION]


def back_to_version_5(place: Path | str, source: SqlLedger, folder: Path) -> None:
    """Make a ledger as version 5 made it, with the rows of another."""
    older = folder / "migrations"
    copytree(migrations.LOCATION, older, ignore=ignore_patterns("v0006*"))
    own = backend_at(place, create=True)
    with contextlib.closing(own), source.backend.reading() as theirs, own.writing() as connection:
        migrations.upgrade(connection, 0, older)
        own.stamp(connection, 5)
        rows_module.copy_rows(theirs, connection)


def back_to_version_4(path: Path) -> None:
    with TemporaryDirectory() as folder:
        newer = Path(move(path, folder))
        with opened(newer) as source:
            back_to_version_5(path, source, Path(folder))
    for statement in (
        "DROP TABLE identities",
        "DROP TABLE work_items",
        "DELETE FROM counts WHERE name LIKE 'identities%' OR name LIKE 'work_items%'",
        "PRAGMA user_version = 4",
    ):
        execute(path, statement)
    assert tables_digest(path) == SCHEMAS[4]


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


# --- rows that are not the ones that were written, and rows that are lost


def full(ledger: Ledger) -> None:
    """Put a row into every table."""
    ledger.commit(
        Change(
            added=[row(1, 1), row(4, 1), row(2)],
            tombstones=[tombstone(0, 1), tombstone(5)],
            slices=[SliceFile(1, 1, "r", 1, "s", 1), SliceFile(2, 0, "r", 2, "s", 1)],
            indexes=[IndexFile(1, "r", 1, "s", 1)],
            heads=[Head(1, "k", 1, "k"), Head(2, None, 0, "k")],
            checkpoints=[HeldCheckpoint(named("job", 1), 1, (0, 1), 1, "f", "m", "a", 5, 1, 5)],
            requests=[Request("r0", "2026", "2027", 2)],
            named=[("r0", named("record id", 1)), ("r0", named("record id", 5))],
            events=[RequestEvent("r0", "received", "2026"), RequestEvent("r0", "approved", "2026")],
            exports=[
                Export("/out", 1, (0, 1), 1, "k", "a", "2026"),
                Export("/x", 2, (0,), 1, "k", "a", "2026"),
            ],
            patches=[Patch(n, patch_job(n), "active", "2026") for n in (1, 2)],
            vault=[VaultSet(named("set", n), "retain", 2, "asked", "2026", "s", 1) for n in (1, 2)],
            vaulted=[(named("set", n), named("record id", 4)) for n in (1, 2)],
            identities=[
                Identity(named("identity", key), named("record id", n))
                for key, n in ((1, 1), (1, 4), (2, 4))
            ],
            work_items=[
                WorkItem("item1", named("identity", 1), "20260801_4821_Email", "r0", 1),
                WorkItem("item2", named("identity", 2), "20260801_4821_NDZ", status=5),
            ],
            meta={"config": "x"},
        )
    )


TABLES = [table.name for table in rows_module.COUNTED]
COLUMNS = [(table.name, column.name) for table in schema.sorted_tables for column in table.columns]


def execute(place: Path | str, statement: str, values: tuple[Any, ...] = ()) -> None:
    """Run a statement past the ledger; `?` stands for a value."""
    if isinstance(place, Path):
        with contextlib.closing(sqlite3.connect(place)) as connection:
            connection.execute(statement, values)
            connection.commit()
    else:
        with psycopg.connect(place) as connection:
            connection.execute(statement.replace("?", "%s").encode(), values or None)


def replies(ledger: Ledger) -> dict[str, Any]:
    """Ask every question separately; return its answer, or None if it is refused as damaged."""
    asked: dict[str, Callable[[], Any]] = {
        "seq": ledger.seq,
        "meta": ledger.meta,
        "kinds": ledger.kinds,
        "counts": ledger.counts,
        "heads": ledger.heads,
        "requests": ledger.requests,
        "events": ledger.events,
        "exports": ledger.exports,
        "named_by": lambda: ledger.named_by("r0"),
        "num_tombstones": ledger.num_tombstones,
        "patches": ledger.patches,
        "vault": ledger.vault,
        "vaulted": lambda: ledger.vaulted(named("set", 1)),
        "identities": ledger.identities,
        "work_items": ledger.work_items,
        "sets_with": lambda: ledger.sets_with([named("record id", 4)]),
    }
    for shard in SHARDS:
        for name in ("slices", "indexes", "checkpoints", "rows"):
            asked[f"{name} {shard}"] = partial(getattr(ledger, name), shard)
        vectors = [row(number).vector_id for number in NUMBERS if number % 3 == shard]
        asked[f"by_vector {shard}"] = partial(ledger.by_vector, shard, vectors)
    for number in (*NUMBERS, 99):
        asked[f"lookup {number}"] = partial(ledger.lookup, [named("record id", number)])
        who, texts = named("subject", number), {named("text", number)}
        asked[f"subject {number}"] = partial(ledger.by_subject, who, number % 3)
        asked[f"identity {number}"] = partial(ledger.identities, keys=[named("identity", number)])
        asked[f"identities {number}"] = partial(
            ledger.identities, id_digests=[named("record id", number)]
        )
        asked[f"items {number}"] = partial(ledger.work_items, [named("identity", number)])
        asked[f"text {number}"] = partial(ledger.by_text, texts, full_scan=True)
    found: dict[str, Any] = {}
    for name, question in asked.items():
        try:
            found[name] = question()
        except IntegrityError:
            found[name] = None
    return found


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
