"""Milliseconds and recall of an index lookup, against a flat search of the same vectors.

    python -m tests.bench.answering.lookup \\
        --out tests/bench/answering/lookup.json --sizes 10000,100000,1000000

Vectors have 384 dimensions and are distributed like those of texts: around topics, with few strong
directions. With the MiniLM embedder and TOFU's questions (`--texts FILE`), those are measured, too.
Queries are stored vectors with a small change. Search runs on one thread with loaded files; reading and
checking the files is reported separately (`load_s`). The last measure removes a vector and compares the
file with one that never had it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sisa.config.config import MINILM
from sisa.core.domain import Hit, IndexFile
from sisa.core.ports import Vectors
from sisa.store.index import FaissIndex
from tests.bench.command import arguments, read_rows, write
from tests.fakes.keyring import PLAIN

DIMENSION, NUM_TOPICS, NUM_QUERIES, TOP_K, NUM_SHARDS = 384, 2000, 50, 10, 8


def text_like(num_vectors: int, seed: int) -> Vectors:
    """Return unit vectors around topics, [num_vectors, DIMENSION]."""
    draw = np.random.default_rng(seed)
    strength = np.arange(1, DIMENSION + 1, dtype=np.float32) ** -0.5
    turn = np.linalg.qr(draw.standard_normal((DIMENSION, DIMENSION)))[0].astype(np.float32)
    topics = draw.standard_normal((NUM_TOPICS, DIMENSION)).astype(np.float32)
    own = draw.standard_normal((num_vectors, DIMENSION), dtype=np.float32)
    return unit(((topics[draw.integers(0, NUM_TOPICS, num_vectors)] + 0.8 * own) * strength) @ turn)


def unit(vectors: Vectors) -> Vectors:
    found: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def measured(vectors: Vectors, queries: Vectors, folder: Path) -> dict[str, Any]:
    """Return times and recall of one set of vectors, split over shards."""
    index = FaissIndex(folder, DIMENSION, PLAIN)
    files = [
        index.build(
            shard, "", None, {n: vectors[n : n + 1] for n in range(shard, len(vectors), NUM_SHARDS)}
        )
        for shard in range(NUM_SHARDS)
    ]
    began = time.perf_counter()
    index.search(files, queries[:1], TOP_K)
    load_s = time.perf_counter() - began
    found, ours = _timed(lambda query: index.search(files, query, TOP_K)[0], queries)
    exact, flat = _timed(_flat(vectors), queries)
    shared = [len(set(a) & set(b)) / TOP_K for a, b in zip(found, exact, strict=True)]
    return {
        "num_vectors": len(vectors),
        "shards": NUM_SHARDS,
        "lookup_ms_p50": median(ours) * 1000,
        "lookup_ms_p95": float(np.quantile(ours, 0.95)) * 1000,
        "flat_ms_p50": median(flat) * 1000,
        "flat_over_lookup": median(flat) / median(ours),
        "recall_at_10": float(np.mean(shared)),
        "load_s": load_s,
        "removal_as_if_never_held": _removes_as_if_never_held(index, files[0], folder / "again"),
    }


def _flat(vectors: Vectors) -> Callable[[Vectors], list[Hit]]:
    import faiss

    index = faiss.IndexFlatIP(DIMENSION)
    index.add(vectors)

    def search(query: Vectors) -> list[Hit]:
        scores, ids = index.search(query, TOP_K)
        return [Hit(int(n), float(s), 0) for n, s in zip(ids[0], scores[0], strict=True)]

    return search


def _timed(search: Callable[[Vectors], list[Hit]], queries: Vectors) -> tuple[list[Any], list[float]]:
    found, times = [], []
    for row in range(len(queries)):
        began = time.perf_counter()
        hits = search(queries[row : row + 1])
        times.append(time.perf_counter() - began)
        found.append([hit.vector_id for hit in hits])
    return found, times


def _removes_as_if_never_held(index: FaissIndex, file: IndexFile, folder: Path) -> bool:
    ids = list(range(0, file.num_vectors * NUM_SHARDS, NUM_SHARDS))
    kept = ids[:1] + ids[2:]
    after = index.build(0, "", file, dict.fromkeys(kept))
    rows = index.vectors(file, kept)
    scratch = FaissIndex(folder, DIMENSION, PLAIN).build(
        0, "", None, dict(zip(kept, rows[:, None], strict=True))
    )
    return (
        after == scratch
        and (index.root / after.name).read_bytes() == (folder / scratch.name).read_bytes()
    )


def of_texts(file: Path) -> tuple[Vectors, Vectors]:
    """Return embedded records of a JSONL file with `question` and `answer`, and its questions alone."""
    from sisa.lm.routing.embedder import resolve_embedder

    rows = read_rows(file)
    embedder = resolve_embedder(MINILM)
    vectors = embedder.embed([f"{row['question']}\n{row['answer']}" for row in rows])
    return vectors, embedder.embed([row["question"] for row in rows[:: len(rows) // NUM_QUERIES]])


def main() -> None:
    import faiss

    given = arguments(__doc__, sizes="10000,100000", texts=Path)
    faiss.omp_set_num_threads(1)
    found: dict[str, Any] = {"faiss": version("faiss-cpu"), "top_k": TOP_K, "sizes": []}
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, given.sizes.split(",")):
            vectors = text_like(size, seed=0)
            moved = unit(vectors[:: size // NUM_QUERIES][:NUM_QUERIES] + 0.03 * text_like(50, seed=1))
            found["sizes"].append(measured(vectors, moved, Path(folder) / str(size)))
            print(json.dumps(found["sizes"][-1]), flush=True)
        if given.texts is not None:
            found["texts"] = measured(*of_texts(given.texts), Path(folder) / "texts")
            print(json.dumps(found["texts"]), flush=True)
    write(given.out, found)


if __name__ == "__main__":
    main()
