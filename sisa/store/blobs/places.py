"""Where the rooms of a model are: beside its ledger, or in the storage that its run file names.

    DIR/ROOM                  without `storage:`; index, vault and unfinished runs always
    STORAGE/MODEL/ROOM        records, hidden states, checkpoints, patches, replays, by model

Rules: a storage is an absolute path or `s3://BUCKET[/PREFIX]`; the endpoint of another server than
Amazon's comes from the environment. Models share a storage, since each has a name of its own there.

Not covered: which rooms a flow needs (`world.py`), moving from one storage to another.

>>> rooms(Path("m"), "s3://b/p", "0f")["records"].location()
's3://b/p/0f/records'
>>> alone, shared = rooms(Path("/m"), None, "0f"), rooms(Path("/m"), "/s", "0f")
>>> alone["records"].location(), shared["index"].location()
('/m/records', '/m/index')
"""

from __future__ import annotations

from pathlib import Path

from sisa.core.place_ports import Place
from sisa.store.blobs import object_client
from sisa.store.blobs.local_place import LocalPlace
from sisa.store.blobs.object_place import ObjectPlace

SCHEME = "s3://"
AT_HAND = ("index", "vault", "runs", "metrics")  # rooms that stay with the driver
TRAVELLING = ("records", "prefixes", "checkpoints", "patches", "scratch")  # rooms that workers use


def rooms(directory: Path, storage: str | None, model: str) -> dict[str, Place]:
    """The place of every room of a model, replays' among them."""
    found: dict[str, Place] = {each: LocalPlace(directory / each) for each in AT_HAND}
    for each in TRAVELLING:
        found[each] = place_of(storage, model, each) if storage else LocalPlace(directory / each)
    return found


def place_of(storage: str, model: str, room: str) -> Place:
    """A room of a model in a storage."""
    if not storage.startswith(SCHEME):
        return LocalPlace(Path(storage) / model / room)
    return root_of(storage).below(model).below(room)


def root_of(storage: str) -> Place:
    """A whole storage, in which models have places. Raises EnvironmentFault without boto3."""
    if not storage.startswith(SCHEME):
        return LocalPlace(Path(storage))
    bucket, _, prefix = storage.removeprefix(SCHEME).partition("/")
    return ObjectPlace(bucket, prefix.strip("/"), object_client.endpoint(), object_client.region())
