"""Blob stores of every backend, stores of files in them, plain or sealed, and records to put there."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import strategies as st

from sisa.core.domain import Part, Record
from sisa.core.ports import BlobStore
from sisa.store.blobs.keyring import FileKeyring
from sisa.store.blobs.local_blobs import LocalBlobs
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


BACKENDS = ("disk", "objects")  # of blobs: name a new one here, and open it in `blobs_in`
FORMS = tuple(f"{seal}{each}" for each in BACKENDS for seal in ("", "sealed "))  # of stores of files


def blobs_in(backend: str, request: pytest.FixtureRequest, folder: Path) -> BlobStore:
    """Return an empty blob store in a directory or in a bucket of a real S3 server."""
    if backend == "disk":
        return LocalBlobs(folder)
    return fresh_blobs(request.getfixturevalue("s3"), versions=backend != "plain objects")


def stored_as(kind: type[T], request: pytest.FixtureRequest, folder: Path) -> T:
    """Return a store of the form that the fixture's parameter names."""
    form = str(request.param)
    return opened(kind, folder, form, blobs_in(form.removeprefix("sealed "), request, folder))


def opened(kind: type[T], folder: Path, form: str = "", place: BlobStore | None = None) -> T:
    """Return a store in a directory, or in another blob store."""
    keyring = FileKeyring(folder / "keyring", seals=form.startswith("sealed"))
    return kind((place or LocalBlobs(folder)).below(kind.area), keyring)
