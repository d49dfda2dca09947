"""Find what a model needs and a copy of its directory may lack: its keys and its witness."""

from __future__ import annotations

from pathlib import Path

from sisa.config.config import RunConfig
from sisa.config.paths import state_dir
from sisa.core import ports
from sisa.core.digest import Keyed
from sisa.core.domain import Tombstone
from sisa.core.errors import IntegrityError
from sisa.store.blobs import files
from sisa.store.blobs.keyring import FileKeyring, read_secret, write_secret
from sisa.store.witness import FileWitness

PARTITION_KEY = "partition.key"


def key_path(directory: Path, config: RunConfig, model: str) -> Path:
    """Return where a model's partition key belongs.

    An encrypted model's key is among its other keys: the directory alone can't question its ledger.
    """
    return config.sisa.partition_key_file or _key_places(directory, config, model)[0]


def _key_places(directory: Path, config: RunConfig, model: str) -> tuple[Path, Path]:
    """Return where a model's own key belongs, and where it was before encryption began or ended."""
    plain, encrypted = directory / PARTITION_KEY, keyrings_dir(config) / model / PARTITION_KEY
    return (encrypted, plain) if config.encrypt else (plain, encrypted)


def stored_secret(directory: Path, config: RunConfig, model: str) -> bytes:
    """Return the secret of a model. Raise IntegrityError if the model's own key file is missing."""
    if config.sisa.partition_key_file is not None:
        return read_secret(config.sisa.partition_key_file)
    places = _key_places(directory, config, model)
    for path in places:
        if path.is_file():
            return read_secret(path)
    raise IntegrityError(
        "the model's partition key is missing",
        where=str(places[0]),
        next_step="restore it from a backup: without it no record can be found",
    )


def keep_key(directory: Path, config: RunConfig, model: str, secret: bytes) -> None:
    """Write a model's own partition key where it belongs, then remove it from other places.

    While a file that the run file names is gone, the last copy stays.
    """
    write_key(directory, config, model, secret)
    belongs = key_path(directory, config, model)
    for path in _key_places(directory, config, model) if belongs.is_file() else ():
        if path.is_file() and not path.samefile(belongs):
            files.overwrite(path)
            files.erase_all(path.parent, [path.name])


def keep_new_key(directory: Path, config: RunConfig, model: str, secret: bytes) -> None:
    """Write the partition key of a new model, over that of an attempt that committed nothing."""
    if config.sisa.partition_key_file is None:
        write_secret(key_path(directory, config, model), secret)
    keep_key(directory, config, model, secret)


def write_key(directory: Path, config: RunConfig, model: str, secret: bytes) -> None:
    """Write a model's own partition key where it belongs; a key file that is named is the user's."""
    belongs = key_path(directory, config, model)
    if config.sisa.partition_key_file is None and not belongs.is_file():
        write_secret(belongs, secret)


def keyrings_dir(config: RunConfig) -> Path:
    """Return the directory of the keyrings of models with this run file, each under its model's name."""
    return (config.keyring or state_dir() / "keyrings").absolute()


def open_keyring(config: RunConfig, name: str) -> ports.Keyring:
    """Return the keys of a model by its name; a model that is now plain may still have sealed files."""
    return FileKeyring(keyrings_dir(config) / name, config.encrypt)


def vault_keyring(config: RunConfig, name: str) -> ports.Keyring:
    """Return the keys for what every model seals: the vault and unfinished patches."""
    return FileKeyring(keyrings_dir(config) / name, seals=True)


def evidence_keys_dir(config: RunConfig, model: str) -> Path:
    """Return the directory of the keys that sign a model's evidence."""
    return (config.signing.keys or state_dir() / "evidence-keys").absolute() / model


def witness_dir(config: RunConfig) -> Path:
    """Return the directory of witnesses: as the run file says, else in the user's state directory."""
    return config.witness or state_dir() / "witness"


def witness_of(config: RunConfig, keyed: Keyed, model: str) -> FileWitness:
    """Return a model's witness, named by its key and its id."""
    return FileWitness(witness_dir(config) / f"{keyed.name[:16]}-{model}.jsonl", keyed)


def deleted_under(config: RunConfig, keyed: Keyed) -> list[Tombstone]:
    """Return what any model under this partition key deleted, according to the witnesses here."""
    paths = sorted(witness_dir(config).glob(witness_of(config, keyed, "*").path.name))
    return [each for path in paths for each in FileWitness(path, keyed).read().tombstones.values()]
