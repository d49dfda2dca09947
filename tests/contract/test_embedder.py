"""Test the contract of Embedder over the fake, a transformer, and hashing with and without names.

A row depends on its own text only, to the bit: otherwise a deleted record would survive in the vectors
of texts that were embedded with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.ports import Embedder, Vectors
from sisa.lm.routing.embedder import HashingEmbedder, resolve_embedder
from sisa.lm.routing.names import NameEmbedder
from tests.fakes.ports import DIMENSION, fake_embed
from tests.models.tiny_base import make_tiny_embedder

Embed = Callable[[Sequence[str]], Vectors]
texts = st.lists(st.text(max_size=40), max_size=6)
REAL = ("hashing", "names", pytest.param("transformer", marks=pytest.mark.torch))


def made(name: str, folder: Path) -> Embedder:
    if name == "transformer":
        return resolve_embedder(str(make_tiny_embedder(folder)))
    return NameEmbedder(HashingEmbedder()) if name == "names" else HashingEmbedder()


@pytest.fixture(scope="module", params=["fake", *REAL])
def embed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embed:
    if request.param == "fake":
        return fake_embed
    return made(request.param, tmp_path_factory.mktemp("embedder")).embed


@given(mates=texts, text=st.text(max_size=40), place=st.integers(0, 6))
def test_a_row_does_not_know_its_batch_mates(
    embed: Embed, mates: list[str], text: str, place: int
) -> None:
    place = min(place, len(mates))
    together = embed([*mates[:place], text, *mates[place:]])
    assert together[place].tobytes() == embed([text])[0].tobytes()


@given(texts)
def test_no_row_is_longer_than_one(embed: Embed, some: list[str]) -> None:
    vectors = embed(some)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(some), embed(["x"]).shape[1])
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.logical_or(np.isclose(lengths, 1), np.isclose(lengths, 0.5**0.5)).all()


def test_no_texts_no_rows(embed: Embed) -> None:
    assert len(embed([])) == 0


def test_different_texts_have_different_rows(embed: Embed) -> None:
    vectors = embed([f"question number {number}" for number in range(50)])
    assert len({row.tobytes() for row in vectors}) == 50


@pytest.mark.parametrize("name", REAL)
def test_digest_and_dimension_are_stable(tmp_path: Path, name: str) -> None:
    one, other = made(name, tmp_path), made(name, tmp_path)
    assert one.digest == other.digest
    assert len(one.digest) == 64
    assert one.embed(["a"]).shape == (1, one.dimension)
    assert fake_embed(["a"]).shape == (1, DIMENSION)
