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

`store/areas.py` describes the storage areas. If the model has evidence, the hook that issues
certificates is found by name (`upper_houses.py`).
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core import ports
from sisa.core.digest import Keyed
from sisa.core.domain import Record
from sisa.core.event_chain import EventChain
from sisa.core.events import Report, silent
from sisa.core.hooks import DeletionHook
from sisa.core.patches import active
from sisa.core.requests import Probed
from sisa.flows.chains import Site
from sisa.flows.context.context import Compute, Context, Settings, Stores, patch_files, patches_beneath
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.wiring import upper_houses
from sisa.flows.wiring.description import describe
from sisa.flows.wiring.executors import OpenExecutor, find_executor, find_probe, open_patcher
from sisa.flows.wiring.keys import evidence_keys_dir, open_keyring, vault_keyring, witness_of
from sisa.flows.wiring.ledger_place import open_ledger
from sisa.flows.wiring.resources import Resources
from sisa.lm.base.numerics import fingerprint
from sisa.planning.layout import Assigner
from sisa.store import areas
from sisa.store.blobs.local_blobs import absolute
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.exports import DirectoryExports
from sisa.store.hidden_states import FileHiddenStates
from sisa.store.index import FaissIndex
from sisa.store.metrics import FileMetrics, recording
from sisa.store.records import FileRecords
from sisa.store.vault import FilePatchDrafts, FileVault

EVIDENCE = "evidence.sqlite"
HOOKS: tuple[DeletionHook[Context], ...] = (PatchesHook(),)  # called on a deletion, in this order


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
            config,
            assigner=Assigner(keyed, config.layout),
            unpatched_recipe=config.recipe(resources.base_digest),
            chain=EventChain.of(keyed, ledger.meta().get("key")),
        )
        compute = _compute(directory, resources, stores, model, executor)
        noting = recording(report, stores.metrics, _now)
        hooks = (*evidence_hooks(directory, config, model), *HOOKS)  # evidence sees what is before all
        context = Context(stores, compute, settings, _now, noting, hooks)
        _ = context.recipe  # refuses a ledger that lacks a patch beneath its shards
        yield context


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
        patch_drafts=FilePatchDrafts(directory / areas.RUNS, vaults),
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
        return find_probe()(base, config, files)(records)

    return Compute(
        embedder=lambda: resources.embedder,
        base=lambda: resources.base,
        tokenizer=lambda: resources.tokenizer,
        count_tokens=resources.count_tokens,
        executor_for=executor_for,
        patcher=lambda: open_patcher(executor, _patch_site(directory, resources, stores, model), config),
        fingerprint=fingerprint(config.sisa.threads_per_shard, config.precision),
        probe=probe if config.probe else None,
    )


def has_evidence(directory: Path, config: RunConfig, model: str) -> bool:
    """Return whether deletions are certified: the model has signing keys or earlier evidence."""
    return evidence_keys_dir(config, model).is_dir() or (directory / EVIDENCE).exists()


def evidence_hooks(directory: Path, config: RunConfig, model: str) -> tuple[DeletionHook[Context], ...]:
    """Return the hook that issues certificates, if deletions are certified."""
    if not has_evidence(directory, config, model):
        return ()
    return (pkgutil.resolve_name(upper_houses.EVIDENCE_HOOK)(directory, config, model),)


def open_as_it_is(directory: Path) -> AbstractContextManager[Context]:
    """Open a model without its lock, whether or not it has caught up with its witness."""
    found = describe(directory)
    resources = Resources(found.config, found.base, found.embedder)
    return open_context(directory, resources, Keyed(found.secret), found.id, "serial", silent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _site(stores: Stores, resources: Resources, store: FileCheckpoints) -> Site:
    config = resources.config
    beneath = patches_beneath(stores.ledger, resources.base.digest)
    keeps = store.area == areas.CHECKPOINTS  # a replay neither keeps hidden states nor uses kept ones
    return Site(
        stores.blobs[areas.RECORDS],
        store.blobs,
        resources.base,
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
        base=resources.base.absolute(),
        threads=resources.config.sisa.threads_per_shard,
        sequence_len=resources.config.sequence_len,
        vault_keyring=vault_keyring(resources.config, model),
        patches_keyring=stores.keyring,
        precision=resources.config.precision,
    )
