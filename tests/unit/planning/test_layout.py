"""The partition: a keyed hash of a record's own subject or id; nothing else may place it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Part, Record
from sisa.planning.layout import Assigner, Layout, index_root, slice_root

KEYED = Keyed(b"1" * 32)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
layouts = st.builds(Layout, st.integers(1, 20), st.integers(1, 10))


def record(record_id: str, subject: str | None = None, text: str = "x") -> Record:
    return Record(record_id, subject, "text", (Part("text", text),))


def assigner(num_shards: int = 8, num_slices: int = 5, keyed: Keyed = KEYED) -> Assigner:
    return Assigner(keyed, Layout(num_shards, num_slices))


@given(layouts, names, st.lists(names, min_size=1, max_size=5))
def test_a_subject_has_one_place(layout: Layout, subject: str, ids: list[str]) -> None:
    assign = Assigner(KEYED, layout)
    places = {assign.place(record(each, subject)) for each in ids}
    assert len(places) == 1
    ((shard, slice_),) = places
    assert 0 <= shard < layout.num_shards
    assert 0 <= slice_ < layout.num_slices


@given(names, names, names)
def test_content_does_not_place(record_id: str, one: str, other: str) -> None:
    assign = assigner()
    assert assign.place(record(record_id, None, one)) == assign.place(record(record_id, None, other))


def test_a_subject_named_like_an_id_hashes_elsewhere() -> None:
    """Otherwise the shards of ids would reveal those of subjects."""
    assign = assigner(1000, 1000)
    apart = [assign.place(record("r", f"n{i}")) != assign.place(record(f"n{i}")) for i in range(20)]
    assert all(apart)
    assert assign.id_digest("ada") != assign.subject_digest("ada")


def test_shard_and_slice_are_drawn_apart() -> None:
    """With equal counts, one number used for both would fill the diagonal alone."""
    places = {assigner(4, 4).place(record(f"r{i}")) for i in range(400)}
    assert len(places) == 16


def test_another_secret_places_and_names_otherwise() -> None:
    one, other = assigner(50, 50), assigner(50, 50, Keyed(b"2" * 32))
    moved = [one.place(record(f"r{i}")) != other.place(record(f"r{i}")) for i in range(50)]
    assert sum(moved) > 45
    assert one.row(record("r1", "s"), 1).record_digest != other.row(record("r1", "s"), 1).record_digest
    assert one.id_digest("r1") != other.id_digest("r1")
    assert one.subject_digest("s") != other.subject_digest("s")


def test_places_are_pinned() -> None:
    """A changed hash would send every record of every model to another place."""
    assign = assigner(8, 5)
    assert [assign.place(record(f"r{i}")) for i in range(4)] == [(6, 4), (0, 4), (2, 3), (0, 2)]
    assert assign.place(record("r0", "ada")) == (1, 4)


@pytest.mark.parametrize("grouped", [False, True])
def test_places_are_balanced(grouped: bool) -> None:
    """Chi-square of 10,000 ids in 40 cells: mean 39, standard deviation 8.8; 5 of them are allowed."""
    assign, cells = assigner(8, 5), 40
    people = (f"person-{number}" for number in range(10_000))
    found = Counter(assign.place(record("r", name) if grouped else record(name)) for name in people)
    expected = 10_000 / cells
    assert sum((found[s, t] - expected) ** 2 / expected for s in range(8) for t in range(5)) < 83


def test_a_row_names_its_record_by_digests_alone() -> None:
    assign = assigner()
    row = assign.row(record("sam@example.org", "Sam Doe", "a secret"), 7)
    assert (row.shard, row.slice) == assign.place(record("other", "Sam Doe"))
    assert row.id_digest == assign.id_digest("sam@example.org")
    assert row.subject_digest == assign.subject_digest("Sam Doe")
    assert (row.num_tokens, row.kind, row.seq) == (7, "text", 0)
    assert not any(word in repr(row) for word in ("sam", "Sam", "secret"))
    assert assign.row(record("sam@example.org"), 7).subject_digest is None


@given(names)
def test_vector_ids_fit_faiss(record_id: str) -> None:
    assert 0 <= assigner().row(record(record_id), 1).vector_id < 2**63


def test_every_part_of_a_record_is_in_its_digest() -> None:
    assign = assigner()
    whole = Record("r", "s", "completion", (Part("prompt", "a"), Part("completion", "b")))
    others = [
        replace(whole, id="r2"),
        replace(whole, subject_id=None),
        replace(whole, subject_id="None"),
        replace(whole, kind="chat"),
        replace(whole, parts=whole.parts[::-1]),
        replace(whole, parts=(Part("prompt", "ab"), Part("completion", ""))),
        replace(whole, parts=(Part("user", "a"), Part("completion", "b"))),
    ]
    assert len({assign.row(each, 1).record_digest for each in [whole, *others]}) == len(others) + 1


@given(st.sets(st.integers(0, 50), max_size=10), st.randoms(use_true_random=False))
def test_roots_do_not_depend_on_order(numbers: set[int], order: random.Random) -> None:
    rows = [assigner().row(record(f"r{number}"), 1) for number in sorted(numbers)]
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert slice_root(shuffled) == slice_root(rows)
    assert index_root(shuffled) == index_root(rows)


def test_roots_know_their_content() -> None:
    rows = [assigner().row(record(f"r{i}"), 1) for i in range(3)]
    changed = [*rows[:2], assigner().row(record("r2", None, "other text"), 1)]
    for root in (slice_root, index_root):
        assert len({root(rows), root(rows[:2]), root(changed), root([])}) == 4


def test_a_root_does_not_depend_on_when_a_record_came() -> None:
    """Records added later and records there from the start give the same slice."""
    row = assigner().row(record("r1"), 1)
    assert slice_root([replace(row, seq=9)]) == slice_root([row])


def test_a_models_name_confirms_nothing_without_the_key() -> None:
    """It outlives a deletion in requests and on cards; adapters can be trained again by anybody."""
    heads = ["a" * 64, None]
    found = {assigner(keyed=Keyed(bytes([n]) * 32)).model_digest(heads, []) for n in range(3)}
    assert len(found) == 3
    assert not found & {digest_of(heads), digest_of({"heads": heads, "patches": []})}
    assert assigner().model_digest(heads, []) == assigner().model_digest(heads, [])
    assert assigner().model_digest(heads, ["p"]) != assigner().model_digest(heads, [])
