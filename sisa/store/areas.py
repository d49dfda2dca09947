"""Name the storage areas of a model, which are folders in its directory or its storage, and open them.

    area         holds                                      is in      is sealed
    records      slices, a file each                        storage    if the model is encrypted
    index        vectors, a file for each shard             directory  if the model is encrypted
    checkpoints  stages, a group of files each              storage    if the model is encrypted
    patches      patches, a group of files each             storage    if the model is encrypted
    prefixes     hidden states that are kept, files         storage    if the model is encrypted
    vault        texts kept by consent, a file for each set directory  always
    runs         unfinished patches, a group of files each  directory  always
    scratch      what a replay trains, until the next       storage    if the model is encrypted
                 writer erases it
    metrics      numbers, a file for each run               directory  never
    log          the evidence's log, which is public        storage    never

A storage is an absolute path or `s3://BUCKET[/PREFIX]`, and models share it; the endpoint of a server
other than Amazon's comes from the environment. Without a storage, all areas are in the directory.

>>> open_areas(Path("m"), "s3://b/p", "0f")["records"].location()
's3://b/p/0f/records'
>>> alone, shared = open_areas(Path("/m"), None, "0f"), open_areas(Path("/m"), "/s", "0f")
>>> alone["records"].location(), shared["index"].location()
('/m/records', '/m/index')
"""

from __future__ import annotations

from pathlib import Path

from sisa.core import ports
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.blobs.s3_blobs import SCHEME, bucket_at

RECORDS, INDEX, CHECKPOINTS, REPLAYS = "records", "index", "checkpoints", "scratch"
PATCHES, VAULT, RUNS, METRICS = "patches", "vault", "runs", "metrics"
HIDDEN_STATES, LOG = "prefixes", "log"
LOCAL_AREAS = (INDEX, VAULT, RUNS, METRICS)
SHARED_AREAS = (RECORDS, HIDDEN_STATES, CHECKPOINTS, PATCHES, REPLAYS, LOG)
FILE_AREAS = (RECORDS, INDEX, VAULT, HIDDEN_STATES)  # sealed ones that hold files
GROUP_AREAS = (CHECKPOINTS, PATCHES, RUNS, REPLAYS)  # sealed ones that hold groups of files
ALWAYS_SEALED = (VAULT, RUNS)


def open_areas(directory: Path, storage: str | None, model: str) -> dict[str, ports.BlobStore]:
    """Return the blob store of every storage area of a model."""
    here: ports.BlobStore = LocalBlobs(directory)
    shared = storage_root(storage).below(model) if storage else here
    areas = {each: here.below(each) for each in LOCAL_AREAS}
    return areas | {each: shared.below(each) for each in SHARED_AREAS}


def storage_root(storage: str) -> ports.BlobStore:
    """Return the blob store of a storage, which models share. Raise EnvironmentFault without boto3."""
    return bucket_at(storage) if storage.startswith(SCHEME) else LocalBlobs(Path(storage))
