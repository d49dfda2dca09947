"""A model with slices and checkpoints in shared storage: an S3 server in its own process, or a path.

It has the bytes of a model on the local disk, and after a deletion no version of what was erased.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sisa
from sisa.audit.residue import sweep_model
from sisa.core.errors import ConfigConflict, EnvironmentFault, InvalidInput
from tests.fakes.s3_server import Server
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    change_run,
    command,
    held_files,
    ids_of,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

GONE = of_people("p004")
ROOMS = ("records", "checkpoints")


@pytest.fixture(scope="module")
def remaining(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Return a model on this machine's disk that never held the records that the others delete."""
    folder = tmp_path_factory.mktemp("remaining")
    return train_scratch(folder, tiny_base, without(PEOPLE, ids_of(GONE))).directory


def stored(server: Server, bucket: str, model: sisa.Model) -> dict[str, str]:
    """Return the sha256 of every object of a model, by storage area and name."""
    prefix = f"team/{model.id}/"
    return {
        key.removeprefix(prefix): hashlib.sha256(data).hexdigest()
        for key, data in server.objects(bucket).items()
        if key.startswith(prefix)
    }


def on_disk(directory: Path) -> dict[str, str]:
    return {name: each for name, each in held_files(directory).items() if name.split("/")[0] in ROOMS}


def in_bucket(
    server: Server,
    tmp_path: Path,
    base: Path,
    *,
    executor: str = "serial",
    **settings: Any,
) -> Tiny:
    """Return a trained model whose storage is a bucket of its own."""
    bucket = server.bucket(f"b-{tmp_path.name.replace('_', '-')[:40].lower()}", versions=True)
    run = write_run(tmp_path / "stored", base, storage=f"s3://{bucket}/team", **settings)
    model = Tiny(run.parent, base)
    model.train(executor)
    return model


def bucket_of(model: Tiny) -> str:
    uri: str = yaml.safe_load(model.run_file.read_text())["storage"]
    return uri.removeprefix("s3://").partition("/")[0]


def test_a_versioned_bucket_keeps_nothing_of_what_was_deleted(
    s3: Server,
    tmp_path: Path,
    tiny_base: Path,
    remaining: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train, forget, prove: the bytes of a local model, and no older version of any object."""
    tiny = in_bucket(s3, tmp_path, tiny_base)
    bucket = bucket_of(tiny)
    before = set(s3.versions(bucket))
    assert not (tiny.directory / "records").exists()
    assert not (tiny.directory / "checkpoints").exists()
    done = command(capsys, "forget", "-m", tiny.directory, "--executor", "serial", "--subject", "p004")
    assert (done.code, done.json["old_versions_kept"]) == (0, [])
    model = tiny.open()
    assert stored(s3, bucket, model) == on_disk(remaining)
    left = s3.versions(bucket)
    assert len(left) == len(s3.objects(bucket))
    assert None not in left.values()
    assert before - set(left)
    proof = model.verify("sample", 1)
    assert proof.ok
    assert [each.equal for each in proof.shards] == [None, True, None]
    assert len(s3.versions(bucket)) == len(left)  # the replay is gone as well
    assert sweep_model(model, ids=ids_of(GONE)).clean
    found = command(capsys, "doctor", "-m", tiny.directory)
    assert {each["kind"] for each in found.json["findings"]} <= {"mode"}  # of the tests' shared key
    uri = f"s3://{bucket}/team/{model.id}/checkpoints/"
    assert all(str(each.adapter_path).startswith(uri) for each in model.status().shards)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures(
    "own_ray"
)  # workers of a Ray from before would not know the bucket's credentials
def test_a_ray_worker_reads_and_writes_the_bucket(
    s3: Server, tmp_path: Path, tiny_base: Path, tiny: Tiny
) -> None:
    """The same objects as the files of a model that was trained in this process."""
    stored_tiny = in_bucket(s3, tmp_path, tiny_base, executor="ray", cluster={"num_workers": 1})
    model = stored_tiny.open()
    assert stored(s3, bucket_of(stored_tiny), model) == on_disk(tiny.directory)
    assert len(s3.versions(bucket_of(stored_tiny))) == len(s3.objects(bucket_of(stored_tiny)))


@pytest.mark.usefixtures("s3")
def test_a_storage_that_cant_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "stored", tiny_base, storage="s3://no-such-bucket/team")
    with pytest.raises(EnvironmentFault) as caught:
        sisa.train_model(run, executor="serial", allow_deleted=True)
    assert caught.value.got == "NoSuchBucket"
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(EnvironmentFault, match="boto3 is not installed"):
        sisa.train_model(run, executor="serial", allow_deleted=True)
    assert not (tmp_path / "stored" / "model").exists()


def test_what_a_storage_can_not_be_is_refused_at_once(tiny: Tiny) -> None:
    wrong = [
        "gs://bucket/a",
        "s3://key:secret@bucket/a",
        "s3://bucket/a?endpoint=b",
        "s3://b",
        "model/x",
    ]
    for each in wrong:
        change_run(tiny.run_file, storage=each)
        with pytest.raises(InvalidInput) as caught:
            tiny.train()
        (problem,) = caught.value.problems
        assert problem.where.endswith(": storage")
        assert "secret" not in str(caught.value)
    change_run(tiny.run_file, storage=str(tiny.folder / "shared"))
    with pytest.raises(ConfigConflict, match="storage can't change"):
        tiny.train(accept_differences=True)
    with pytest.raises(ConfigConflict, match="storage can't change"):
        tiny.train()
    assert not (tiny.folder / "shared").exists()
