"""Delete records exactly, for any number of requests at once, or plan a deletion without doing it.

    commit what remains, with heads rolled back -> probe the base -> reconcile -> finish

One transaction removes the rows, leaves tombstones, moves the heads to their deepest clean checkpoints,
and makes the rewritten slices and indexes current. If a file that is needed is damaged, the deletion
stops before that commit. Other artefacts made from records join through hooks (`core/hooks.py`).

Deleting records from shards does not affect what the frozen base knew before. So once the served model
is clean, and before the text is erased, the base alone is asked whether it produces that text; numbers
alone are kept with the request. A deletion that is interrupted before the probe is finished without it,
since the text is erased first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from sisa.core.domain import RecordRow, SliceFile, SliceState, Tombstone
from sisa.core.errors import SisaError
from sisa.core.events import Notice
from sisa.core.hooks import Contribution, Removal
from sisa.core.ledger_meta import HELD_PROMPTS
from sisa.core.patches import active, wanted
from sisa.core.ports import Change, KeptVersions, Probe, merged
from sisa.core.requests import COMMITTED, Probed, Request, RequestEvent
from sisa.flows.context.commit import commit
from sisa.flows.context.consistency import check_rows
from sisa.flows.context.context import Context
from sisa.flows.context.plans import check_sources, plans_of
from sisa.flows.context.served import model_digest
from sisa.flows.context.slices import SlicePosition, held_rows, slices_of, stored_in, write_shard
from sisa.flows.reconcile import adopt_and_erase, note_failure, reconcile, under_way
from sisa.planning.cost import full_record_epochs
from sisa.planning.hidden_state_files import states_names
from sisa.planning.layout import root_of
from sisa.planning.plan import ShardPlan, ShardView, serving_depth, tainted_checkpoints, tainted_exports

_Placed = TypeVar("_Placed", RecordRow, SliceState)


@dataclass(frozen=True)
class ForgetPlan:
    """What a deletion would do: numbers and keys alone.

    `estimated_seconds` is for one worker; None if it is not estimated, or nothing was measured yet.
    """

    removed: tuple[RecordRow, ...]
    already_deleted: tuple[Tombstone, ...]
    plans: tuple[ShardPlan, ...]
    remaining: tuple[SliceState, ...]  # new states of the slices that lose records
    emptied: tuple[SlicePosition, ...]
    tainted: tuple[str, ...]
    exports: tuple[str, ...]  # paths of those that these records touched
    record_epochs_retrained: int
    record_epochs_full: int
    record_epochs_others: int  # of the stages of the other orders
    serving_depth: float  # after the commit: mean share of its slices that each shard serves
    estimated_seconds: float | None = None

    @property
    def num_slice_files(self) -> int:
        """Return how many slice files are erased."""
        return len(self.remaining) + len(self.emptied)

    @property
    def served(self) -> tuple[tuple[int, int, int], ...]:
        """Return what heads serve after the commit: (shard, slices, of how many)."""
        return tuple((plan.shard, plan.head.depth, len(plan.path)) for plan in self.plans)

    @cached_property
    def stages_retrained(self) -> Mapping[int, int]:
        """Return how many stages each shard trains again."""
        return {plan.shard: len(plan.train) for plan in self.plans}

    @cached_property
    def first_slices(self) -> Mapping[int, int]:
        """Return the earliest slice of each shard that loses a record."""
        return _first_slices(self.removed)


def plan_forget(
    context: Context, rows: Sequence[RecordRow], already: Sequence[Tombstone] = ()
) -> ForgetPlan:
    """Return what deleting these rows would do. Read only the shards concerned; change nothing."""
    ledger = context.stores.ledger
    changed = _changed_slices(context, rows)
    slices = {(file.shard, file.slice): file for file in ledger.slices()} | changed
    left = _by_shard(state for _, state in sorted(slices.items()) if state)
    touched: list[ShardView] = []
    tainted: list[str] = []
    for shard, removed in sorted(_by_shard(rows).items()):
        checkpoints = ledger.checkpoints(shard)
        lost = tainted_checkpoints(checkpoints, removed)
        held = tuple(each for each in checkpoints if each.key not in lost)
        touched.append(ShardView(shard, tuple(left.get(shard, ())), held))
        tainted += lost
    plans = plans_of(context, touched)
    views = [ShardView(shard, tuple(states), ()) for shard, states in left.items()]
    heads = {head.shard: head for head in ledger.heads()}
    heads |= {plan.shard: plan.head for plan in plans}
    return ForgetPlan(
        removed=tuple(rows),
        already_deleted=tuple(already),
        plans=tuple(plans),
        remaining=tuple(filter(None, changed.values())),
        emptied=tuple(position for position, state in changed.items() if not state),
        tainted=tuple(tainted),
        exports=tuple(dict.fromkeys(e.path for e in tainted_exports(ledger.exports(), {"": rows}))),
        record_epochs_retrained=sum(plan.record_epochs for plan in plans),
        record_epochs_full=full_record_epochs(views, context.recipe),
        record_epochs_others=sum(plan.record_epochs_others for plan in plans),
        serving_depth=serving_depth(heads.values(), views),
    )


def _first_slices(rows: Iterable[RecordRow]) -> dict[int, int]:
    """Return the earliest slice of each shard that loses a record."""
    by_shard = sorted(_by_shard(rows).items())
    return {shard: min(row.slice for row in removed) for shard, removed in by_shard}


def _by_shard(placed: Iterable[_Placed]) -> dict[int, list[_Placed]]:
    found: dict[int, list[_Placed]] = {}
    for each in placed:
        found.setdefault(each.shard, []).append(each)
    return found


def _changed_slices(
    context: Context, removed: Sequence[RecordRow]
) -> dict[SlicePosition, SliceState | None]:
    """Return the new states of the slices that lose records; None for a slice that becomes empty."""
    gone = {row.id_digest for row in removed}
    states: dict[SlicePosition, SliceState | None] = {}
    for shard, slice_ in sorted({(row.shard, row.slice) for row in removed}):
        left = [each for each in context.stores.ledger.contents(shard, slice_) if each[0] not in gone]
        states[shard, slice_] = SliceState(shard, slice_, root_of(left), len(left)) if left else None
    return states


@dataclass(frozen=True)
class Deleted:
    """Hold a finished deletion: its requests, and old versions of erased objects that a bucket keeps."""

    requests: tuple[Request, ...] = ()
    old_versions_kept: tuple[KeptVersions, ...] = ()


@dataclass(frozen=True)
class ForgetOutcome:
    """What a deletion did; `request` is None when every named record was deleted already."""

    request: Request | None
    already_deleted: tuple[Tombstone, ...]
    model_digest: str
    exports_missing: tuple[str, ...] = ()  # stale, and not where they were written
    old_versions_kept: tuple[KeptVersions, ...] = ()  # that a bucket keeps of what was erased
    deferred: bool = False  # training is left to a later command


class Overtaken(Exception):
    """Raised when somebody decided about a request after it was read; nothing was committed."""


def retry_overtaken(attempt: Callable[[], Deleted]) -> Deleted:
    """Repeat a deletion, which reads the requests again, until it is not overtaken."""
    while True:
        with contextlib.suppress(Overtaken):
            return attempt()


def delete(context: Context, removal: Removal, addition: Change, *, defer: bool = False) -> Deleted:
    """Carry out approved requests as one batch, exactly.

    The served model is clean after the commit; in the end the bytes are gone and the affected suffixes
    are retrained. Raise the errors of the effects; a failure before the commit leaves the requests
    failed, with the type of the error as the cause. Raise Overtaken if somebody cancelled, held or
    extended one of the requests, or held its records, before the commit.
    """
    held = slices_of(context, removal.rows.values())
    try:
        contributed = _commit_or_note(context, removal, addition)  # the served model is clean
        _probe_removed(context, removal.named, held)  # before the text is erased
        _keep_states(context, removal.rows, held)
    except Overtaken:
        adopt_and_erase(context)  # the files that were written for the commit
        raise
    except SisaError:
        with contextlib.suppress(SisaError):  # what can be erased after the commit is erased anyway
            if under_way(context):
                adopt_and_erase(context)
        raise
    done = reconcile(context, defer=defer, removed=removal.named)  # erase, train, complete
    for each in contributed:
        each.finish()
    after = {each.request_id: each for each in context.stores.ledger.requests()}
    requests = tuple(after[each.request_id] for each in removal.requests)
    return Deleted(requests, done.old_versions_kept)


def _commit_or_note(context: Context, removal: Removal, addition: Change) -> list[Contribution]:
    """Commit, or record a failure with those of the requests that the ledger held before."""
    try:
        return commit_removed(context, removal, addition)
    except SisaError as error:
        note_failure(context, removal.requests, error)
        raise


def _probe_removed(
    context: Context, named: Mapping[str, Sequence[RecordRow]], held: Sequence[SliceFile]
) -> None:
    """Probe the base for the records that each request removed, and keep the outcome with the request.

    A failed probe must not keep the text: its error's type is kept, and the deletion continues. A text
    in the vault leaves it if all of it was probed and the base knows none of it, unless a patch that is
    active or wanted was to forget the same text.
    """
    if context.compute.probe is None or not any(named.values()):
        return
    context.report(Notice("asking the base alone what it knows of the deleted text"))
    outcomes = {
        request_id: _probe_rows(context, context.compute.probe, rows, held)
        for request_id, rows in named.items()
        if rows
    }
    with context.stores.ledger.exclusive():
        asked = [
            replace(request, probed=outcomes[request.request_id])
            for request in context.stores.ledger.requests()
            if request.request_id in outcomes
        ]
        patches = context.stores.ledger.patches()
        needed = {name for each in (*active(patches), *wanted(patches)) for name in each.job.sets}
        vaulted = [each for each in asked if each.vaulted and each.vaulted not in needed]
        unknown = [each.vaulted for each in vaulted if _base_knows_nothing(outcomes[each.request_id])]
        changed = [replace(each, vaulted="") if each.vaulted in unknown else each for each in asked]
        commit(context, Change(requests=changed, unvaulted=unknown))


def _keep_states(context: Context, removed: Collection[str], held: Sequence[SliceFile]) -> None:
    """Copy the kept hidden states of records that stay to the files of their rewritten slices.

    They are a cache: what is not copied is computed again.
    """
    if not context.settings.config.prefix_cache_bytes:
        return
    store = context.stores.hidden_states
    with contextlib.suppress(SisaError):
        for before in held:
            files = context.stores.ledger.slices(before.shard)
            after = [each for each in files if each.slice == before.slice and each.root != before.root]
            for new in states_names(after, context.recipe, context.compute.fingerprint):  # one or none
                (old,) = states_names([before], context.recipe, context.compute.fingerprint)
                states = store.read(old)
                if staying := {each: states[each] for each in states if each not in removed}:
                    store.write(new, staying)


def _base_knows_nothing(outcome: Probed) -> bool:
    """Return whether all of the text was probed and the base knows none of it: no patch is needed."""
    return not outcome.failure and outcome.num_known == 0 and outcome.num_probed == outcome.num_records


def _probe_rows(
    context: Context, probe: Probe, rows: Sequence[RecordRow], held: Sequence[SliceFile]
) -> Probed:
    try:
        return probe([stored.record for stored in stored_in(context, held, rows)])
    except Exception as error:  # whatever failed, the text must go
        return Probed(len(rows), failure=type(error).__name__)


def rows_named(context: Context, request: Request) -> list[RecordRow]:
    """Return the held records that a request names."""
    return held_rows(context, context.stores.ledger.named_by(request.request_id))


def commit_removed(
    context: Context, removal: Removal, addition: Change, *, held_too: bool = False
) -> list[Contribution]:
    """Commit what remains: rows are removed, heads roll back; return the contributions of hooks.

    `addition` joins the transaction; `held_too` also deletes records under a legal hold.
    Raise Overtaken if somebody decided about the requests meanwhile, IntegrityError for damaged files.
    """
    check_rows(context.stores.ledger)
    rows = removal.rows
    contributed = [hook.contribute(context, removal) for hook in context.hooks]
    planned = plan_forget(context, list(rows.values()))
    if planned.removed:
        check_sources(context, planned.plans)
    vaulted = {key: name for each in contributed for key, name in each.vaulted.items()}
    written = _write_remaining(context, planned)
    removing = _removing(context, removal, planned, vaulted)
    added = replace(addition, requests=())  # `removing` has them, committed already
    change = merged([*(each.change for each in contributed), added, written, removing])
    with context.stores.ledger.exclusive():
        if not held_too and _is_overtaken(context, removal):
            raise Overtaken
        commit(context, change)
    return contributed


def _is_overtaken(context: Context, removal: Removal) -> bool:
    """Return whether a request has changed since it was read, or its records are under a hold."""
    present = {each.request_id: each for each in context.stores.ledger.requests()}
    changed = any(present.get(each.request_id, each) != each for each in removal.requests)
    return changed or bool(legal_holds(context, removal.rows))


def _removing(
    context: Context, removal: Removal, planned: ForgetPlan, vaulted: Mapping[str, str]
) -> Change:
    """Return the transaction of a deletion, except its rewritten files."""
    now, before = context.now(), model_digest(context)
    committed = [
        _committed(each, planned, removal.named[each.request_id], now, before, vaulted)
        for each in removal.requests
    ]
    return Change(
        removed=planned.removed,
        unidentified=_unidentified(removal),
        tombstones=_tombstones(context, planned, removal.named, now),
        emptied=planned.emptied,
        unindexed=[plan.shard for plan in planned.plans if not plan.path],
        heads=[plan.head for plan in planned.plans],
        dropped=planned.tainted,
        exports=tainted_exports(context.stores.ledger.exports(), removal.named),
        requests=committed,
        events=[RequestEvent(each.request_id, state, now) for each in committed for state in COMMITTED],
        meta={HELD_PROMPTS: "null"},  # it is noted again when all is done
    )


def _unidentified(removal: Removal) -> list[str]:
    """Return the removed records whose identities go; under the Delete Act they keep persons out."""
    kept = [each.request_id for each in removal.requests if each.regime == "delete-act"]
    staying = {row.id_digest for request_id in kept for row in removal.named[request_id]}
    return sorted(removal.rows.keys() - staying)


def _write_remaining(context: Context, planned: ForgetPlan) -> Change:
    """Write the slices that lose records, and the indexes of shards that still hold some.

    Return the change that makes them current.
    """
    gone = {row.id_digest for row in planned.removed}
    written = []
    for shard in (plan.shard for plan in planned.plans if plan.path):
        rows = [row for row in context.stores.ledger.rows(shard) if row.id_digest not in gone]
        left = [state.slice for state in planned.remaining if state.shard == shard]
        written.append(write_shard(context, shard, rows, left))
    return merged(written)


def legal_holds(context: Context, records: Collection[str]) -> list[str]:
    """Return the held requests that name one of these records, given by keyed id."""
    ledger, records = context.stores.ledger, frozenset(records)
    held = [each.request_id for each in ledger.requests() if each.state == "held"]
    return [each for each in held if not records.isdisjoint(ledger.named_by(each))]


def _committed(
    request: Request,
    planned: ForgetPlan,
    rows: Sequence[RecordRow],
    now: str,
    before: str,
    vaulted: Mapping[str, str],
) -> Request:
    first = _first_slices(rows)
    return replace(
        request,
        state="rolled_back",
        cause="",
        committed_at=now,
        num_records=len(rows),
        shards=tuple(
            (shard, slice_, planned.stages_retrained[shard]) for shard, slice_ in first.items()
        ),
        record_epochs_retrained=planned.record_epochs_retrained,
        record_epochs_full=planned.record_epochs_full,
        record_epochs_others=planned.record_epochs_others,
        served=tuple(each for each in planned.served if each[0] in first),
        serving_depth=planned.serving_depth,
        model_digest_before=before,
        vaulted=vaulted.get(request.request_id, ""),
    )


def _tombstones(
    context: Context, planned: ForgetPlan, named: Mapping[str, Sequence[RecordRow]], now: str
) -> list[Tombstone]:
    by_record = {row.id_digest: request for request, rows in named.items() for row in rows}
    held = {plan.shard: context.stores.ledger.checkpoints(plan.shard) for plan in planned.plans}
    return [
        Tombstone(
            id_digest=row.id_digest,
            subject_digest=row.subject_digest,
            text_digest=row.text_digest,
            shard=row.shard,
            slice=row.slice,
            request_id=by_record[row.id_digest],
            deleted_at=now,
            checkpoints_erased=len(tainted_checkpoints(held[row.shard], [row])),
        )
        for row in planned.removed
    ]
