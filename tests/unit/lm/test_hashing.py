"""The hashing embedder: unit vectors, near for near texts. `contract/` has what all embedders keep."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sisa.lm.routing.embedder import HashingEmbedder

EMBEDDER = HashingEmbedder()


@given(st.lists(st.text(max_size=60), max_size=6))
def test_rows_are_unit_vectors(texts: list[str]) -> None:
    vectors = EMBEDDER.embed(texts)
    assert vectors.shape == (len(texts), EMBEDDER.dimension)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_empty_texts_share_one_fixed_vector() -> None:
    empty, blank = EMBEDDER.embed(["", " ?! "])
    assert empty.tobytes() == blank.tobytes()
    assert empty[0] == 1.0


def test_near_texts_are_near() -> None:
    asked, held, other = EMBEDDER.embed(
        [
            "Where was Mara Oldenkamp born?",
            "Question: Where was Mara Oldenkamp born?\nAnswer: In Tessaly.",
            "Question: What does Ivo Brandwick collect?\nAnswer: Old coins.",
        ]
    )
    assert float(asked @ held) > 0.6 > 0.3 > float(asked @ other)


def test_bytes_are_pinned() -> None:
    digest = "7346070511a3"
    vector = EMBEDDER.embed(["Where was Mara Oldenkamp born?"])
    assert hashlib.sha256(vector.tobytes()).hexdigest().startswith(digest)
