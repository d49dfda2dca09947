"""The index at rest: one FAISS file per shard, named by its bytes.

Rules: `IndexIDMap2` over a flat inner-product index; nothing is fitted on the data, and nothing is
remembered. What was read for a search is kept for the next, until its file is erased. Vectors stand in
the order of their ids, so a file equals that of an index that never held a deleted record. A file's
digest (of the plaintext) is checked before FAISS parses it. Every build starts from bytes on disk: FAISS
leaves removed vectors in the memory of the index object they were removed from.

Not covered: where a candidate record is (only the ledger says so); how it is searched (`loaded.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sisa.digest import sha256_hex
from sisa.domain import Hit, IndexFile
from sisa.errors import IntegrityError
from sisa.ports import Keyring, Vectors
from sisa.store import files
from sisa.store.keyring import PLAIN, shred
from sisa.store.loaded import Loaded, Warm, search

ROOM = "index"


class FaissIndex:
    """A RecordIndex in a directory."""

    def __init__(
        self, root: Path, dimension: int, keyring: Keyring = PLAIN, warm: Warm | None = None
    ) -> None:
        """`warm` outlives the object: what it read, the next object over the directory need not."""
        self.root = root
        self.dimension = dimension
        self.keyring = keyring
        self._warm = Warm() if warm is None else warm

    def build(
        self, shard: int, root: str, base: IndexFile | None, vectors: Mapping[int, Any]
    ) -> IndexFile:
        import faiss

        ids = np.array(sorted(vectors), dtype=np.int64)
        kept = np.array([vectors[each] is None for each in ids.tolist()], dtype=bool)
        matrix = np.zeros((len(ids), self.dimension), dtype=np.float32)
        matrix[kept] = self._held_vectors(base, ids[kept].tolist())
        for row in np.flatnonzero(~kept).tolist():
            matrix[row] = vectors[int(ids[row])]
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimension))
        if len(ids):
            index.add_with_ids(matrix, ids)
        data = faiss.serialize_index(index).tobytes()
        file = IndexFile(shard, root, len(ids), sha256_hex(data), len(data))
        sealed = self.keyring.seal(ROOM, file.name, "", data)
        files.write_atomic(self.root / file.name, sealed)
        return file

    def _held_vectors(self, base: IndexFile | None, vector_ids: Sequence[int]) -> Vectors:
        if base is None:
            if not vector_ids:
                return np.zeros((0, self.dimension), dtype=np.float32)
            raise IntegrityError("vectors are expected of an index that does not exist")
        return self.vectors(base, vector_ids)

    def search(self, found: Sequence[IndexFile], queries: Vectors, top_k: int) -> list[list[Hit]]:
        held = self._warm.files
        loaded = {
            file.name: held.get(file.name) or self._load(file) for file in found if file.num_vectors
        }
        self._warm.files = loaded
        return search(list(loaded.values()), queries, top_k)

    def _load(self, file: IndexFile) -> Loaded:
        import faiss

        index = self._read(file)
        ids = faiss.vector_to_array(index.id_map)
        return Loaded(file.shard, ids, index.index.reconstruct_n(0, index.ntotal))

    def vectors(self, file: IndexFile, vector_ids: Sequence[int]) -> Vectors:
        if not vector_ids:
            return np.zeros((0, self.dimension), dtype=np.float32)
        import faiss

        index = self._read(file)
        held = faiss.vector_to_array(index.id_map)  # in the order of ids, as `build` wrote them
        wanted = np.asarray(vector_ids, dtype=np.int64)
        places = np.searchsorted(held, wanted)
        if len(held) == 0 or (held[np.minimum(places, len(held) - 1)] != wanted).any():
            raise IntegrityError(
                "the index lacks a vector that the ledger counts on",
                where=str(self.root / file.name),
                next_step="run `sisa train` with the same run file to rebuild the index",
            )
        rows: Vectors = index.index.reconstruct_n(0, index.ntotal)[places]
        return rows

    def check(self, file: IndexFile) -> None:
        self._bytes(file)

    def _bytes(self, file: IndexFile) -> bytes:
        unseal = partial(self.keyring.unseal, ROOM, file.name, "")
        return files.read_checked(self.root / file.name, file.sha256, "index file", unseal)

    def _read(self, file: IndexFile) -> Any:
        import faiss

        return faiss.deserialize_index(np.frombuffer(self._bytes(file), dtype=np.uint8))

    def held(self) -> frozenset[str]:
        return files.held_names(self.root)

    def erase(self, names: Collection[str]) -> None:
        gone = set(names)
        self._warm.files = {name: each for name, each in self._warm.files.items() if name not in gone}
        shred(self.keyring, ROOM, names, partial(files.erase_all, self.root))
