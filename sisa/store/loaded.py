"""Index files in memory, and the search over them: candidates by sign codes, then exact scores.

    codes       one bit a dimension: whether the vector is above zero there; of more than CODE_BITS
                dimensions, those that are CODE_BITS apart are added first
    candidates  the nearest codes by Hamming distance, over all files (`IndexBinaryFlat`)
    hits        the candidates' inner products with the query, exact, best first

Rules: a code is a function of its vector alone: nothing is fitted on the data, so nothing remembers a
deleted record. Up to EXACT_UP_TO vectors all are scored, which is as fast, and the search is exact. The
candidates of a query depend on the vectors that are held and on nothing else. Only what the last search
named stays in memory.

Not covered: reading files (`index.py`). Recall of many vectors is measured (`tests/bench/lookup.py`).

>>> codes_of(np.array([[0.5, -0.5, 0.1, 0.0, -1.0, 1.0, 1.0, -1.0]], dtype=np.float32))
array([[166]], dtype=uint8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sisa.core.domain import Hit
from sisa.core.ports import By, Vectors

EXACT_UP_TO = 20_000
MIN_CANDIDATES, CANDIDATES_PER_HIT = 2000, 100
CODE_BITS = 128  # half the memory to read of 256; twice the candidates keep the recall

Places = NDArray[np.intp] | slice  # of vectors in a file
_ALL = slice(None)


def codes_of(vectors: Vectors) -> NDArray[np.uint8]:
    """Sign codes, [num_vectors, ceil(min(dimension, CODE_BITS) / 8)]."""
    folded = vectors[:, :CODE_BITS]
    for start in range(CODE_BITS, vectors.shape[1], CODE_BITS):
        part = vectors[:, start : start + CODE_BITS]
        folded = folded + np.pad(part, ((0, 0), (0, CODE_BITS - part.shape[1])))
    return np.packbits(folded > 0, axis=1)


@dataclass(frozen=True)
class LoadedIndex:
    """The vectors of a file, or those of one sort, in the order of their ids."""

    shard: int
    ids: NDArray[np.int64]
    vectors: Vectors

    def by(self, by: By) -> LoadedIndex:
        """The first vector of each id (its record's text), or the others (what is asked in it): an id
        with one vector has it for both.

        >>> LoadedIndex(0, np.array([3, 3, 8]), np.eye(3, dtype=np.float32)).by("asked").vectors[:, 1:]
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        first = np.append(True, self.ids[1:] != self.ids[:-1])[: len(self.ids)]
        rows = first if by == "text" else ~first | (first & np.append(first[1:], True))
        return self if rows.all() else LoadedIndex(self.shard, self.ids[rows], self.vectors[rows])

    @cached_property
    def by_code(self) -> Any:
        import faiss

        codes = codes_of(self.vectors)
        index: Any = faiss.IndexBinaryFlat(codes.shape[1] * 8)
        index.use_heap = False  # counting is faster where many are wanted
        index.add(codes)
        return index


@dataclass
class Warm:
    """Files by name that the last search read, kept for the next, by what a query is compared with."""

    files: dict[str, Mapping[By, LoadedIndex]] = field(default_factory=dict)


def search_loaded(loaded: Sequence[LoadedIndex], queries: Vectors, top_k: int) -> list[list[Hit]]:
    """For each query row the best `top_k` over all files, best first; a record once, by its best."""
    num_wanted = max(MIN_CANDIDATES, CANDIDATES_PER_HIT * top_k)
    chosen: list[list[Places]]
    if sum(len(each.ids) for each in loaded) <= max(EXACT_UP_TO, num_wanted):
        chosen = [[_ALL for _ in loaded] for _ in queries]
    else:
        chosen = _candidates(loaded, queries, num_wanted)
    return [_best(loaded, places, query, top_k) for places, query in zip(chosen, queries, strict=True)]


def _candidates(loaded: Sequence[LoadedIndex], queries: Vectors, num_wanted: int) -> list[list[Places]]:
    """For each query the places, file by file, of the nearest codes over all files."""
    codes = codes_of(queries)
    asked = [each.by_code.search(codes, min(num_wanted, len(each.ids))) for each in loaded]
    found = []
    for row in range(len(queries)):
        distances = np.concatenate([each[0][row] for each in asked])
        farthest = np.partition(distances, num_wanted - 1)[num_wanted - 1]
        # Whatever is as far as the last candidate counts too, as far as it was found: no tie is drawn.
        found.append([places[row][far[row] <= farthest] for far, places in asked])
    return found


def _best(
    loaded: Sequence[LoadedIndex], places: Sequence[Places], query: Vectors, top_k: int
) -> list[Hit]:
    if not loaded:
        return []
    pairs = list(zip(loaded, places, strict=True))
    scores = np.concatenate([each.vectors[at] @ query for each, at in pairs])
    named = [each.ids[at] for each, at in pairs]
    ids, shards = (
        np.concatenate(named),
        np.repeat([each.shard for each in loaded], list(map(len, named))),
    )
    best: dict[tuple[int, int], Hit] = {}
    for n in np.lexsort((ids, shards, -scores)).tolist():
        place = int(shards[n]), int(ids[n])
        if place not in best:  # a record's others score less
            best[place] = Hit(place[1], float(scores[n]), place[0])
        if len(best) == top_k:
            break
    return list(best.values())
