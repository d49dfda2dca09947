"""The index at rest: one FAISS file per shard, named by its bytes.

The files are `IndexIDMap2` over a flat inner-product index; nothing is fitted on the data, and nothing
is remembered. Vectors stand in the order of their ids, those of one record side by side: that of its
text, then those of what is asked in it. So a file equals that of an index that never held a deleted
record. What was read for a search is kept for the next, until its file is erased. A file's digest (of
the plaintext) is checked before FAISS parses it. Every build starts from bytes on disk: FAISS leaves
removed vectors in the memory of the index object they were removed from.

Only the ledger says where a candidate record is; `loaded.py` searches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sisa.core.digest import sha256_hex
from sisa.core.domain import Hit, IndexFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import By, Keyring, Vectors
from sisa.store.blobs import files
from sisa.store.blobs.keyring import PLAIN, shred
from sisa.store.loaded import LoadedIndex, Warm, search_loaded

INDEX_AREA = "index"
HEAD_BYTES = 37  # of each of the two indexes, one in the other; their number of vectors is at 8


def _has_form(data: bytes, num_records: int, dimension: int) -> bool:
    """Return whether a file is of the one form that `build` writes, with a vector or more a record.
    FAISS trusts what it parses, and whoever can write a digest can write any file under it."""
    import faiss

    empty = faiss.serialize_index(faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))).tobytes()
    num_vectors, rest = divmod(len(data) - len(empty), 4 * dimension + 8)
    if rest or num_vectors < num_records:
        return False
    count, floats = num_vectors.to_bytes(8, "little"), num_vectors * dimension
    heads = b"".join(
        empty[start : start + 8] + count + empty[start + 16 : start + HEAD_BYTES]
        for start in (0, HEAD_BYTES)
    )
    heads += floats.to_bytes(8, "little")
    ids_at = len(heads) + 4 * floats
    return data.startswith(heads) and data[ids_at : ids_at + 8] == count


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

        kept = [each for each, rows in vectors.items() if rows is None]
        held = self._held(base, kept)
        fresh = [(each, rows) for each, rows in vectors.items() if rows is not None]
        ids = np.concatenate([held.ids, *(np.full(len(rows), each) for each, rows in fresh)])
        order = np.argsort(ids, kind="stable")  # those of a record stay as they came
        matrix = np.concatenate([held.vectors, *(rows for _, rows in fresh)])[order]
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimension))
        if len(ids):
            index.add_with_ids(matrix, ids[order])
        data = faiss.serialize_index(index).tobytes()
        file = IndexFile(shard, root, len(vectors), sha256_hex(data), len(data))
        sealed = self.keyring.seal(INDEX_AREA, file.name, "", data)
        files.write_atomic(self.root / file.name, sealed)
        return file

    def _held(self, base: IndexFile | None, vector_ids: Sequence[int]) -> LoadedIndex:
        """All vectors of some ids. Raises IntegrityError where one is missing."""
        if not vector_ids:
            return LoadedIndex(0, np.zeros(0, np.int64), np.zeros((0, self.dimension), np.float32))
        if base is None:
            raise IntegrityError("vectors are expected of an index that does not exist")
        found = self._load(base)
        wanted = np.isin(found.ids, vector_ids)
        if len(np.unique(found.ids[wanted])) < len(set(vector_ids)):
            raise IntegrityError(
                "the index lacks a vector that the ledger counts on",
                where=str(self.root / base.name),
                next_step="run `sisa train` with the same run file to rebuild the index",
            )
        return LoadedIndex(base.shard, found.ids[wanted], found.vectors[wanted])

    def search(
        self, found: Sequence[IndexFile], queries: Vectors, top_k: int, by: By = "text"
    ) -> list[list[Hit]]:
        held = self._warm.files
        loaded = {
            file.name: held.get(file.name) or self._sides(file) for file in found if file.num_vectors
        }
        self._warm.files = loaded
        return search_loaded([each[by] for each in loaded.values()], queries, top_k)

    def _sides(self, file: IndexFile) -> dict[By, LoadedIndex]:
        found = self._load(file)
        return {"text": found.by("text"), "asked": found.by("asked")}

    def _load(self, file: IndexFile) -> LoadedIndex:
        import faiss

        index = self._read(file)
        ids = faiss.vector_to_array(index.id_map)
        return LoadedIndex(file.shard, ids, index.index.reconstruct_n(0, index.ntotal))

    def vectors(self, file: IndexFile, vector_ids: Sequence[int], by: By = "text") -> Vectors:
        found = self._held(file, vector_ids).by(by)
        places = {each: n for n, each in enumerate(vector_ids)}
        order = np.argsort([places[each] for each in found.ids.tolist()], kind="stable")
        return found.vectors[order]

    def check(self, file: IndexFile) -> None:
        self._bytes(file)

    def _bytes(self, file: IndexFile) -> bytes:
        unseal = partial(self.keyring.unseal, INDEX_AREA, file.name, "")
        return files.read_checked(self.root / file.name, file.sha256, "index file", unseal)

    def _read(self, file: IndexFile) -> Any:
        import faiss

        data = self._bytes(file)
        if not _has_form(data, file.num_vectors, self.dimension):
            raise IntegrityError(
                "an index file is not of the form that is written, under the recorded digest",
                where=str(self.root / file.name),
                next_step="restore the model directory from a backup",
            )
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))

    def held(self) -> frozenset[str]:
        return files.held_names(self.root)

    def erase(self, names: Collection[str]) -> None:
        gone = set(names)
        self._warm.files = {name: each for name, each in self._warm.files.items() if name not in gone}
        shred(self.keyring, INDEX_AREA, names, partial(files.erase_all, self.root))
