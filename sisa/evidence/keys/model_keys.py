"""Make, find and rotate the keys of a model: where its run file says, or on an open model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sisa.config.config import RunConfig
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.core.ports import BlobStore
from sisa.evidence.database import EvidenceTables
from sisa.evidence.keys.keys import Keys, Reason, create_keys, new_key, read_keys, rotate_keys
from sisa.evidence.keys.model_signature import export_key, public_pem
from sisa.evidence.log.log import Log
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.store.areas import LOG, open_areas
from sisa.verifier.envelope import StatementKey

if TYPE_CHECKING:
    from sisa.model import Model

PUBLIC_KEYS = "keys.json"  # the file of public keys, beside the log
EXPORTS_KEY = "exports.pem"  # beside it: the public key of exports, for `model_signing verify key`


def log_for_writing(keys: Keys, blobs: BlobStore) -> Log:
    """Return a model's log to append to, once the keys are settled and published beside it.

    The caller holds the writer lock. Raise IntegrityError.
    """
    log = Log(blobs, keys)
    keys.settle(log)
    exports = public_pem(export_key(keys.log_seed).public_key())
    for name, data in ((PUBLIC_KEYS, keys.public_file), (EXPORTS_KEY, exports)):
        if not blobs.num_bytes(name) or blobs.get(name, "file of public keys") != data:
            blobs.put(name, data)
    return log


def log_blobs(model: Model) -> BlobStore:
    """Return the location of a model's log."""
    return open_areas(model.directory, model.config.storage, model.id)[LOG]


def keys_of(model: Model) -> Keys:
    """Return the keys of a model. Raise InvalidInput if it has none."""
    if (keys := open_keys(model.config, model.id)) is None:
        raise InvalidInput(
            "the model has no keys of evidence, so its deletions are not certified",
            where=str(evidence_keys_dir(model.config, model.id)),
            next_step=f"make them: sisa keys init -m {model.directory}",
        )
    return keys


def log_of(model: Model) -> Log:
    """Return the log of a model. Raise InvalidInput if the model has no keys."""
    return Log(log_blobs(model), keys_of(model))


def start_evidence(model: Model, signer: str = "", public_key: StatementKey | None = None) -> Keys:
    """Make the keys of a model, and publish the public ones. Raise ConfigConflict if it has some."""
    new = new_key(signer or model.config.signing.signer or "", public_key)
    with model.locked():
        place, blobs = evidence_keys_dir(model.config, model.id), log_blobs(model)
        if not place.exists():
            if blobs.held():
                raise ConfigConflict(
                    "the model has a log of evidence, which other keys signed; nothing was changed",
                    where=blobs.location(),
                    next_step="restore its keys from a backup, or move the log away: evidence begins "
                    "anew, and what was certified before is checked with the old keys and the old log",
                )
            EvidenceTables(model.directory / EVIDENCE).drop_logged()
        keys = create_keys(place, model.id, new)
        log_for_writing(keys, blobs)
    return keys


def rotate(
    model: Model,
    reason: Reason = "rotated",
    until: int | None = None,
    signer: str = "",
    public_key: StatementKey | None = None,
) -> Keys:
    """Replace the key that signs a model's statements. Raise Busy while another process writes."""
    new = new_key(signer or model.config.signing.signer or "", public_key)
    with model.locked():
        keys, blobs = keys_of(model), log_blobs(model)
        rotated = rotate_keys(keys, log_for_writing(keys, blobs), reason, until, new)
        log_for_writing(rotated, blobs)
    return rotated


def open_keys(config: RunConfig, model: str) -> Keys | None:
    """Return the keys of a model; None if it has none. Raise IntegrityError for damaged ones."""
    place = evidence_keys_dir(config, model)
    if not place.is_dir():
        return None
    found = read_keys(place, model)
    return replace(found, signer=config.signing.signer) if config.signing.signer else found
