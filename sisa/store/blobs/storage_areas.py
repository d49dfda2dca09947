"""Storage areas of a model: beside its ledger, or in the storage that its run file names.

    DIR/AREA                  without `storage:`; index, vault and unfinished runs always
    STORAGE/MODEL/AREA        records, hidden states, checkpoints, patches, replays, by model

A storage is an absolute path or `s3://BUCKET[/PREFIX]`; the endpoint of a server other than Amazon's
comes from the environment. Models share a storage, since each has a name of its own there.

>>> open_areas(Path("m"), "s3://b/p", "0f")["records"].location()
's3://b/p/0f/records'
>>> alone, shared = open_areas(Path("/m"), None, "0f"), open_areas(Path("/m"), "/s", "0f")
>>> alone["records"].location(), shared["index"].location()
('/m/records', '/m/index')
"""

from __future__ import annotations

from pathlib import Path

from sisa.core.ports import BlobStore
from sisa.store.blobs import object_client
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.blobs.object_blobs import ObjectBlobs

SCHEME = "s3://"
LOCAL_AREAS = ("index", "vault", "runs", "metrics")  # stay with the driver
SHARED_AREAS = ("records", "prefixes", "checkpoints", "patches", "scratch")  # used by workers, too


def open_areas(directory: Path, storage: str | None, model: str) -> dict[str, BlobStore]:
    """Return the blob store of every storage area of a model."""
    found: dict[str, BlobStore] = {each: LocalBlobs(directory / each) for each in LOCAL_AREAS}
    for each in SHARED_AREAS:
        found[each] = area_of(storage, model, each) if storage else LocalBlobs(directory / each)
    return found


def area_of(storage: str, model: str, area: str) -> BlobStore:
    """Return a storage area of a model in a storage."""
    if not storage.startswith(SCHEME):
        return LocalBlobs(Path(storage) / model / area)
    return storage_root(storage).below(model).below(area)


def storage_root(storage: str) -> BlobStore:
    """Return the blob store of a whole storage, which models share.

    Raises EnvironmentFault without boto3.
    """
    if not storage.startswith(SCHEME):
        return LocalBlobs(Path(storage))
    bucket, _, prefix = storage.removeprefix(SCHEME).partition("/")
    return ObjectBlobs(bucket, prefix.strip("/"), object_client.endpoint(), object_client.region())
