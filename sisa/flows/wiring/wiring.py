"""Wire the real parts of a model directory into a `Context`.

    DIR/ledger.sqlite    the ledger, or         DIR/records/      slices as Parquet
    DIR/ledger.url       where it is            DIR/index/        FAISS, one file per shard
    DIR/partition.key    the secret, mode 0600  DIR/checkpoints/  a directory per stage
    DIR/lock             one writer             DIR/commit.lock   one commit at a time
    DIR/scratch/         replays; erased by     DIR/patches/      a directory per patch
                         the next writer        DIR/vault/        a sealed file per set of texts
    DIR/metrics/         numbers, a file a run  DIR/runs/         unfinished patches, sealed
    DIR/prefixes/        kept hidden states
    STORAGE/MODEL/       records, checkpoints, patches and scratch, where the run file names a `storage:`
    KEYRING/MODEL/       keys of an encrypted model and of every vault, outside of DIR
    DIR/evidence.sqlite  what evidence is made from      DIR/log/  its transparency log, to publish
    DIR/service.json     where its service runs, while it does, mode 0600
    DIR/service.sqlite   reports of its service that wait, and keys of calls that were made

`store/areas.py` describes the storage areas. Executors, probes and patchers that use Ray or are
approximate are found by name (`upper_houses.py`), and so is the hook that issues certificates, if the
model has evidence.
"""

from __future__ import annotations

import contextlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sisa.config.config import RunConfig, ledger_url, state_dir
from sisa.core import ports
from sisa.core.digest import Keyed
from sisa.core.domain import Chain, Probed, Record, Tombstone, active
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.events import Event, QueueSeen, Report, silent
from sisa.core.ledger_meta import DESCRIPTION
from sisa.core.requests import EventChain, key_names
from sisa.core.run import current_run, new_run
from sisa.flows.context.context import Compute, Context, Settings, Stores, patch_files, patches_beneath
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.serial import SerialExecutor, Site
from sisa.flows.wiring import upper_houses
from sisa.flows.wiring.resources import Named, Resources
from sisa.lm.base.numerics import fingerprint
from sisa.planning.layout import Assigner
from sisa.store import areas
from sisa.store.blobs import files
from sisa.store.blobs.keyring import FileKeyring, read_secret, write_secret
from sisa.store.blobs.local_blobs import absolute
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.exports import DirectoryExports
from sisa.store.hidden_states import FileHiddenStates
from sisa.store.index import FaissIndex
from sisa.store.ledger.database import ledger_version
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.metrics import FileMetrics, metrics_line
from sisa.store.records import FileRecords
from sisa.store.vault import FilePatchDrafts, FileVault
from sisa.store.witness import FileWitness

LEDGER, KEY, LOCK = "ledger.sqlite", "partition.key", "lock"
LEDGER_URL = "ledger.url"  # names a ledger on a server, in place of the file
EVIDENCE = "evidence.sqlite"
HOOKS: tuple[ports.DeletionHook[Context], ...] = (PatchesHook(),)  # called on a deletion, in this order

OpenExecutor = Callable[[Site, Mapping[str, Any]], ports.Executor]
# of the base's directory and digest, and of the files of the patches on it, lowest first
OpenProbe = Callable[[Path, str, RunConfig, Sequence[Mapping[str, bytes]]], ports.Probe]


@contextlib.contextmanager
def open_context(
    directory: Path,
    resources: Resources,
    keyed: Keyed,
    model: str,
    executor: str | OpenExecutor,
    report: Report,
    *,
    create: bool = False,
) -> Iterator[Context]:
    """Open a model by its name, until the end of the block. Raise IntegrityError, ConfigConflict."""
    config = resources.config
    with open_ledger(directory, create=create) as ledger:
        stores = _open_stores(directory, resources, keyed, model, ledger)
        settings = Settings(
            assigner=Assigner(keyed, config.layout),
            recipe=config.recipe(resources.base_digest),
            patch_mode=config.patch_mode,
            chain=EventChain.of(keyed, ledger.meta().get("key")),
            keeps_hidden_states=config.prefix_cache_bytes > 0,
            routing=config.sisa,
            four_eyes=config.service.four_eyes,
        )
        compute = _compute(directory, resources, stores, model, executor)
        noting = recording(report, stores.metrics, _now)
        hooks = (*evidence_hooks(directory, config, model), *HOOKS)  # evidence sees what is before all
        context = Context(stores, compute, settings, _now, noting, hooks)
        _ = context.recipe  # refuses a ledger that lacks a patch beneath its shards
        yield context


# --- the ledger's place and the writer lock -------------------------------------------------------


def ledger_place(directory: Path) -> Path | str:
    """Return where a model's ledger is: the URL that its directory names, or the path of its file."""
    try:
        text = (directory / LEDGER_URL).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return directory / LEDGER
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFault(f"can't be read: {error}", where=str(directory / LEDGER_URL)) from error
    try:
        return ledger_url(text)
    except ValueError as error:
        where, step = str(directory / LEDGER_URL), "restore it from a backup"
        raise IntegrityError("names no ledger", where=where, got=str(error), next_step=step) from None


def has_ledger(directory: Path) -> bool:
    """Return whether a directory has a ledger, or names one."""
    return any((directory / each).is_file() for each in (LEDGER, LEDGER_URL))


def ledger_name(directory: Path) -> str:
    """Return the name of the ledger's file, or of the file that names its server."""
    return LEDGER if isinstance(ledger_place(directory), Path) else LEDGER_URL


def open_ledger(directory: Path, *, create: bool = False) -> AbstractContextManager[SqlLedger]:
    """Open a model's ledger until the end of the block. Raise IntegrityError, EnvironmentFault."""
    return contextlib.closing(SqlLedger(ledger_place(directory), create=create))


def claim_ledger(directory: Path, url: str | None) -> None:
    """Reserve a URL for a new model's ledger. Raise ConfigConflict if another ledger is there."""
    here = ledger_place(directory)
    if isinstance(here, str) and here != url:
        raise ConfigConflict(
            "the directory names another ledger than the run file",
            where=str(directory / LEDGER_URL),
            expected=url or "no ledger on a server",
            got=here,
            next_step="correct the run file, or choose an empty directory",
        )
    if url is None or here == url:
        return
    check_free(url)
    files.write_atomic(directory / LEDGER_URL, f"{url}\n".encode())


def check_free(url: str) -> None:
    """Raise ConfigConflict if there is a ledger at a URL."""
    if ledger_version(url) != 0:
        raise ConfigConflict(
            "there is a ledger already, of another model or of another directory",
            where=url,
            next_step="give each model a database or a schema of its own",
        )


@contextlib.contextmanager
def model_lock(directory: Path, url: str | None = None) -> Iterator[Path | str]:
    """Hold a model's only writer lock, beside its ledger; a new model's will be at `url`.

    Yield the place of the present ledger. Raise Busy.
    """
    place = ledger_place(directory)
    with lock_beside(place if isinstance(place, str) else url or place):
        if ledger_place(directory) != place:
            raise Busy("the ledger has just been moved", where=str(directory), next_step="try again")
        yield place


def lock_beside(place: Path | str) -> AbstractContextManager[None]:
    """Return the writer lock of a ledger: a file beside its own, or a lock of its server."""
    if isinstance(place, Path):
        return files.writer_lock(place.with_name(LOCK))
    from sisa.store.ledger.postgres import advisory_lock

    return advisory_lock(place, "writer", "is writing to this model")


# --- stores and computing parts -------------------------------------------------------------------


def _open_stores(
    directory: Path, resources: Resources, keyed: Keyed, model: str, ledger: ports.Ledger
) -> Stores:
    config = resources.config
    keyring = open_keyring(config, model)
    blobs = areas.open_areas(directory, config.storage, model)
    vaults = vault_keyring(config, model)
    return Stores(
        ledger=ledger,
        witness=witness_of(config, keyed, model),
        records=FileRecords(blobs[areas.RECORDS], keyring),
        checkpoints=FileCheckpoints(blobs[areas.CHECKPOINTS], keyring),
        index=FaissIndex(directory / areas.INDEX, resources.dimension, keyring, resources.index_cache),
        keyring=keyring,
        exports=DirectoryExports(),
        metrics=FileMetrics(directory / areas.METRICS),
        patches=FileCheckpoints(blobs[areas.PATCHES], keyring, areas.PATCHES),
        vault=FileVault(directory / areas.VAULT, vaults),
        drafts=FilePatchDrafts(directory / areas.RUNS, vaults),
        hidden_states=FileHiddenStates(blobs[areas.HIDDEN_STATES], keyring),
        blobs=blobs,
    )


def _compute(
    directory: Path, resources: Resources, stores: Stores, model: str, executor: str | OpenExecutor
) -> Compute:
    config = resources.config

    def executor_for(store: ports.CheckpointStore) -> ports.Executor:
        if not isinstance(store, FileCheckpoints):
            raise TypeError("real executors train into blob stores")
        site = _site(stores, resources, store)
        return find_executor(executor)(site, config.cluster.model_dump(mode="json"))

    def probe(records: Sequence[Record]) -> Probed:
        """Probe the base under its served patches."""
        base, stack = resources.base, active(stores.ledger.patches())
        files = patch_files(stores.patches, stack)
        return find_probe()(base.directory, base.digest, config, files)(records)

    return Compute(
        embed=lambda texts: resources.embedder.embed(texts),
        count_tokens=resources.count_tokens,
        executor_for=executor_for,
        patcher=lambda: open_patcher(executor, _patch_site(directory, resources, stores, model), config),
        fingerprint=fingerprint(config.sisa.threads_per_shard, config.precision),
        probe=probe if config.probe else None,
    )


def has_evidence(directory: Path, config: RunConfig, model: str) -> bool:
    """Return whether deletions are certified: the model has signing keys or earlier evidence."""
    return evidence_keys(config, model).is_dir() or (directory / EVIDENCE).exists()


def evidence_hooks(
    directory: Path, config: RunConfig, model: str
) -> tuple[ports.DeletionHook[Context], ...]:
    """Return the hook that issues certificates, if deletions are certified."""
    if not has_evidence(directory, config, model):
        return ()
    return (pkgutil.resolve_name(upper_houses.EVIDENCE_HOOK)(directory, config, model),)


# --- the description of a model -------------------------------------------------------------------


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


def open_as_it_is(directory: Path) -> AbstractContextManager[Context]:
    """Open a model without its lock, whether or not it has caught up with its witness."""
    found = describe(directory)
    resources = Resources(found.config, found.base, found.embedder)
    return open_context(directory, resources, Keyed(found.secret), found.id, "serial", silent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# --- executors, probes and patchers ---------------------------------------------------------------


def _site(stores: Stores, resources: Resources, store: FileCheckpoints) -> Site:
    config = resources.config
    beneath = patches_beneath(stores.ledger, resources.base.digest)
    keeps = store.area == areas.CHECKPOINTS  # a replay neither keeps hidden states nor uses kept ones
    return Site(
        stores.blobs[areas.RECORDS],
        store.blobs,
        resources.base.directory,
        resources.base.digest,
        config.sisa.threads_per_shard,
        keyring=store.keyring,
        area=store.area,
        patches_at=stores.blobs[areas.PATCHES],
        patches=tuple((each.key, each.manifest_sha256) for each in beneath),
        precision=config.precision,
        hidden_states_at=stores.blobs[areas.HIDDEN_STATES],
        state_bytes=config.prefix_cache_bytes // config.sisa.shards if keeps else 0,
    )


def _patch_site(directory: Path, resources: Resources, stores: Stores, model: str) -> ports.PatchSite:
    return ports.PatchSite(
        vault_dir=(directory / areas.VAULT).absolute(),
        patches_at=absolute(stores.blobs[areas.PATCHES]),
        runs_dir=(directory / areas.RUNS).absolute(),
        base_dir=resources.base.directory.absolute(),
        base_digest=resources.base.digest,
        threads=resources.config.sisa.threads_per_shard,
        sequence_len=resources.config.sequence_len,
        vault_keyring=vault_keyring(resources.config, model),
        patches_keyring=stores.keyring,
        precision=resources.config.precision,
    )


def open_serial(site: Site, options: Mapping[str, Any]) -> ports.Executor:
    """Return an executor that trains chains in this process."""
    return SerialExecutor(open_trainer(site), *open_stores(site), options.get("lanes", 1))


def open_trainer(site: Site) -> ports.Trainer:
    """Return the trainer on a site's base, under the patches to train over. Raise IntegrityError."""
    from sisa.lm.train.lora import LoraTrainer

    store = FileCheckpoints(site.patches_at, site.keyring, areas.PATCHES)
    patches = [store.load(key, manifest) for key, manifest in site.patches]
    hidden_states = FileHiddenStates(site.hidden_states_at, site.keyring)
    return LoraTrainer(
        site.base_dir,
        site.base_digest,
        site.threads,
        patches,
        site.precision,
        hidden_states=hidden_states if site.state_bytes else None,
        state_bytes=site.state_bytes,
    )


def open_stores(site: Site) -> tuple[FileRecords, FileCheckpoints]:
    """Return the stores of a site: slices to read, checkpoints to write."""
    records = FileRecords(site.records_at, site.keyring)
    return records, FileCheckpoints(site.checkpoints_at, site.keyring, site.area)


def find_probe() -> OpenProbe:
    """Return the function that opens the probe of the base."""
    found: OpenProbe = upper_houses.load(upper_houses.PROBE)
    return found


@dataclass(frozen=True, slots=True)
class OnCluster:
    """An OpenExecutor: an executor by its name, at another address than the run file's."""

    name: str
    address: str

    def __call__(self, site: Site, options: Mapping[str, Any]) -> ports.Executor:
        return find_executor(self.name)(site, {**options, "address": self.address})


@dataclass(frozen=True, slots=True)
class _Auto:
    """An executor that trains on Ray, or a single chain in this process unless a cluster is named.

    Starting Ray takes longer than most shards of a deletion.
    """

    site: Site
    options: Mapping[str, Any]

    def run(self, chains: Sequence[Chain], report: Report, on_stage: ports.OnStage = silent) -> None:
        here = len(chains) == 1 and self.options.get("address") is None
        found = find_executor("serial" if here else "ray")(self.site, self.options)
        found.run(chains, report, on_stage)


def check_executor(executor: str | OpenExecutor) -> None:
    """Raise InvalidInput if no executor has this name. Nothing is loaded, since Ray takes seconds."""
    names = ["auto", "serial", *upper_houses.EXECUTORS]
    name = executor.name if isinstance(executor, OnCluster) else executor
    if isinstance(name, str) and name not in names:
        raise InvalidInput("unknown executor", expected=" or ".join(names), got=name)


def find_executor(executor: str | OpenExecutor) -> OpenExecutor:
    """Return an executor by its name, or the given one. Raise InvalidInput for an unknown name."""
    check_executor(executor)
    if not isinstance(executor, str):
        return executor
    if executor == "auto":
        return _Auto
    if executor == "serial":
        return open_serial
    found: OpenExecutor = upper_houses.load(upper_houses.EXECUTORS[executor])
    return found


def open_patcher(
    executor: str | OpenExecutor, site: ports.PatchSite, config: RunConfig
) -> ports.Patcher:
    """Return a patcher where an executor trains; an executor object counts as `serial`."""
    if isinstance(executor, OnCluster):
        cluster = config.cluster.model_copy(update={"address": executor.address})
        return open_patcher(executor.name, site, config.model_copy(update={"cluster": cluster}))
    name = executor if isinstance(executor, str) else "serial"
    if name == "auto":
        name = "ray" if config.cluster.address else "serial"
    if name not in upper_houses.PATCHERS:
        raise InvalidInput(
            "no executor of this name makes patches",
            expected=" or ".join(upper_houses.PATCHERS),
            got=name,
            next_step="name another executor",
        )
    found: ports.Patcher = upper_houses.load(upper_houses.PATCHERS[name])(site, config)
    return found


# --- keys and the witness -------------------------------------------------------------------------


def key_path(directory: Path, config: RunConfig, model: str) -> Path:
    """Return where a model's partition key belongs.

    An encrypted model's key is among its other keys: the directory alone can't question its ledger.
    """
    return config.sisa.partition_key_file or _key_places(directory, config, model)[0]


def _key_places(directory: Path, config: RunConfig, model: str) -> tuple[Path, Path]:
    """Return where a model's own key belongs, and where it was before encryption began or ended."""
    plain, encrypted = directory / KEY, keyrings(config) / model / KEY
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


def write_key(directory: Path, config: RunConfig, model: str, secret: bytes) -> None:
    """Write a model's own partition key where it belongs; a key file that is named is the user's."""
    belongs = key_path(directory, config, model)
    if config.sisa.partition_key_file is None and not belongs.is_file():
        write_secret(belongs, secret)


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


def keyrings(config: RunConfig) -> Path:
    """Return the directory of the keyrings of models with this run file, each under its model's name."""
    return (config.keyring or state_dir() / "keyrings").absolute()


def evidence_keys(config: RunConfig, model: str) -> Path:
    """Return the directory of the keys that sign a model's evidence."""
    return (config.signing.keys or state_dir() / "evidence-keys").absolute() / model


def open_keyring(config: RunConfig, name: str) -> ports.Keyring:
    """Return the keys of a model by its name; a model that is now plain may still have sealed files."""
    return FileKeyring(keyrings(config) / name, config.encrypt)


def vault_keyring(config: RunConfig, name: str) -> ports.Keyring:
    """Return the keys for what every model seals: the vault and unfinished patches."""
    return FileKeyring(keyrings(config) / name, seals=True)


# --- metrics --------------------------------------------------------------------------------------


def recording(report: Report, metrics: ports.Metrics, now: Callable[[], str]) -> Report:
    """Return a report that passes every event on and appends a line of metrics for some of them.

    Lines contain the name of the current run. The state of the queue is appended when it has changed.
    """
    run = (current_run() or new_run()).run
    last: QueueSeen | None = None

    def pass_on(event: Event) -> None:
        nonlocal last
        report(event)
        unchanged = isinstance(event, QueueSeen) and event == last
        last = event if isinstance(event, QueueSeen) else last
        if not unchanged and (made := metrics_line(event, now(), run)) is not None:
            metrics.append(made)

    return pass_on
