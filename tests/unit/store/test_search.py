"""The search over many vectors: the candidates and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.domain import Hit
from sisa.core.ports import Vectors
from sisa.model import open_model
from sisa.store import index
from sisa.store.areas import INDEX
from sisa.store.index import (
    _ALL,
    CODE_BITS,
    EXACT_UP_TO,
    LoadedIndex,
    codes_of,
    search_loaded,
)
from tests.models import confessing
from tests.models.opened_files import opened_files

DIMENSION = 64


def made(num_vectors: int, seed: int) -> Vectors:
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((num_vectors, DIMENSION)).astype(np.float32)
    found: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def split(vectors: Vectors, num_shards: int) -> list[LoadedIndex]:
    ids = np.arange(len(vectors), dtype=np.int64)
    return [LoadedIndex(s, ids[s::num_shards], vectors[s::num_shards]) for s in range(num_shards)]


@given(st.integers(1, 5), st.integers(1, 900), st.integers(0, 9))
def test_few_vectors_are_searched_exactly(num_shards: int, num_vectors: int, seed: int) -> None:
    vectors, query = made(num_vectors, seed), made(1, seed + 100)
    (hits,) = search_loaded(split(vectors, num_shards), query, 10)
    assert [hit.vector_id for hit in hits] == np.argsort(-(vectors @ query[0]))[:10].tolist()


@pytest.mark.parametrize("num_shards", [1, 3, 16])
def test_many_vectors_are_found_however_they_lie_in_shards(num_shards: int) -> None:
    vectors = made(EXACT_UP_TO + 1, 0)
    queries = vectors[:50] + 0.1 * made(50, 1)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :1]
    found = search_loaded(split(vectors, num_shards), queries, 1)
    assert [hits[0].vector_id for hits in found] == exact[:, 0].tolist()
    score = float(queries[0] @ vectors[found[0][0].vector_id]) / float(queries[0] @ queries[0])
    assert found[0][0].score == pytest.approx(score)
    assert found[0][0].shard == found[0][0].vector_id % num_shards


def test_a_deleted_vector_leaves_the_choice_of_the_others_as_if_it_had_never_been() -> None:
    vectors, queries = made(EXACT_UP_TO + 3, 2), made(8, 3)
    kept = np.delete(np.arange(EXACT_UP_TO + 3), [7, 4000])
    left = [LoadedIndex(0, kept, vectors[kept])]
    without = [
        [hit for hit in hits if hit.vector_id not in (7, 4000)]
        for hits in search_loaded(split(vectors, 1), queries, 12)
    ]
    again = search_loaded(left, queries, 12)
    assert [[h.vector_id for h in hits[:10]] for hits in again] == [
        [h.vector_id for h in hits[:10]] for hits in without
    ]


def test_a_code_of_many_dimensions_is_folded_and_depends_on_its_vector_alone() -> None:
    draw = np.random.default_rng(6)
    vectors = draw.standard_normal((50, CODE_BITS + 64)).astype(np.float32)
    codes = codes_of(vectors)
    assert codes.shape == (50, CODE_BITS // 8)
    assert all((codes_of(vectors[n : n + 1]) == codes[n]).all() for n in range(50))
    bits = np.unpackbits(codes, axis=1).astype(bool)
    assert (bits[:, 64:] == (vectors[:, 64:CODE_BITS] > 0)).all()
    assert (bits[:, :64] == (vectors[:, :64] + vectors[:, CODE_BITS:] > 0)).all()
    assert codes_of(np.zeros((1, 2 * CODE_BITS + 1), dtype=np.float32)).any() == np.False_


def test_only_candidates_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    query = made(1, 5)
    places: list[Any] = []
    whole = index._best

    def best(
        files: Sequence[LoadedIndex], chosen: Sequence[Any], query: Vectors, top_k: int
    ) -> list[Hit]:
        places.extend(chosen)
        return whole(files, chosen, query, top_k)

    monkeypatch.setattr(index, "_best", best)
    search_loaded(split(made(EXACT_UP_TO + 1, 4), 2), query, 3)
    assert 2000 <= sum(map(len, places)) < 4000
    places.clear()
    search_loaded(split(made(EXACT_UP_TO, 4), 2), query, 3)
    assert places == [_ALL, _ALL]


def test_a_model_that_is_asked_again_reads_no_index_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confessing.use_fake_resources(monkeypatch)
    directory = tmp_path / "model"
    confessing.build(directory)
    model = open_model(directory, executor="serial")

    def asked() -> tuple[list[str], int]:
        with opened_files(directory / INDEX) as opened:
            found = model.find(text="where")
        return [each.id for each in found], len(opened)

    first, num_read = asked()
    assert num_read > 1
    assert asked() == (first, 0)
    model.forget(first[:1])
    rest, num_read = asked()
    assert first[0] not in rest
    assert num_read <= 1, "of the shard that changed"
