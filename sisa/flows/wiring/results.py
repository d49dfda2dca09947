"""Define what a model returns about itself and about a deletion, as plain values.

Nothing here computes. A field that was added later has a default.
"""

from __future__ import annotations

from dataclasses import dataclass

from sisa.core.domain import Kind, Request, Tombstone, WitnessHead
from sisa.core.ports import KeptVersions
from sisa.flows import query
from sisa.flows.deletion import Forgetting
from sisa.flows.reconcile import BEGINNING, HeldPrompts
from sisa.flows.wiring.witness import WitnessStanding


@dataclass(frozen=True)
class Status:
    """A model at a glance; sizes in bytes."""

    directory: str
    records: int
    deleted_records: int
    model_digest: str
    base_model: str
    base_digest: str
    embedder: str
    schedule: str
    shards: tuple[query.ShardStatus, ...]
    requests: tuple[Request, ...]
    sizes_bytes: dict[str, int]
    # where it rests, and how it stands to the ledger
    witness: tuple[str, WitnessStanding] = ("", "absent")
    event_head: WitnessHead = BEGINNING  # the last link of the event log, and how many events
    exports: tuple[query.ExportStatus, ...] = ()
    num_orders: int = 1
    serving_depth: float = 1.0  # mean share of their slices that shards serve
    record_epochs_full: int = 0  # of training order 0 from scratch
    record_epochs_others: int = 0  # of training the other orders beside it
    checkpoint_budget_bytes: int | None = None
    checkpoint_bytes: int = 0  # of the stages that the ledger holds
    records_without_subject: int = 0
    form: Kind = "text"  # in which prompts are put to shards
    prompts: HeldPrompts | None = None
    restricted_subjects: int = 0  # whose records are stored and not served
    restricted_records: int = 0


@dataclass(frozen=True)
class ForgetPlan:
    """What a deletion would do; `estimated_seconds` is for one worker, None before any measurement."""

    forgetting: Forgetting
    estimated_seconds: float | None
    slice_files_erased: int
    index_rows_erased: int


@dataclass(frozen=True)
class ForgetOutcome:
    """What a deletion did; `request` is None when every named record was deleted already."""

    request: Request | None
    already_deleted: tuple[Tombstone, ...]
    model_digest: str
    exports_missing: tuple[str, ...] = ()  # stale, and not where they were written
    kept: tuple[KeptVersions, ...] = ()  # old versions of what was erased that a bucket keeps
    deferred: bool = False  # training is left to a later command
