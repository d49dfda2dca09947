"""Define an open model as flows use it.

`wiring/` builds a `Context` from real parts, tests from fakes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sisa.config.config import RunConfig
from sisa.core import ports
from sisa.core.digest import patched_digest
from sisa.core.domain import BaseFiles, Record
from sisa.core.errors import IntegrityError
from sisa.core.event_chain import EventChain
from sisa.core.events import Report
from sisa.core.hooks import DeletionHook
from sisa.core.ledger_meta import TRAINED_OVER
from sisa.core.patches import Patch
from sisa.planning.layout import Assigner
from sisa.planning.plan import Recipe


@dataclass(frozen=True)
class Stores:
    """The stores of a model."""

    ledger: ports.Ledger
    witness: ports.Witness
    records: ports.RecordStore
    checkpoints: ports.CheckpointStore
    index: ports.RecordIndex
    keyring: ports.Keyring
    exports: ports.ExportStore
    metrics: ports.Metrics
    patches: ports.CheckpointStore
    vault: ports.Vault
    patch_drafts: ports.StoredFiles  # of patches that are being made, by the key of their patch
    hidden_states: ports.HiddenStateStore
    blobs: Mapping[str, ports.BlobStore] = field(default_factory=dict)  # by area; fakes have none


@dataclass(frozen=True)
class Compute:
    """The computing parts of a model; heavy ones are opened on first use."""

    embedder: Callable[[], ports.Embedder]
    base: Callable[[], BaseFiles]
    tokenizer: Callable[[], Any]  # of the base
    count_tokens: Callable[[Sequence[Record]], Sequence[int]]
    executor_for: Callable[[ports.CheckpointStore], ports.Executor]
    patcher: Callable[[], ports.Patcher]
    fingerprint: str  # of the numerics that all of it runs under
    probe: ports.Probe | None = None


@dataclass(frozen=True)
class Settings:
    """The run file, and what it makes of the partition key and the base."""

    config: RunConfig
    assigner: Assigner
    unpatched_recipe: Recipe  # of shards over the frozen base alone; flows use `Context.recipe`
    chain: EventChain  # of the ledger's events

    @property
    def base(self) -> str:
        """Return the digest of the frozen base."""
        return self.unpatched_recipe.base


@dataclass(frozen=True)
class Context:
    """An open model, as flows use it."""

    stores: Stores
    compute: Compute
    settings: Settings
    now: Callable[[], str]
    report: Report
    hooks: tuple[DeletionHook[Context], ...] = ()

    @property
    def recipe(self) -> Recipe:
        """Return what all jobs share, over the patches beneath the shards. Raise IntegrityError."""
        return self.recipe_over(patches_beneath(self.stores.ledger, self.settings.base))

    def recipe_over(self, stack: Iterable[Patch]) -> Recipe:
        """Return what all jobs share once the shards are trained over these patches, lowest first."""
        adapters = [each.adapter_sha256 for each in stack]
        base = patched_digest(self.settings.base, adapters)
        return replace(self.settings.unpatched_recipe, base=base)


def trained_over(ledger: ports.Ledger) -> tuple[str, ...]:
    """Return the keys of the patches over which the shards are trained, lowest first."""
    return tuple(json.loads(ledger.meta().get(TRAINED_OVER, "[]")))


def patches_beneath(ledger: ports.Ledger, base: str) -> list[Patch]:
    """Return the patches over which shards are trained, lowest first; none if the base has changed."""
    keys = trained_over(ledger)
    if not keys:
        return []
    patches = {each.key: each for each in ledger.patches() if each.manifest_sha256}
    if absent := [key for key in keys if key not in patches]:
        raise IntegrityError(
            "the ledger lacks patches that shards are trained over",
            got=f"{len(absent)} of {len(keys)}",
            next_step="restore the model directory from a backup",
        )
    found = [patches[key] for key in keys]
    return found if all(each.job.base == base for each in found) else []


def patch_files(store: ports.CheckpointStore, stack: Iterable[Patch]) -> list[dict[str, bytes]]:
    """Return the files of patches in order, after checking them. Raise IntegrityError."""
    return [store.load(each.key, each.manifest_sha256) for each in stack]
