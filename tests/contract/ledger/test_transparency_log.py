"""Test the transparency log over a directory and over buckets of a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sisa.audit.findings import examine
from sisa.audit.garbage import list_garbage, remove_garbage
from sisa.audit.residue import scan_residue
from sisa.config.runfile import parse_run_file
from sisa.core.ports import BlobStore
from sisa.evidence.log.log import Log
from sisa.evidence.log.tiles import check_tiles
from sisa.flows.context.areas import purge
from sisa.flows.context.context import Context
from sisa.store.areas import LOG
from sisa.store.blobs import s3_client
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.blobs.s3_blobs import S3Blobs
from sisa.verifier import note
from tests.contract.storage.forms import BACKENDS, blobs_in
from tests.fakes.s3_server import fresh_blobs
from tests.models.confessing import RUN_FILE, context_of, record, train_in
from tests.models.written_log import TYPE, Keys, Place, entry, fill, statement


@pytest.fixture(params=BACKENDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return blobs_in(request.param, request, tmp_path / "blobs").below("log")


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
    if isinstance(blobs, S3Blobs):  # as tlog-tiles demands where a bucket serves it
        client = s3_client.boto(blobs.endpoint, blobs.region)
        kinds = {
            name: client.head_object(Bucket=blobs.bucket, Key=f"{blobs.prefix}/{name}")["ContentType"]
            for name in ("checkpoint", "tile/0/000", "tile/entries/001.p/2")
        }
        assert kinds.pop("checkpoint") == "text/plain; charset=utf-8"
        assert set(kinds.values()) == {"application/octet-stream"}


@pytest.fixture(params=["disk", "objects"])
def model(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Context, Path]]:
    """Yield a model, one of them with a storage in a bucket that keeps versions."""
    storage = None
    if request.param == "objects":
        found = fresh_blobs(server := request.getfixturevalue("s3"))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        storage = f"s3://{found.bucket}/{found.prefix}"
    config = parse_run_file(RUN_FILE, "run.yaml").model_copy(update={"storage": storage})
    train_in(tmp_path / "model", config, [record(number) for number in range(6)])
    with context_of(tmp_path / "model") as context:
        yield context, tmp_path / "model"


def test_a_log_is_no_garbage_and_no_residue(model: tuple[Context, Path], tmp_path: Path) -> None:
    context, directory = model
    keys, blobs = Keys(tmp_path / "keys"), context.stores.blobs[LOG]
    for number in range(3):
        Log(blobs, keys).append(statement(number), TYPE)
    assert list_garbage(context, directory) == ()
    assert purge(context, dry_run=True) == ()
    scan = scan_residue(context, directory, texts=["a text that is nowhere"])
    assert (scan.residue, scan.clean) == ((), True)
    found = scan_residue(context, directory, texts=[TYPE])  # the log is searched
    assert {each.kind for each in found.residue} == {"string"}
    assert examine(context, directory) == []
    if isinstance(blobs, LocalBlobs):
        (blobs.root / ".tmp-abc").write_bytes(b"left by a killed process")
        blobs.root.chmod(0o755)  # to be published
        (left,) = list_garbage(context, directory)
        assert (left.path, left.removable) == ("log/.tmp-abc", True)
        assert [each.kind for each in examine(context, directory)] == ["unknown"]
        remove_garbage(context, directory)
    assert Log(blobs, keys).check().size == 3
