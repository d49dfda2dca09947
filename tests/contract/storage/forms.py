"""Stores, plain or sealed, on a disk or on a real S3 server, and records to put into them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import strategies as st

from sisa.core.domain import Part, Record
from sisa.core.ports import BlobStore
from sisa.store.blobs.keyring import FileKeyring
from sisa.store.blobs.sealed_area import SealedArea
from tests.fakes.s3_server import fresh_blobs

T = TypeVar("T", bound=SealedArea)
SECRET_TEXT = "the only copy of this text"
texts = st.text(st.characters(codec="utf-8"), max_size=30)
parts = st.builds(Part, st.sampled_from(["text", "prompt", "completion", "user"]), texts)
records = st.builds(
    Record,
    st.uuids().map(str),
    st.none() | texts,
    st.sampled_from(["text", "completion", "chat"]),
    st.lists(parts, max_size=3).map(tuple),
    st.none() | st.floats(0, 1e3) | st.sampled_from(["trial", "0.5"]),
    st.none() | st.integers(1, 9),
)


def stored_as(kind: type[T], request: pytest.FixtureRequest, folder: Path) -> T:
    """Return a store of the form that the fixture's parameter names."""
    on_server = request.param.endswith("objects")
    place = fresh_blobs(request.getfixturevalue("s3"), kind.area) if on_server else None
    return opened(kind, folder, request.param, place)


def opened(kind: type[T], folder: Path, form: str, place: BlobStore | None = None) -> T:
    keyring = FileKeyring(folder / "keyring", seals=form.startswith("sealed"))
    return kind(place or folder / kind.area, keyring)
