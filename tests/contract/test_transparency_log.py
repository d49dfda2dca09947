"""Test the transparency log over a directory and over buckets of a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from sisa.core.ports import BlobStore
from sisa.evidence.log import Log, check_tiles
from sisa.store.blobs.files import LocalBlobs
from sisa.verifier import note
from tests.fakes.s3_server import fresh_blobs
from tests.models.written_log import TYPE, Keys, Place, entry, fill, statement


@pytest.fixture(params=["disk", "objects", "plain objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "disk":
        return LocalBlobs(tmp_path / "blobs").below("log")
    server = request.getfixturevalue("s3")
    return fresh_blobs(server, versions=request.param == "objects").below("log")


def test_a_log_grows_over_the_edge_of_a_tile(blobs: BlobStore, tmp_path: Path) -> None:
    place = Place(tmp_path / "local")
    fill(place, 254)
    for path in place.at.rglob("*"):
        if path.is_file():
            blobs.put(path.relative_to(place.at).as_posix(), path.read_bytes())
    keys = Keys(place.keys.directory)
    for number in range(254, 258):
        assert Log(blobs, keys).append(statement(number), TYPE) == number

    def read(path: str) -> bytes:
        return blobs.get(path, "file")

    found = note.open_checkpoint(read("checkpoint"), place.vkey)
    entries = note.read_log(read, found)
    assert entries == [entry(number) for number in range(258)]
    check_tiles(read, entries)
    log = Log(blobs, keys)
    assert [each.index for each in log.entries(255)] == [255, 256, 257]
    assert log.statement(next(log.entries(257)).sha256) == statement(257)
    for kind in ("0", "entries"):
        assert not blobs.below(f"tile/{kind}").parts("000.p")  # the partial ones are gone
        assert blobs.below(f"tile/{kind}").parts("001.p") == {"1", "2"}
    note.verify_proof(log.proof(256), entry(256), place.vkey)
