"""Deleting, `gc`, `sweep` and `doctor` where slices and checkpoints are in a bucket or on a shared path.

The trainer is a fake; stores, ledger, index and the S3 server are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sisa.audit.doctor import diagnose
from sisa.audit.garbage import SURPLUS, TEMPORARY, UNKNOWN_FILE, list_garbage, remove_garbage
from sisa.audit.residue import Scan, scan_residue
from sisa.config.runfile import parse_run_file
from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.ports import BlobStore
from sisa.core.requests import Request
from sisa.flows.context.areas import purge
from sisa.store.areas import CHECKPOINTS, RECORDS, REPLAYS
from sisa.store.blobs.keyring import is_sealed
from tests.examples import num_examples
from tests.fakes.s3_server import Server, fresh_blobs
from tests.models import confessing
from tests.models.confessing import DELETED, NUM_RECORDS, RUN_FILE, context_of, delete, record, stored

GONE = record(DELETED)
pytestmark = pytest.mark.usefixtures("own_places")


def build(directory: Path, storage: str, slices: int = 2, **settings: Any) -> Path:
    config = parse_run_file(RUN_FILE, "run.yaml")
    block = config.sisa.model_copy(update={"slices": slices})
    config = config.model_copy(update={"storage": storage, "sisa": block, **settings})
    confessing.train_in(directory, config, [record(number) for number in range(NUM_RECORDS)])
    assert not (directory / RECORDS).exists()
    assert not (directory / CHECKPOINTS).exists()
    return directory


@pytest.fixture(params=["objects", "shared path"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a model with a storage apart from its directory."""
    storage = str(tmp_path / "shared")
    if request.param == "objects":
        storage = fresh_blobs(request.getfixturevalue("s3")).location().rstrip("/")
    return build(tmp_path / "model", storage)


@pytest.fixture
def in_bucket(s3: Server, tmp_path: Path) -> Path:
    return build(tmp_path / "model", fresh_blobs(s3).location().rstrip("/"))


def places_of(model: Path) -> dict[str, BlobStore]:
    with context_of(model) as context:
        return dict(context.stores.blobs)


def versions(server: Server, model: Path) -> list[bytes | None]:
    """Return everything that the bucket has of a model, old versions and delete markers included."""
    (bucket, _, prefix) = places_of(model)[RECORDS].location().removeprefix("s3://").partition("/")
    start = prefix.removesuffix(RECORDS)
    found = server.versions(bucket).items()
    return [data for (key, _), data in found if key.startswith(start)]


def scan(model: Path) -> Scan:
    with context_of(model) as context:
        return scan_residue(context, model, ids=[GONE.id], texts=[GONE.text])


def found(model: Path) -> list[tuple[str, str]]:
    return sorted((each.kind, each.where) for each in scan(model).residue)


def kinds(model: Path) -> list[str]:
    return sorted({each.kind for each in diagnose(model).findings})


def request(model: Path) -> tuple[Request, list[str]]:
    with context_of(model) as context:
        (only,) = context.stores.ledger.requests()
        return only, [each.note for each in context.stores.ledger.events() if each.note]


def test_a_deletion_leaves_no_residue(model: Path) -> None:
    before = scan(model)
    assert {each.kind for each in before.residue} == {"string"}
    delete(model)
    after = scan(model)
    assert after.residue == ()
    with context_of(model) as context:
        held = context.stores.ledger.checkpoints()
        assert after.scanned["checkpoints"] == len(held)
        assert {each.key for each in held} == context.stores.checkpoints.held()
    assert after.scanned["rows"] == NUM_RECORDS - 1
    assert kinds(model) == []
    storage = places_of(model)[RECORDS].location().rpartition("/")[0]
    assert any(place.startswith(storage) for place in after.places)


def test_what_came_back_is_residue_and_garbage(model: Path) -> None:
    """A smuggled slice, a surplus part, half a checkpoint, a killed replay: reported, then removed."""
    delete(model)
    places = places_of(model)
    with context_of(model) as context:
        smuggled = context.stores.records.write(
            0, 0, "0" * 64, [stored(context, 1), stored(context, DELETED)]
        ).name
        held = min(context.stores.checkpoints.held())
    checkpoints, replay = places[CHECKPOINTS], places[REPLAYS].below("replay")
    checkpoints.put(f"{held}/notes", GONE.text.encode())
    half = "f" * 64 if checkpoints.location().startswith("s3://") else ".tmp-killed"
    checkpoints.put(f"{half}/{ADAPTER_FILE}", b"half")
    replay.put(f"{held}/{ADAPTER_FILE}", b"replayed")
    reported = {kind for kind, _ in found(model)}
    assert {"deleted_row", "string", "unknown_file"} <= reported
    assert GONE.text not in str(scan(model))
    assert "unknown" in kinds(model)
    with context_of(model) as context:
        reasons = {each.reason for each in list_garbage(context, model)}
        assert reasons >= {UNKNOWN_FILE, SURPLUS, TEMPORARY}
        removed = remove_garbage(context, model)
        assert {each.path for each in removed} >= {places[RECORDS].location(smuggled)}
        assert list_garbage(context, model) == ()
        assert purge(context) == ()
    assert found(model) == []
    assert kinds(model) == []


@pytest.mark.parametrize("seed", range(num_examples(2)))  # other keys, in another order
def test_groups_in_a_bucket_are_judged_as_on_a_disk(s3: Server, tmp_path: Path, seed: int) -> None:
    """One that a deleted record touched, one with another's content, one with a spoilt file, one without
    a readable manifest."""
    model = build(tmp_path / "model", fresh_blobs(s3).location().rstrip("/"), 3, seed=seed)
    place = places_of(model)[CHECKPOINTS]

    def parts_of(key: str) -> dict[str, bytes]:
        return {part: place.get(f"{key}/{part}", "part") for part in place.parts(key)}

    before = {key: parts_of(key) for key in place.held()}
    delete(model)
    with context_of(model) as context:
        held = sorted(context.stores.ledger.checkpoints(), key=lambda each: (each.shard, each.prefix))
    one, swapped, spoilt, unread = [each.key for each in held[:4]]
    gone = min(set(before) - place.held())
    place.put_group(gone, before[gone])
    for part, data in parts_of(one).items():
        place.put(f"{swapped}/{part}", data)
    place.put(f"{spoilt}/{ADAPTER_FILE}", b"spoilt")
    place.put(f"{unread}/{MANIFEST_FILE}", b"{}")
    residue = [each for each in found(model) if each[0] not in ("string", "old_versions")]
    residue_by_key = {key: [kind for kind, where in residue if key in where] for key in place.held()}
    assert residue_by_key.pop(gone) == ["tainted", "unknown_file"]
    assert residue_by_key.pop(swapped) == residue_by_key.pop(spoilt) == ["damaged"]
    assert residue_by_key.pop(unread) == ["unreadable"]
    assert set(map(tuple, residue_by_key.values())) == {()}


def test_damage_is_reported_and_is_not_taken_for_a_network_fault(
    in_bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = places_of(in_bucket)
    with context_of(in_bucket) as context:
        key = min(context.stores.checkpoints.held())
        slice_ = min(context.stores.records.held())
    data = places[CHECKPOINTS].get(f"{key}/{ADAPTER_FILE}", "adapter")
    places[CHECKPOINTS].put(f"{key}/{ADAPTER_FILE}", data[:-1])
    assert kinds(in_bucket) == ["checkpoint", "old_versions"]
    places[RECORDS].erase([slice_])
    (lost,) = [each for each in diagnose(in_bucket).findings if each.lost]
    assert (lost.kind, lost.where) == ("slice", f"records/{slice_}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (only,) = diagnose(in_bucket).findings
    assert (only.kind, only.severity, only.repair) == ("storage", "error", "")


def test_denied_purges_are_reported_until_they_are_made_up_for(
    s3: Server, in_bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion is carried out; that the bucket may keep old versions is in its history for good."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")  # a client of its own
    with s3.enforced("deleter", ["s3:ListBucketVersions"]) as credentials, monkeypatch.context() as own:
        for name, value in credentials.items():
            own.setenv(name, value)
        delete(in_bucket)
        reported = {each.kind for each in scan(in_bucket).residue}
        assert reported == {"old_versions"}
        assert kinds(in_bucket) == ["old_versions"]
    done, notes = request(in_bucket)
    assert done.state == "completed"
    assert any("old versions of erased objects are kept" in each for each in notes)
    assert None in versions(s3, in_bucket)  # a delete marker over what it kept
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with context_of(in_bucket) as context:
        assert purge(context) == ()
    left = versions(s3, in_bucket)
    assert None not in left
    assert found(in_bucket) == []


def test_what_a_bucket_keeps_of_an_encrypted_model_is_unreadable(s3: Server, tmp_path: Path) -> None:
    model = build(tmp_path / "model", fresh_blobs(s3).location().rstrip("/"), encrypt=True)
    everything = [each for each in versions(s3, model) if each is not None]
    assert everything
    assert all(map(is_sealed, everything))
    with context_of(model) as context:
        place = context.stores.blobs[RECORDS]
        before = {name: place.get(name, "slice") for name in place.held()}
    delete(model)
    assert found(model) == []
    assert kinds(model) == []
    with context_of(model) as context:
        for name in before.keys() - context.stores.records.held():
            context.stores.blobs[RECORDS].put(name, before[name])  # out of a backup of the bucket
        scanned = scan_residue(context, model, ids=[GONE.id], texts=[GONE.text])
    assert {each.kind for each in scanned.residue} == {"unknown_file"}
    assert scanned.scanned["shredded"] == len(scanned.residue) == 1
