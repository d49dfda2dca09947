"""Test the contract of CheckpointStore over the fake, directories and objects on an S3 server.

A checkpoint is whole or absent, never changes, and is refused if a single byte differs from the record:
a deletion is only proved if the served bytes are the proved ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.digest import canonical_json, sha256_hex
from sisa.core.domain import SliceJob
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.ports import BlobStore, CheckpointStore
from sisa.store.blobs.keyring import is_sealed
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.checkpoints import FileCheckpoints, parse_manifest
from tests.contract.storage.forms import FORMS, opened, stored_as
from tests.fakes.ports import FakeCheckpoints

FILES = {ADAPTER_FILE: b"adapter", "optimizer.safetensors": b"optimizer", "state.json": b"{}"}


def job(slice_: int = 0) -> SliceJob:
    return SliceJob(0, slice_, None, ((slice_, "root"),), 4, (2, 1), {"seed": 1}, "base", "f")


@pytest.fixture(params=["fake", *FORMS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    return (
        FakeCheckpoints() if request.param == "fake" else stored_as(FileCheckpoints, request, tmp_path)
    )


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> FileCheckpoints:
    return stored_as(FileCheckpoints, request, tmp_path)


@pytest.fixture(params=["disk", "sealed disk"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> FileCheckpoints:
    """Return a store on a disk, for behaviour that does not depend on where the bytes are."""
    return opened(FileCheckpoints, tmp_path, request.param)


def path_of(store: FileCheckpoints, name: str) -> Path:
    """Return the path of a file of a store on a disk."""
    return Path(store.blobs.location(name))


def plaintext(store: FileCheckpoints, name: str) -> bytes:
    key, _, part = name.partition("/")
    return store.keyring.unseal(store.area, key, part, store.blobs.get(name, "file"))


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    saved = store.save(job(), FILES)
    assert saved.key == job().key
    assert saved.adapter_sha256 == sha256_hex(FILES[ADAPTER_FILE])
    assert saved.num_bytes >= sum(map(len, FILES.values()))
    assert store.load(saved.key, saved.manifest_sha256) == FILES
    assert store.describe(saved.key) == saved
    assert store.held() == {saved.key}


def test_equal_files_have_equal_descriptions(store: CheckpointStore, tmp_path: Path) -> None:
    saved = store.save(job(), FILES)
    other = (
        FakeCheckpoints()
        if isinstance(store, FakeCheckpoints)
        else opened(FileCheckpoints, tmp_path / "b", "files")
    )
    assert other.save(job(), dict(reversed(FILES.items()))) == saved
    assert store.save(job(1), {**FILES, "state.json": b"[]"}).manifest_sha256 != saved.manifest_sha256


def test_a_second_save_of_a_key_keeps_the_first_bytes(store: CheckpointStore) -> None:
    saved = store.save(job(), FILES)
    assert store.save(job(), {**FILES, ADAPTER_FILE: b"other"}) == saved
    assert store.load(saved.key, saved.manifest_sha256) == FILES


def test_what_is_loaded_is_a_copy(store: CheckpointStore) -> None:
    saved = store.save(job(), FILES)
    store.load(saved.key, saved.manifest_sha256).clear()
    assert store.load(saved.key, saved.manifest_sha256) == FILES


def test_a_wrong_manifest_digest_is_refused(store: CheckpointStore) -> None:
    saved = store.save(job(), FILES)
    with pytest.raises(IntegrityError):
        store.load(saved.key, "0" * 64)


def test_an_absent_key_is_an_integrity_error(store: CheckpointStore) -> None:
    assert store.held() == frozenset()
    for read in (store.describe, lambda key: store.load(key, "0" * 64)):
        with pytest.raises(IntegrityError):
            read("f" * 64)


def test_erased_is_gone_and_absence_is_no_error(store: CheckpointStore) -> None:
    first, second = store.save(job(), FILES), store.save(job(1), FILES)
    store.erase([first.key, "never held"])
    assert store.held() == {second.key}
    with pytest.raises(IntegrityError):
        store.describe(first.key)
    store.erase([first.key])
    assert store.load(second.key, second.manifest_sha256) == FILES


def test_the_location_names_the_adapter(store: CheckpointStore) -> None:
    assert store.location(job().key).endswith(f"checkpoints/{job().key}/{ADAPTER_FILE}")


def test_the_location_is_where_the_bytes_are(folder: FileCheckpoints) -> None:
    saved = folder.save(job(), FILES)
    name = f"{saved.key}/{ADAPTER_FILE}"
    assert folder.location(saved.key) == folder.blobs.location(name)
    assert plaintext(folder, name) == FILES[ADAPTER_FILE]


def appended(place: BlobStore, name: str) -> None:
    place.put(name, place.get(name, "file") + b" ")


def flipped(place: BlobStore, name: str) -> None:
    data = place.get(name, "file")
    place.put(name, bytes([data[0] ^ 1]) + data[1:])


def erased(place: BlobStore, name: str) -> None:
    place.erase([name])


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
@pytest.mark.parametrize("tamper", [appended, flipped, erased])
def test_tampering_with_any_file_is_noticed(
    local: FileCheckpoints, name: str, tamper: Callable[[BlobStore, str], None]
) -> None:
    saved = local.save(job(), FILES)
    tamper(local.blobs, f"{saved.key}/{name}")
    with pytest.raises(IntegrityError):
        local.load(saved.key, saved.manifest_sha256)


@pytest.mark.parametrize("name", FILES)
def test_describe_reads_every_byte(folder: FileCheckpoints, name: str) -> None:
    saved = folder.save(job(), FILES)
    appended(folder.blobs, f"{saved.key}/{name}")
    with pytest.raises(IntegrityError):
        folder.describe(saved.key)


def test_a_foreign_file_is_refused(folder: FileCheckpoints) -> None:
    saved = folder.save(job(), FILES)
    folder.blobs.put(f"{saved.key}/notes.txt", b"a leak")
    with pytest.raises(IntegrityError, match="does not name"):
        folder.load(saved.key, saved.manifest_sha256)
    with pytest.raises(IntegrityError, match="does not name"):
        folder.describe(saved.key)


@pytest.mark.parametrize(
    "name", ["../outside", "a/b", "/etc/hostname", "..", ".", MANIFEST_FILE, "../../outside"]
)
def test_a_manifest_can_name_no_file_outside(local: FileCheckpoints, tmp_path: Path, name: str) -> None:
    """Even a manifest whose digests are all correct is refused if a name leaves the directory."""
    saved = local.save(job(), FILES)
    (tmp_path / "outside").write_bytes(b"secret")
    local.blobs.put("outside", b"secret")
    parsed = json.loads(plaintext(local, f"{saved.key}/{MANIFEST_FILE}"))
    parsed["files"][name] = sha256_hex(b"secret")
    local.blobs.put(f"{saved.key}/{MANIFEST_FILE}", canonical_json(parsed))
    with pytest.raises(IntegrityError, match="can't be parsed"):
        local.describe(saved.key)
    with pytest.raises(IntegrityError, match="can't be parsed"):
        local.load(saved.key, sha256_hex(canonical_json(parsed)))


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"[]", b"{", b"null", b'{"files":{}}', b'{"files":[],"job":{}}', b"\xff", b'"x"'),
        b"[" * 99_999,
    ],
)
def test_a_manifest_of_another_form_is_refused(local: FileCheckpoints, manifest: bytes) -> None:
    saved = local.save(job(), FILES)
    local.blobs.put(f"{saved.key}/{MANIFEST_FILE}", manifest)
    with pytest.raises(IntegrityError):
        local.describe(saved.key)
    with pytest.raises(IntegrityError):
        local.load(saved.key, sha256_hex(manifest))


def test_a_job_that_no_trainer_had_is_refused(local: FileCheckpoints) -> None:
    saved = local.save(job(), FILES)
    written = plaintext(local, f"{saved.key}/{MANIFEST_FILE}")
    parsed = json.loads(written)
    parsed["job"]["passes"] = [1, 0]
    assert parse_manifest(written) == (job(), {name: sha256_hex(data) for name, data in FILES.items()})
    assert parse_manifest(canonical_json(parsed)) is None


def test_a_checkpoint_under_another_key_is_refused(folder: FileCheckpoints) -> None:
    """A whole and valid checkpoint must not be taken for another job's."""
    saved = folder.save(job(), FILES)
    for name in folder.blobs.parts(saved.key):
        folder.blobs.put(f"{job(1).key}/{name}", folder.blobs.get(f"{saved.key}/{name}", "file"))
    with pytest.raises(IntegrityError):
        folder.describe(job(1).key)
    with pytest.raises(IntegrityError):
        folder.load(job(1).key, saved.manifest_sha256)


def test_every_file_of_a_sealed_checkpoint_is_sealed_under_one_key(tmp_path: Path) -> None:
    store = opened(FileCheckpoints, tmp_path, "sealed")
    saved = store.save(job(), FILES)
    found = {path.name: path.read_bytes() for path in path_of(store, saved.key).iterdir()}
    assert found.keys() == {*FILES, MANIFEST_FILE}
    assert all(map(is_sealed, found.values()))
    assert store.keyring.held("checkpoints") == {saved.key}


def test_a_sealed_checkpoint_without_its_key_is_refused(tmp_path: Path) -> None:
    store = opened(FileCheckpoints, tmp_path, "sealed")
    saved = store.save(job(), FILES)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "backup")
    store.erase([saved.key])
    shutil.copytree(tmp_path / "backup", tmp_path / "checkpoints", dirs_exist_ok=True)
    for read in (store.describe, lambda key: store.load(key, saved.manifest_sha256)):
        with pytest.raises(IntegrityError, match="key is missing from the keyring"):
            read(saved.key)


@pytest.mark.parametrize("form", ["files", "sealed"])
def test_a_cut_short_save_leaves_nothing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(FileCheckpoints, tmp_path, form)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(EnvironmentFault, match="No space left"):
        store.save(job(), FILES)
    assert store.held() == frozenset()


def half_written(store: FileCheckpoints) -> str:
    """Leave what a killed worker leaves: an unnamed directory, or objects without the manifest."""
    if isinstance(store.blobs, LocalBlobs):
        store.blobs.put(f".tmp-killed/{ADAPTER_FILE}", b"half")
        return ".tmp-killed"
    store.blobs.put(f"{job(1).key}/{ADAPTER_FILE}", b"half")
    return f".tmp-{job(1).key}"


def test_a_half_written_directory_is_never_a_checkpoint(folder: FileCheckpoints) -> None:
    """It is listed, so that it can be erased, and can't be read."""
    saved = folder.save(job(), FILES)
    left = half_written(folder)
    assert folder.held() == {saved.key, left}
    for name in (left, job(1).key):
        with pytest.raises(IntegrityError):
            folder.describe(name)
    folder.erase([left])
    assert folder.held() == {saved.key}
    assert folder.blobs.parts(job(1).key) == frozenset()


def test_a_save_goes_on_where_another_was_cut_short(folder: FileCheckpoints) -> None:
    half_written(folder)
    saved = folder.save(job(1), FILES)
    assert folder.load(saved.key, saved.manifest_sha256) == FILES
