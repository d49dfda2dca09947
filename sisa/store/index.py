"""The index at rest and in memory: one FAISS file per shard, and the search over all files.

Files are `IndexIDMap2` over a flat inner-product index, named by their bytes: `_written` and `_parsed`
are all that know this form. Vectors are in the order of their ids, those of one record side by side: its
text first, then its prompts. So a file equals that of an index that never held a deleted record.

    codes       one bit a dimension: whether the vector is above zero there; with more than CODE_BITS
                dimensions, those that are CODE_BITS apart are added first
    candidates  the nearest codes by Hamming distance, over all files (`IndexBinaryFlat`)
    hits        the candidates' inner products with the query, exact, best first

Nothing is fitted on the data, so nothing remembers a deleted record. Up to EXACT_UP_TO vectors the
search is exact; recall with more is measured by `tests/bench/answering/lookup.py`.

>>> import numpy as np
>>> codes_of(np.array([[0.5, -0.5, 0.1, 0.0, -1.0, 1.0, 1.0, -1.0]], dtype=np.float32))
array([[166]], dtype=uint8)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.core.digest import sha256_hex
from sisa.core.domain import Hit, IndexFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import By, Keyring, Vectors
from sisa.store.areas import INDEX
from sisa.store.blobs.sealed_area import SealedArea

HEAD_BYTES = 37  # of each of the two nested indexes; their number of vectors is at 8
EXACT_UP_TO = 20_000
MIN_CANDIDATES, CANDIDATES_PER_HIT = 2000, 100
CODE_BITS = 128  # half the memory traffic of 256; twice the candidates keep the recall

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Rows = NDArray[np.intp] | slice  # of the vectors in a file
_ALL = slice(None)


def _written(ids: NDArray[np.int64], vectors: Vectors) -> bytes:
    """Return the bytes of a file."""
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    if len(ids):
        index.add_with_ids(vectors, ids)
    data: bytes = faiss.serialize_index(index).tobytes()
    return data


def _parsed(data: bytes, dimension: int) -> tuple[NDArray[np.int64], Vectors] | None:
    """Return the ids and vectors of a file, None unless it has the form that `_written` gives it.

    FAISS (1.15) would read any other kind of index, some of which open files that they name, and ignore
    another dimension or bytes after the end; it is slower, too.
    """
    import numpy as np

    empty = _written(np.zeros(0, np.int64), np.zeros((0, dimension), np.float32))
    num_vectors, rest = divmod(len(data) - len(empty), 4 * dimension + 8)
    if rest or num_vectors < 0:
        return None
    head, count = bytearray(empty[:-8]), num_vectors.to_bytes(8, "little")
    head[8:16] = head[HEAD_BYTES + 8 : HEAD_BYTES + 16] = count
    head[-8:] = (num_vectors * dimension).to_bytes(8, "little")
    end = len(head) + 4 * dimension * num_vectors  # of the vectors; the ids and their number follow
    if not data.startswith(head) or data[end : end + 8] != count:
        return None
    vectors = np.frombuffer(data[len(head) : end], np.float32).reshape(-1, dimension)
    return np.frombuffer(data[end + 8 :], np.int64), vectors


class FaissIndex(SealedArea):
    """A RecordIndex in a directory."""

    area = INDEX

    def __init__(
        self, root: Path, dimension: int, keyring: Keyring, cache: IndexCache | None = None
    ) -> None:
        super().__init__(root, keyring)
        self.root = root
        self.dimension = dimension
        self._cache = IndexCache() if cache is None else cache

    def build(
        self, shard: int, root: str, base: IndexFile | None, vectors: Mapping[int, Any]
    ) -> IndexFile:
        import numpy as np

        held = LoadedIndex(shard, np.zeros(0, np.int64), np.zeros((0, self.dimension), np.float32))
        if kept := [each for each, rows in vectors.items() if rows is None]:
            if base is None:
                raise IntegrityError("vectors of an index that does not exist are expected")
            held = self._select(self._load(base), base, kept)
        fresh = [(each, rows) for each, rows in vectors.items() if rows is not None]
        ids = np.concatenate([held.ids, *(np.full(len(rows), each) for each, rows in fresh)])
        order = np.argsort(ids, kind="stable")  # vectors of one record keep their order
        matrix = np.concatenate([held.vectors, *(rows for _, rows in fresh)])[order]
        data = _written(ids[order], matrix)
        file = IndexFile(shard, root, len(vectors), sha256_hex(data), len(data))
        self._put(file.name, data)
        return file

    def _select(self, found: LoadedIndex, file: IndexFile, vector_ids: Sequence[int]) -> LoadedIndex:
        """Return all vectors of some ids. Raise IntegrityError if an id has none."""
        import numpy as np

        wanted = np.isin(found.ids, vector_ids)
        if len(np.unique(found.ids[wanted])) < len(set(vector_ids)):
            raise IntegrityError(
                "the index lacks a vector of a record in the ledger",
                where=str(self.root / file.name),
                next_step="run `sisa train` with the same run file to rebuild the index",
            )
        return LoadedIndex(found.shard, found.ids[wanted], found.vectors[wanted])

    def search(
        self, found: Sequence[IndexFile], queries: Vectors, top_k: int, by: By = "text"
    ) -> list[list[Hit]]:
        cached, loaded = self._cache.files, dict[str, Mapping[By, LoadedIndex]]()
        for file in found:
            if file.num_vectors:
                loaded[file.name] = cached.get(file.name) or self._load_both(file)
        self._cache.files = loaded
        return search_loaded([each[by] for each in loaded.values()], queries, top_k)

    def _load_both(self, file: IndexFile) -> dict[By, LoadedIndex]:
        found = self._load(file)
        return {"text": found.by("text"), "prompts": found.by("prompts")}

    def _load(self, file: IndexFile) -> LoadedIndex:
        found = _parsed(self._bytes(file), self.dimension)
        if found is None or len(found[0]) < file.num_vectors:
            raise IntegrityError(
                "an index file has the recorded digest, but not the form that is written",
                where=str(self.root / file.name),
                next_step="restore the model directory from a backup",
            )
        return LoadedIndex(file.shard, *found)

    def vectors(self, file: IndexFile, vector_ids: Sequence[int], by: By = "text") -> Vectors:
        import numpy as np

        cached = self._cache.files.get(file.name)
        found = self._select(cached[by] if cached else self._load(file).by(by), file, vector_ids)
        rows = {each: n for n, each in enumerate(vector_ids)}
        order = np.argsort([rows[each] for each in found.ids.tolist()], kind="stable")
        return found.vectors[order]

    def check(self, file: IndexFile) -> None:
        self._bytes(file)

    def _bytes(self, file: IndexFile) -> bytes:
        return self.checked(file.name, file.sha256, "index file")

    def erase(self, names: Collection[str]) -> None:
        gone = set(names)
        self._cache.files = {name: each for name, each in self._cache.files.items() if name not in gone}
        super().erase(names)


def codes_of(vectors: Vectors) -> NDArray[np.uint8]:
    """Return sign codes, [num_vectors, ceil(min(dimension, CODE_BITS) / 8)]."""
    import numpy as np

    folded = vectors[:, :CODE_BITS]
    for start in range(CODE_BITS, vectors.shape[1], CODE_BITS):
        part = vectors[:, start : start + CODE_BITS]
        folded = folded + np.pad(part, ((0, 0), (0, CODE_BITS - part.shape[1])))
    return np.packbits(folded > 0, axis=1)


@dataclass(frozen=True)
class LoadedIndex:
    """Vectors of a file, or one kind of them, in the order of their ids."""

    shard: int
    ids: NDArray[np.int64]
    vectors: Vectors

    def by(self, by: By) -> LoadedIndex:
        """Return the first vector of each id (its record's text), or the others (its prompts).

        An id with one vector has it for both.

        >>> import numpy as np
        >>> LoadedIndex(0, np.array([3, 3, 8]), np.eye(3, dtype=np.float32)).by("prompts").vectors[:, 1:]
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        import numpy as np

        first = np.append(True, self.ids[1:] != self.ids[:-1])[: len(self.ids)]
        rows = first if by == "text" else ~first | (first & np.append(first[1:], True))
        return self if rows.all() else LoadedIndex(self.shard, self.ids[rows], self.vectors[rows])

    @cached_property
    def by_code(self) -> Any:
        """Return the FAISS index of the sign codes."""
        import faiss

        codes = codes_of(self.vectors)
        index: Any = faiss.IndexBinaryFlat(codes.shape[1] * 8)
        index.use_heap = False  # counting is faster for many candidates
        index.add(codes)
        return index


@dataclass
class IndexCache:
    """Files that the last search read, by name and kind of vector, kept in memory for the next one."""

    files: dict[str, Mapping[By, LoadedIndex]] = field(default_factory=dict)


def search_loaded(loaded: Sequence[LoadedIndex], queries: Vectors, top_k: int) -> list[list[Hit]]:
    """Return what `RecordIndex.search` does; a record's score is that of its best vector."""
    num_wanted = max(MIN_CANDIDATES, CANDIDATES_PER_HIT * top_k)
    chosen: list[list[_Rows]]
    if sum(len(each.ids) for each in loaded) <= max(EXACT_UP_TO, num_wanted):
        chosen = [[_ALL for _ in loaded] for _ in queries]
    else:
        chosen = _candidates(loaded, queries, num_wanted)
    return [_best(loaded, rows, query, top_k) for rows, query in zip(chosen, queries, strict=True)]


def _candidates(loaded: Sequence[LoadedIndex], queries: Vectors, num_wanted: int) -> list[list[_Rows]]:
    """Return for each query the rows of the nearest codes, file by file."""
    import numpy as np

    codes = codes_of(queries)
    nearest = [each.by_code.search(codes, min(num_wanted, len(each.ids))) for each in loaded]
    found = []
    for row in range(len(queries)):
        distances = np.concatenate([each[0][row] for each in nearest])
        farthest = np.partition(distances, num_wanted - 1)[num_wanted - 1]
        # Codes as far as the last candidate count, too, so that ties are not broken arbitrarily.
        found.append([rows[row][far[row] <= farthest] for far, rows in nearest])
    return found


def _best(loaded: Sequence[LoadedIndex], rows: Sequence[_Rows], query: Vectors, top_k: int) -> list[Hit]:
    import numpy as np

    if not loaded:
        return []
    pairs = list(zip(loaded, rows, strict=True))
    scores = np.concatenate([each.vectors[at] @ query for each, at in pairs])
    per_file = [each.ids[at] for each, at in pairs]
    ids = np.concatenate(per_file)
    shards = np.repeat([each.shard for each in loaded], list(map(len, per_file)))
    best: dict[tuple[int, int], Hit] = {}
    own = float((query * query).sum())
    for n in np.lexsort((ids, shards, -scores)).tolist():
        found = int(shards[n]), int(ids[n])
        if found not in best:  # the record's other vectors score less
            best[found] = Hit(found[1], float(scores[n]) / own, found[0])
        if len(best) == top_k:
            break
    return list(best.values())
