"""The effects that patches need, as Protocols: the vault, and whoever makes a patch.

Rules: as `ports.py`. This package names these; `approx/` makes patches, found by entry point.

Not covered: the ledger's rows of patches (`ports.Ledger`) and their files (`ports.CheckpointStore`).

>>> PatchMade(None, unfinished=True, report={}).saved is None
True
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sisa.core.blob_ports import BlobStore
from sisa.core.domain import Record, SavedCheckpoint
from sisa.core.events import Report
from sisa.core.patch import Patch, PatchJob, VaultSet
from sisa.core.ports import Keyring
from sisa.core.precision import DEFAULT_PRECISION, Precision


class Vault(Protocol):
    """Sets of texts that a patch is to be made from: always sealed, by keys outside the model."""

    def put(self, name: str, records: Sequence[Record]) -> tuple[str, int]:
        """Store a set whole or not at all; sha256 and number of bytes of its plaintext."""

    def read(self, found: VaultSet) -> tuple[Record, ...]:
        """The records in the order they were put, after checking the bytes."""

    def check(self, found: VaultSet) -> None:
        """Checks the bytes without parsing them."""

    def held(self) -> frozenset[str]:
        """Names of all files and of all keys, left-over temporaries among them."""

    def erase(self, names: Collection[str]) -> None:
        """Remove, the keys first; absent names are no error."""


class PatchDrafts(Protocol):
    """What unfinished runs put aside, sealed by the vault's keyring, by the keys of their patches."""

    def held(self) -> frozenset[str]:
        """Names of all of them and of all keys, left-over temporaries among them."""

    def erase(self, keys: Collection[str]) -> None:
        """Remove, the keyring's keys first; absent ones are no error."""


@dataclass(frozen=True, slots=True)
class PatchOrder:
    """A patch to make: the sets that its job names, and the patches beneath it, lowest first.

    After `max_seconds` the run is put aside, to be gone on with by an order for the same job.
    `reference` names a model that never saw what is forgotten, to be measured beside the patch.
    """

    job: PatchJob
    sets: tuple[VaultSet, ...]
    beneath: tuple[Patch, ...]
    max_seconds: float | None = None
    reference: str = ""


@dataclass(frozen=True, slots=True)
class PatchMade:
    """How an order ended. `saved` is None when nothing was made: out of time, or no step was good."""

    saved: SavedCheckpoint | None
    unfinished: bool
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PatchSite:
    """Where patches are made: absolute paths and names, so that it can travel to another process.

    `runs_dir` is where unfinished runs are put aside, sealed by the vault's keyring.
    """

    vault_dir: Path
    patches_at: BlobStore
    runs_dir: Path
    base_dir: Path
    base_digest: str
    threads: int
    sequence_len: int
    vault_keyring: Keyring
    patches_keyring: Keyring
    precision: Precision = (
        DEFAULT_PRECISION  # of the shards; patches are made on the CPU in float32 alone
    )


class Patcher(Protocol):
    """Makes patches, approximately; the files go to the patches' store. What a finished run put aside is
    erased by the caller."""

    def refuse(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        """Raises InvalidInput for settings or sets that no patch can be made from, or a reference that
        can't be measured beside it, all problems listed; a retain set of None is one that the base
        writes."""

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """Make a patch, or go on with one. Raises what reading and the machine raise."""
