"""Read the description of a model: what its ledger and its partition key say it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core import ports
from sisa.core.digest import Keyed
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.event_chain import key_names
from sisa.core.ledger_meta import DESCRIPTION
from sisa.flows.wiring.keys import key_path, open_keyring, stored_secret
from sisa.flows.wiring.ledger_place import open_ledger
from sisa.flows.wiring.resources import Named


@dataclass(frozen=True)
class Description:
    """The description of a model by its ledger and its partition key."""

    meta: Mapping[str, str]
    id: str
    config: RunConfig
    keyring: ports.Keyring
    base: Named
    embedder: Named
    secret: bytes


def read_description(directory: Path) -> dict[str, str]:
    """Return the ledger's description of its model. Raise InvalidInput if it was never committed."""
    with open_ledger(directory) as ledger:
        meta = ledger.meta()
    if "config" not in meta:
        raise InvalidInput(
            "the model in this directory was never committed",
            where=str(directory),
            next_step="run `sisa train RUN.yaml` again",
        )
    return {name: meta[name] for name in DESCRIPTION if name in meta}


def describe(directory: Path) -> Description:
    """Read what a model's directory holds. Raise IntegrityError for another model's key."""
    meta = read_description(directory)
    config, name = RunConfig.from_canonical(meta["config"]), model_id(meta)
    secret = stored_secret(directory, config, name)
    if meta.get("key") not in key_names(Keyed(secret)):
        raise IntegrityError(
            "the partition key is not this model's",
            where=str(key_path(directory, config, name)),
            next_step="restore the key from a backup: without it no record can be found",
        )
    keyring, base, embedder = open_keyring(config, name), named(meta, "base"), named(meta, "embedder")
    return Description(meta, name, config, keyring, base, embedder, secret)


def named(ledger_meta: Mapping[str, str], key: str) -> Named:
    """Return the base or the embedder with which a model was made."""
    try:
        return Named(**json.loads(ledger_meta[key]))
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"the ledger does not name the model's {key}",
            got=type(error).__name__,
            next_step="restore the model directory from a backup",
        ) from None


def model_id(ledger_meta: Mapping[str, str]) -> str:
    """Return the model's name. Raise IntegrityError for anything else, since paths contain it."""
    found = ledger_meta.get("model", "")
    if not re.fullmatch(r"[0-9a-f]{32}", found):
        raise IntegrityError(
            "the ledger does not name its model",
            got="another name" if found else "no name",
            next_step="restore the model directory from a backup",
        )
    return found
