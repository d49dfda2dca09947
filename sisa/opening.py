"""From a model directory (or a run file) to a `World`: the one place where real parts are wired.

    DIR/ledger.sqlite    the ledger             DIR/records/      slices as Parquet
    DIR/partition.key    the secret, mode 0600  DIR/index/        FAISS, one file per shard
    DIR/lock             one writer             DIR/checkpoints/  a directory per stage
    DIR/scratch/         replays; erased by the next writer
    KEYRING/MODEL/       keys of an encrypted model, outside of DIR: `keyring:`, else the state directory

Rules: heavy parts (base, tokenizer, embedder) are resolved on first use, and what is resolved must be
what the ledger names by digest, or an IntegrityError stops the command. Torch is not imported here.

Not covered: the flows. Executors and the probe are found by name among the entry points `sisa.executors`
and `sisa.probes`, so that this package never imports what uses Ray or is approximate.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sisa.assign import Assigner
from sisa.config import RunConfig
from sisa.digest import KEY_BYTES, Keyed
from sisa.domain import Probed, Record, Tombstone
from sisa.errors import IntegrityError, InvalidInput
from sisa.model.numerics import fingerprint
from sisa.patch_plan import OVER, active
from sisa.ports import (
    CheckpointStore,
    Embedder,
    Executor,
    Keyring,
    Ledger,
    Probe,
    Report,
    Trainer,
    Vectors,
)
from sisa.serial import SerialExecutor, Site
from sisa.store import files
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.exports import DirectoryExports
from sisa.store.index import FaissIndex
from sisa.store.keyring import PLAIN, FileKeyring
from sisa.store.ledger import SqlLedger
from sisa.store.records import FileRecords
from sisa.store.witness import FileWitness
from sisa.world import World

LEDGER, KEY, LOCK = "ledger.sqlite", "partition.key", "lock"
RECORDS, INDEX, CHECKPOINTS, SCRATCH = "records", "index", "checkpoints", "scratch"
PATCHES = "patches"

OpenExecutor = Callable[[Site, Mapping[str, Any]], Executor]
# of the base's directory and digest, and of the files of the patches on it, lowest first
OpenProbe = Callable[[Path, str, RunConfig, Sequence[Mapping[str, bytes]]], Probe]


@dataclass(frozen=True)
class Named:
    """A base or an embedder as the ledger names it."""

    name: str
    digest: str
    dimension: int = 0


class Parts:
    """The heavy parts of one model, resolved on first use and checked against the ledger's names."""

    def __init__(self, config: RunConfig, base: Named | None, embedder: Named | None) -> None:
        self.config = config
        self._base = base
        self._embedder = embedder
        self._counted: tuple[tuple[Record, ...], list[int]] | None = None

    @cached_property
    def base(self) -> Any:
        """The base's files (`sisa.model.base.BaseFiles`)."""
        from sisa.model.base import resolve_base

        found = resolve_base(self.config.base_model)
        if self._base is not None:
            _refuse_change("base model", self._base, found.digest)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        from sisa.model.base import load_tokenizer

        return load_tokenizer(self.base.directory)

    @cached_property
    def embedder(self) -> Embedder:
        from sisa.model.embedder import resolve_embedder
        from sisa.model.hashing import HashingEmbedder

        name = self.config.sisa.embedder
        found = HashingEmbedder() if name == "hashing" else resolve_embedder(name)
        if self._embedder is not None:
            _refuse_change("embedder", self._embedder, found.digest)
        return found

    @property
    def dimension(self) -> int:
        return self._embedder.dimension if self._embedder else self.embedder.dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self.embedder.embed(texts)

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        """Tokens of each record. Raises InvalidInput listing every record that does not fit."""
        from sisa.model.tokens import count_tokens

        asked = tuple(records)
        if self._counted is None or self._counted[0] != asked:
            counts = count_tokens(
                asked,
                self.tokenizer,
                self.config.sequence_len,
                self.config.overlength,
                train_on_inputs=self.config.train_on_inputs,
            )
            self._counted = (asked, counts)
        return self._counted[1]

    def check_modules(self) -> None:
        """Raises InvalidInput when the base lacks the modules that are to get an adapter."""
        from sisa.model.adapter import lora_config
        from sisa.model.base import load_skeleton

        lora_config(self.config.training(), load_skeleton(self.base.directory))

    def meta(self) -> dict[str, str]:
        """What the ledger keeps of these parts."""
        named = {"name": self.config.base_model, "digest": self.base.digest}
        embedder = {
            "name": self.config.sisa.embedder,
            "digest": self.embedder.digest,
            "dimension": self.embedder.dimension,
        }
        return {
            "config": self.config.to_canonical(),
            "base": json.dumps(named, sort_keys=True),
            "embedder": json.dumps(embedder, sort_keys=True),
        }


def _refuse_change(what: str, named: Named, found: str) -> None:
    if found != named.digest:
        raise IntegrityError(
            f"the {what} is not the one that this model was trained with",
            where=named.name,
            expected=named.digest,
            got=found,
            next_step=f"restore the {what}, or move the model to the new one with "
            "`sisa train RUN.yaml --reconfigure`",
        )


def open_world(
    directory: Path,
    parts: Parts,
    keyed: Keyed,
    executor: str | OpenExecutor,
    report: Report,
    *,
    base_digest: str,
    model: str,
    keyring: Keyring,
    create: bool = False,
) -> World:
    """The real parts in a bundle. Raises IntegrityError for a ledger that is missing or damaged."""
    config = parts.config
    records = FileRecords(directory / RECORDS, keyring)
    ledger = SqlLedger(directory / LEDGER, create=create)
    patches = FileCheckpoints(directory / PATCHES, keyring, PATCHES)

    def executor_for(store: CheckpointStore) -> Executor:
        if not isinstance(store, FileCheckpoints):
            raise TypeError("real executors train into directories")
        threads = config.sisa.threads_per_shard
        base = parts.base
        places = (records.root, store.root, base.directory)
        site = Site(
            *places,
            base.digest,
            threads,
            keyring=keyring,
            room=store.room,
            patches_dir=directory / PATCHES,
            patches=_trained_over(ledger),
        )
        return find_executor(executor)(site, config.cluster.model_dump(mode="json"))

    return World(
        ledger=ledger,
        witness=witness_of(config, keyed, model),
        records=records,
        checkpoints=FileCheckpoints(directory / CHECKPOINTS, keyring),
        patches=patches,
        index=FaissIndex(directory / INDEX, parts.dimension, keyring),
        keyring=keyring,
        exports=DirectoryExports(),
        embed=parts.embed,
        count_tokens=parts.count_tokens,
        executor_for=executor_for,
        assigner=Assigner(keyed, config.layout),
        recipe=config.recipe(base_digest),
        fingerprint=fingerprint(config.sisa.threads_per_shard),
        now=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"),
        report=report,
        probe=_probe(parts, ledger, patches),
    )


def _trained_over(ledger: Ledger) -> tuple[tuple[str, str], ...]:
    """Keys and manifests of the patches that shards are trained over, lowest first."""
    manifests = {each.key: each.manifest_sha256 for each in ledger.patches()}
    keys = json.loads(ledger.meta().get(OVER, "[]"))
    if absent := [key for key in keys if not manifests.get(key)]:
        raise IntegrityError(
            "the ledger lacks patches that shards are trained over",
            got=f"{len(absent)} of {len(keys)}",
            next_step="restore the model directory from a backup",
        )
    return tuple((key, manifests[key]) for key in keys)


def _probe(parts: Parts, ledger: Ledger, patches: CheckpointStore) -> Probe | None:
    """What asks the base alone, under the patches that are served when it is asked; None where none is
    wanted or installed."""
    opened = find_probe() if parts.config.probe else None
    if opened is None:
        return None
    open_it = opened

    def probe(records: Sequence[Record]) -> Probed:
        stack = [patches.load(each.key, each.manifest_sha256) for each in active(ledger.patches())]
        return open_it(parts.base.directory, parts.base.digest, parts.config, stack)(records)

    return probe


def open_serial(site: Site, _options: Mapping[str, Any]) -> Executor:
    """Chains one after another in this process."""
    return SerialExecutor(open_trainer(site), *open_stores(site))


def open_trainer(site: Site) -> Trainer:
    """The trainer on a site's base, under the patches to train over. Raises IntegrityError."""
    from sisa.model.lora import LoraTrainer

    store = FileCheckpoints(site.patches_dir, site.keyring, PATCHES)
    patches = [store.load(key, manifest) for key, manifest in site.patches]
    return LoraTrainer(site.base_dir, site.base_digest, site.threads, patches)


def open_stores(site: Site) -> tuple[FileRecords, FileCheckpoints]:
    """The stores of a site: slices to read, checkpoints to write."""
    checkpoints = FileCheckpoints(site.checkpoints_dir, site.keyring, site.room)
    return FileRecords(site.records_dir, site.keyring), checkpoints


def find_probe() -> OpenProbe | None:
    """The entry point `base` of `sisa.probes`, loaded when it is first called."""
    for point in entry_points(group="sisa.probes", name="base"):
        return lambda *of: point.load()(*of)
    return None


def check_executor(executor: str | OpenExecutor) -> None:
    """Raises InvalidInput for a name that no executor has; loads none, since Ray takes seconds."""
    names = ["serial", *(point.name for point in entry_points(group="sisa.executors"))]
    if isinstance(executor, str) and executor not in names:
        raise InvalidInput("unknown executor", expected=" or ".join(names), got=executor)


def find_executor(executor: str | OpenExecutor) -> OpenExecutor:
    """An executor by name (`serial`, or an entry point of `sisa.executors`), or the one given."""
    check_executor(executor)
    if not isinstance(executor, str):
        return executor
    if executor == "serial":
        return open_serial
    (point, *_) = entry_points(group="sisa.executors", name=executor)
    found: OpenExecutor = point.load()
    return found


def new_secret(config: RunConfig) -> bytes:
    """The secret of a new model: from its key file, or fresh."""
    if config.sisa.partition_key_file is None:
        return secrets.token_bytes(KEY_BYTES)
    return read_secret(config.sisa.partition_key_file)


def read_secret(path: Path) -> bytes:
    """A secret at rest: 64 hexadecimal digits. The content never reaches a message."""
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise InvalidInput(
            "the partition key can't be read", where=str(path), got=str(error.strerror)
        ) from None
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise InvalidInput(
            "that is not a partition key",
            where=str(path),
            expected="64 hexadecimal digits",
            next_step="copy the partition.key of a model, or write 32 random bytes in hexadecimal",
        )
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Keep the secret, readable by its owner alone."""
    files.write_atomic(path, secret.hex().encode() + b"\n", mode=0o600)


def stored_config(ledger_meta: Mapping[str, str]) -> RunConfig:
    """The run file that a model was made with."""
    return RunConfig.from_canonical(ledger_meta["config"])


def named(ledger_meta: Mapping[str, str], key: str) -> Named:
    """The base or the embedder that a model was made with."""
    try:
        return Named(**json.loads(ledger_meta[key]))
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"the ledger does not name the model's {key}",
            got=type(error).__name__,
            next_step="restore the model directory from a backup",
        ) from None


def stored_secret(directory: Path, config: RunConfig) -> bytes:
    """The secret of a model. Raises IntegrityError when the model's own key file is missing."""
    if config.sisa.partition_key_file is not None:
        return read_secret(config.sisa.partition_key_file)
    if not (directory / KEY).is_file():
        raise IntegrityError(
            "the model's partition key is missing",
            where=str(directory / KEY),
            next_step="restore it from a backup: without it no record can be found",
        )
    return read_secret(directory / KEY)


def new_model_id() -> str:
    """The name of a new model, which its copies share: what is kept outside its directory bears it."""
    return uuid.uuid4().hex


def model_id(ledger_meta: Mapping[str, str]) -> str:
    """The model's name. Raises IntegrityError for one that is none: paths are made of it."""
    found = ledger_meta.get("model", "")
    if not re.fullmatch(r"[0-9a-f]{32}", found):
        raise IntegrityError(
            "the ledger does not name its model",
            got="another name" if found else "no name",
            next_step="restore the model directory from a backup",
        )
    return found


def state_dir() -> Path:
    """Where this user's programs keep state: `$XDG_STATE_HOME/sisa`, else `~/.local/state/sisa`."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state") / "sisa"


def witness_dir(config: RunConfig) -> Path:
    """Where witnesses rest: as the run file says, else in the user's state directory."""
    return config.witness or state_dir() / "witness"


def witness_of(config: RunConfig, keyed: Keyed, model: str) -> FileWitness:
    """A model's witness, by the names of its key and of itself."""
    return FileWitness(witness_dir(config) / f"{_witness_prefix(keyed)}{model}.jsonl")


def _witness_prefix(keyed: Keyed) -> str:
    return f"{keyed.name[:16]}-"


def deleted_under(config: RunConfig, keyed: Keyed) -> list[Tombstone]:
    """What any model under this partition key deleted, as far as witnesses here know."""
    paths = sorted(witness_dir(config).glob(f"{_witness_prefix(keyed)}*.jsonl"))
    return [each for path in paths for each in FileWitness(path).read().tombstones.values()]


def keyrings(config: RunConfig) -> Path:
    """Where the keyrings of models with this run file are, each under its model's name."""
    return (config.keyring or state_dir() / "keyrings").absolute()


def open_keyring(config: RunConfig, name: str) -> Keyring:
    """The keys of a model by its name; one that is no longer encrypted may still have files to open."""
    root = keyrings(config) / name
    return FileKeyring(root, config.encrypt) if config.encrypt or root.is_dir() else PLAIN


def close(world: World) -> None:
    if isinstance(world.ledger, SqlLedger):
        world.ledger.close()
