"""Describe the state of the model: its shards and slices, what they serve, and its exports.

This module writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sisa.core.domain import Kind, WitnessHead
from sisa.core.errors import IntegrityError
from sisa.core.ledger_meta import TRAINED_ANEW
from sisa.flows.answers.ask import prompt_form
from sisa.flows.answers.routing import HeldPrompts, held_prompts
from sisa.flows.context.consistency import BEGINNING
from sisa.flows.context.context import Context
from sisa.flows.context.plans import view_shards
from sisa.flows.context.served import model_digest, restricted_rows, restrictions, served_heads
from sisa.flows.context.stale_exports import by_directory, export_standing
from sisa.flows.requests import RequestView, views
from sisa.flows.restored_backup import WitnessStanding, witness_standing
from sisa.flows.wiring.ledger_place import ledger_name
from sisa.planning.cost import full_record_epochs
from sisa.planning.plan import serving_depth
from sisa.store.areas import CHECKPOINTS, HIDDEN_STATES, INDEX, RECORDS


@dataclass(frozen=True)
class ExportStatus:
    """Describe an export; `standing` is that of a stale one, and None for a clean one."""

    path: str
    shard: int  # the first one; -1: made before the records moved to other shards
    key: str
    adapter_sha256: str
    made_at: str
    state: str
    request_id: str
    standing: str | None
    shards: tuple[int, ...]  # several in a merged export


@dataclass(frozen=True)
class ShardStatus:
    """Describe a shard. Its head is None if it holds no records or serves the base for now."""

    shard: int
    head: str | None
    depth: int
    num_slices: int
    records: int
    slice_records: tuple[int, ...]
    converged: bool
    adapter_path: str | None
    adapter_sha256: str | None
    target: str | None = None  # the head once training is done
    num_stages: int = 0  # slices that hold records: the full `depth`
    served: str | None = None  # the head, unless that saw a restricted record; None: nothing
    served_depth: int = 0


@dataclass(frozen=True)
class SliceStanding:
    """Describe a slice of a shard.

    clean         served
    retrained     served, and trained again after a deletion since the model was last trained as a whole
    rolled back   not in the head until it is trained again
    restricted    in the head, which is not served
    """

    slice: int
    records: int
    state: Literal["clean", "retrained", "rolled back", "restricted", "empty"]


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
    shards: tuple[ShardStatus, ...]
    requests: tuple[RequestView, ...]
    sizes_bytes: dict[str, int]
    witness: tuple[str, WitnessStanding] = ("", "absent")  # its location, and its standing
    event_head: WitnessHead = BEGINNING  # the last link of the event log, and how many events
    exports: tuple[ExportStatus, ...] = ()
    num_orders: int = 1
    serving_depth: float = 1.0  # mean share of their slices that shards serve
    record_epochs_full: int = 0  # of training order 0 from scratch
    record_epochs_others: int = 0  # of training the other orders beside it
    checkpoint_budget_bytes: int | None = None
    checkpoint_bytes: int = 0  # of the stages that the ledger holds
    records_without_subject: int = 0
    form: Kind = "text"  # in which shards get prompts
    prompts: HeldPrompts | None = None
    restricted_subjects: int = 0  # whose records are stored and not served
    restricted_records: int = 0


def status_of(context: Context, directory: Path, base: str, embedder: str) -> Status:
    """Return the state of a model; `base` and `embedder` are their names."""
    exports = tuple(export_statuses(context))
    prompts = held_prompts(context)
    kept = [HIDDEN_STATES] if context.settings.config.prefix_cache_bytes else []
    areas = (RECORDS, INDEX, CHECKPOINTS, *kept)
    sizes = {area: context.stores.blobs[area].num_bytes("") for area in areas}
    ledger, recipe, own = context.stores.ledger, context.recipe, context.settings.config.sisa
    with ledger.snapshot():
        shards = view_shards(context, [head.shard for head in ledger.heads()])
        full = full_record_epochs(shards, recipe)
        return Status(
            directory=str(directory),
            records=sum(ledger.counts().values()),
            deleted_records=ledger.num_tombstones(),
            model_digest=model_digest(context),
            base_model=base,
            base_digest=context.settings.base,
            embedder=embedder,
            schedule=own.schedule,
            shards=tuple(shard_statuses(context)),
            requests=tuple(views(context)),
            exports=exports,
            sizes_bytes={ledger_name(directory): ledger.num_bytes(), **sizes},
            witness=(context.stores.witness.location(), witness_standing(context)),
            event_head=ledger.event_head(),
            num_orders=1 + len(recipe.other_orders),
            serving_depth=serving_depth(served_heads(ledger), shards),
            record_epochs_full=full,
            checkpoint_budget_bytes=own.checkpoint_budget_bytes,
            records_without_subject=ledger.num_without_subject()[0],
            checkpoint_bytes=sum(each.num_bytes for shard in shards for each in shard.held),
            record_epochs_others=full_record_epochs(shards, recipe, recipe.other_orders) - full,
            form=prompt_form(context),
            prompts=prompts,
            restricted_subjects=len(restrictions(ledger).since),
            restricted_records=len(restricted_rows(ledger)),
        )


def export_statuses(context: Context) -> list[ExportStatus]:
    """Return all exports that the ledger lists, with the standing of stale ones.

    A merged export, which has a row for each of its shards in the ledger, is returned once.
    """
    return [
        ExportStatus(
            path=first.path,
            shard=first.shard,
            key=first.key,
            adapter_sha256=first.adapter_sha256,
            made_at=first.made_at,
            state=first.state,
            request_id=first.request_id,
            standing=export_standing(context, first) if first.stale else None,
            shards=shards,
        )
        for (first, *_), shards in by_directory(context.stores.ledger.exports())
    ]


def shard_statuses(context: Context) -> list[ShardStatus]:
    """Return the state of every shard, in order."""
    ledger = context.stores.ledger
    counts: dict[int, dict[int, int]] = {}
    for file in ledger.slices():
        counts.setdefault(file.shard, {})[file.slice] = file.num_records
    held = {each.key: each for each in ledger.checkpoints()}
    appended = max((slice_ + 1 for found in counts.values() for slice_ in found), default=0)
    num_slices = max(context.recipe.num_slices, appended)
    if any(head.key not in held for head in ledger.heads() if head.key is not None):
        raise IntegrityError(
            "the ledger lacks a checkpoint that it serves",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    return [
        ShardStatus(
            shard=head.shard,
            head=head.key,
            depth=head.depth,
            num_slices=num_slices,
            records=sum(sizes.values()),
            slice_records=tuple(sizes.get(slice_, 0) for slice_ in range(num_slices)),
            converged=head.converged,
            adapter_path=context.stores.checkpoints.location(head.key) if head.key else None,
            adapter_sha256=held[head.key].adapter_sha256 if head.key else None,
            target=head.target,
            num_stages=sum(map(bool, sizes.values())),
            served=serves.key,
            served_depth=serves.depth,
        )
        for head, serves in zip(ledger.heads(), served_heads(ledger), strict=True)
        for sizes in [counts.get(head.shard, {})]
    ]


def shards_with_slices(context: Context) -> list[tuple[ShardStatus, list[SliceStanding]]]:
    """Return the state of every shard, and the standing of each of its slices."""
    ledger = context.stores.ledger
    prefixes = {each.key: each.prefix for each in ledger.checkpoints()} | {None: ()}
    since = ledger.meta().get(TRAINED_ANEW, "")
    first: dict[int, int] = {}  # slice that a deletion retrained, by shard
    for request in ledger.requests():
        for shard, slice_, _ in request.shards if request.committed_at > since else ():
            first[shard] = min(slice_, first.get(shard, slice_))
    found = []
    for each in shard_statuses(context):
        again = first.get(each.shard)
        slices = [
            _standing(slice_, size, prefixes[each.head], prefixes[each.served], again)
            for slice_, size in enumerate(each.slice_records)
        ]
        found.append((each, slices))
    return found


def _standing(
    slice_: int, size: int, trained: Sequence[int], served: Sequence[int], retrained: int | None
) -> SliceStanding:
    if not size:
        return SliceStanding(slice_, size, "empty")
    if slice_ not in served:
        return SliceStanding(slice_, size, "restricted" if slice_ in trained else "rolled back")
    again = retrained is not None and slice_ >= retrained
    return SliceStanding(slice_, size, "retrained" if again else "clean")
