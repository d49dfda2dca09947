"""Test the contract of RecordIndex over the fake and FAISS files.

An index is a function of its vectors, whatever their order and history: an index after a deletion
equals, byte for byte, one that never had the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import sha256_hex
from sisa.core.domain import IndexFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import RecordIndex, Vectors
from sisa.store.blobs.keyring import FileKeyring, is_sealed
from sisa.store.index import FaissIndex, IndexCache
from tests.fakes.ports import DIMENSION, FakeIndex, fake_embed

OpenIndex = Callable[[], RecordIndex]
ids = st.integers(0, 2**63 - 1)


def vector(number: int) -> Vectors:
    row: Vectors = fake_embed([f"text {number}"])[0]
    return row


def vectors(numbers: Any) -> dict[int, Vectors]:
    """Return vectors by id: that of a text, and those of up to two things that are asked in it."""
    return {
        number: np.stack([vector(number), *(asked(number, n) for n in range(number % 3))])
        for number in numbers
    }


def asked(number: int, question: int) -> Vectors:
    row: Vectors = fake_embed([f"question {question} of {number}"])[0]
    return row


@pytest.fixture(scope="module", params=["fake", "faiss", "sealed"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenIndex:
    """Return a function that opens another empty index of the same kind at each call."""
    if request.param == "fake":
        return FakeIndex
    return lambda: opened(tmp_path_factory.mktemp("index"), request.param)


@pytest.fixture(params=["faiss", "sealed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> FaissIndex:
    return opened(tmp_path, request.param)


def opened(folder: Path, form: str) -> FaissIndex:
    return FaissIndex(folder / "index", DIMENSION, FileKeyring(folder / "keyring", form == "sealed"))


def contents(index: RecordIndex, file: IndexFile) -> Any:
    if isinstance(index, FaissIndex):
        data = (index.root / file.name).read_bytes()
        assert is_sealed(data) == index.keyring.seals
        return index.keyring.unseal("index", file.name, "", data)
    assert isinstance(index, FakeIndex)
    return index.stored[file.name]


@given(held=st.lists(ids, unique=True, max_size=12), order=st.randoms(use_true_random=False))
def test_the_order_of_building_does_not_matter(fresh: OpenIndex, held: list[int], order: Any) -> None:
    one, other = fresh(), fresh()
    shuffled = list(held)
    order.shuffle(shuffled)
    assert one.build(0, "root", None, vectors(held)) == other.build(0, "root", None, vectors(shuffled))


@given(
    first=st.sets(ids, max_size=10),
    steps=st.lists(st.tuples(st.sets(ids, max_size=4), st.integers(0, 5)), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_any_history_gives_the_bytes_of_never_having_held_the_rest(
    fresh: OpenIndex, first: set[int], steps: list[tuple[set[int], int]], order: Any
) -> None:
    index, held = fresh(), set(first)
    file = index.build(0, "root", None, vectors(first))
    for added, num_removed in steps:
        kept = held - set(order.sample(sorted(held), min(num_removed, len(held))))
        wanted = {**vectors(added - held), **dict.fromkeys(kept)}
        file = index.build(0, "root", file, wanted)
        held = kept | (added - held)
    scratch = fresh()
    again = scratch.build(0, "root", None, vectors(held))
    assert again == file
    assert contents(scratch, again) == contents(index, file)


def test_search_gives_the_best_first(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(3, "root", None, vectors(range(20)))
    (hits,) = index.search([file], np.stack([vector(7)]), 5)
    expected = sorted(range(20), key=lambda n: -float(vector(n) @ vector(7)))[:5]
    assert [hit.vector_id for hit in hits] == expected
    assert expected[0] == 7
    assert [hit.score for hit in hits] == pytest.approx([float(vector(n) @ vector(7)) for n in expected])
    assert {hit.shard for hit in hits} == {3}


def test_every_query_row_has_its_answer(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors(range(6)))
    found = index.search([file], np.stack([vector(4), vector(2)]), 1)
    assert [[hit.vector_id for hit in hits] for hits in found] == [[4], [2]]
    assert index.search([file], np.zeros((0, DIMENSION), dtype=np.float32), 3) == []


def test_what_is_asked_is_found_by_the_nearest_question_of_each_record(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors(range(12)))
    for number, question in [(4, 0), (5, 0), (5, 1)]:
        query = asked(number, question)
        (hits,) = index.search([file], np.stack([query]), 5, "prompts")
        assert hits[0].vector_id == number
        assert hits[0].score == pytest.approx(1)
        assert len({hit.vector_id for hit in hits}) == 5, "a record is found once"
        (texts,) = index.search([file], np.stack([query]), 12)
        assert all(hit.score < 0.999 for hit in texts), "texts are compared apart from questions"


def test_a_record_in_which_nothing_is_asked_is_found_by_its_text(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors([3, 4]))
    (hits,) = index.search([file], np.stack([vector(3)]), 1, "prompts")
    assert hits[0].vector_id == 3
    assert hits[0].score == pytest.approx(1)
    (hits,) = index.search([file], np.stack([vector(4)]), 2, "prompts")
    assert all(hit.score < 0.999 for hit in hits)


def test_stored_questions_come_back_by_id(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors([3, 5, 4]))
    found = index.vectors(file, [5, 3, 4], "prompts")
    expected = np.stack([asked(5, 0), asked(5, 1), vector(3), asked(4, 0)])
    assert found.tobytes() == expected.tobytes()


def test_no_more_hits_than_vectors(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors([1, 2]))
    (hits,) = index.search([file], np.stack([vector(1)]), 50)
    assert {hit.vector_id for hit in hits} == {1, 2}


def test_an_empty_index_finds_nothing(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, {})
    assert file.num_vectors == 0
    assert index.search([file], np.stack([vector(1), vector(2)]), 3) == [[], []]
    assert index.held() == {file.name}


def test_stored_vectors_come_back_to_the_bit(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors([5, 1, 9]))
    found = index.vectors(file, [9, 5])
    assert found.dtype == np.float32
    assert found.tobytes() == np.stack([vector(9), vector(5)]).tobytes()
    assert index.vectors(file, []).shape == (0, DIMENSION)
    index.check(file)


def test_a_missing_vector_is_an_integrity_error(fresh: OpenIndex) -> None:
    index = fresh()
    file = index.build(0, "root", None, vectors([1]))
    with pytest.raises(IntegrityError):
        index.vectors(file, [1, 2])
    with pytest.raises(IntegrityError):
        index.build(0, "root", file, {2: None})
    with pytest.raises(IntegrityError):
        index.build(0, "root", None, {1: None})


def test_hits_come_from_all_files_in_one_order(fresh: OpenIndex) -> None:
    index = fresh()
    one = index.build(0, "root", None, vectors(range(0, 30, 2)))
    other = index.build(1, "root", None, vectors(range(1, 30, 2)))
    none = index.build(2, "root", None, {})
    (hits,) = index.search([one, none, other], np.stack([vector(7)]), 9)
    expected = sorted(range(30), key=lambda n: -float(vector(n) @ vector(7)))[:9]
    assert [(hit.vector_id, hit.shard) for hit in hits] == [(each, each % 2) for each in expected]
    assert index.search([], np.stack([vector(7)]), 3) == [[]]


def test_what_was_searched_is_not_found_when_it_is_erased(folder: FaissIndex) -> None:
    before = folder.build(0, "root", None, vectors([1, 2]))
    folder.search([before], np.stack([vector(1)]), 1)
    after = folder.build(0, "root", before, {2: None})
    (hits,) = folder.search([after], np.stack([vector(1)]), 2)
    assert [hit.vector_id for hit in hits] == [2]
    folder.erase([before.name])
    with pytest.raises(IntegrityError, match="missing"):
        folder.search([before], np.stack([vector(1)]), 1)


def test_what_one_object_read_another_need_not_until_it_is_erased(folder: FaissIndex) -> None:
    cache = IndexCache()
    one, other = (FaissIndex(folder.root, DIMENSION, folder.keyring, cache) for _ in range(2))
    file = one.build(0, "root", None, vectors([1, 2]))
    query = np.stack([vector(1)])
    hits = one.search([file], query, 1)
    (folder.root / file.name).unlink()
    assert other.search([file], query, 1) == hits
    other.erase([file.name])
    assert not cache.files
    with pytest.raises(IntegrityError, match="missing"):
        one.search([file], query, 1)


def test_only_what_the_last_search_named_stays_in_memory(folder: FaissIndex) -> None:
    cache = IndexCache()
    index = FaissIndex(folder.root, DIMENSION, folder.keyring, cache)
    before = index.build(0, "root", None, vectors([1, 2]))
    after = index.build(0, "root", before, {2: None})
    for file in (before, after):
        index.search([file], np.stack([vector(1)]), 1)
        assert list(cache.files) == [file.name]


def test_a_build_changes_no_other_file_and_erased_is_gone(fresh: OpenIndex) -> None:
    index = fresh()
    assert index.held() == frozenset()
    first = index.build(0, "root", None, vectors([1, 2]))
    second = index.build(1, "root", None, vectors([3]))
    assert index.held() == {first.name, second.name}
    index.erase([first.name, "never-held.faiss"])
    assert index.held() == {second.name}
    assert index.vectors(second, [3]).shape == (1, DIMENSION)


@pytest.mark.parametrize("place", [0, 30, -1])
def test_a_tampered_file_is_refused(folder: FaissIndex, place: int) -> None:
    file = folder.build(0, "root", None, vectors([1, 2]))
    path = folder.root / file.name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    for read in (
        lambda: folder.search([file], np.stack([vector(1)]), 1),
        lambda: folder.vectors(file, [1]),
        lambda: folder.build(0, "root", file, {1: None}),
        lambda: folder.check(file),
    ):
        with pytest.raises(IntegrityError, match="not the one that was recorded"):
            read()


@pytest.mark.parametrize("place", [0, 4, 8, 12, 37, 45, 74, -24])
def test_a_file_of_another_form_is_refused(folder: FaissIndex, place: int) -> None:
    """This holds even for a file whose digest the ledger names."""
    file = folder.build(0, "root", None, vectors([1]))
    data = bytearray(folder.checked(file.name, file.sha256, "index file"))
    data[place] ^= 0x40
    for wrong in (bytes(data), bytes(data[:-1]), b""):
        forged = replace(file, sha256=sha256_hex(wrong), num_bytes=len(wrong))
        sealed = folder.keyring.seal("index", forged.name, "", wrong)
        (folder.root / forged.name).write_bytes(sealed)
        with pytest.raises(IntegrityError, match="not the form that is written"):
            folder.search([forged], np.stack([vector(1)]), 1)


def test_a_sealed_index_without_its_key_is_refused(tmp_path: Path) -> None:
    index = opened(tmp_path, "sealed")
    file = index.build(0, "root", None, vectors([1]))
    copy = (index.root / file.name).read_bytes()
    assert vector(1).tobytes() not in copy
    index.erase([file.name])
    (index.root / file.name).write_bytes(copy)
    for read in (lambda: index.vectors(file, [1]), lambda: index.check(file)):
        with pytest.raises(IntegrityError, match="key is missing from the keyring"):
            read()


def test_a_missing_file_is_refused(folder: FaissIndex) -> None:
    file = folder.build(0, "root", None, vectors([1]))
    folder.erase([file.name])
    with pytest.raises(IntegrityError, match="missing"):
        folder.vectors(file, [1])
    with pytest.raises(IntegrityError, match="missing"):
        folder.check(file)
