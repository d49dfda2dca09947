"""Bring what is held to its target, whatever happened before.

    adopt    stages that an interrupted run stored for the present targets
    erase    every file that the ledger does not list (tainted, retired, half-written), its key first,
             and exports that contain what a deletion removed
    hooks    bring what they keep in line with what remains
    train    what the targets lack: each stored stage is recorded and moves its shard's head
    close    requests whose shards have reached their targets; hooks do what follows
    train    what the other orders lack, one order of all shards after another
    note     how the prompts of held records would be routed
    retire   clean checkpoints that are neither on any order's path nor a head
    scrub    the ledger's own pages

Every step looks at what is there, not at what was done, so the next reconciliation recovers from a crash
anywhere. Training can be deferred: then the heads serve what is clean and held until another command
trains. The flows decide beforehand what remains (`ingest.py`, `deletion.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sisa.core.domain import (
    Chain,
    HeldCheckpoint,
    RecordRow,
    SavedCheckpoint,
    SliceFile,
    SliceJob,
    record_epochs,
)
from sisa.core.errors import IntegrityError, SisaError, all_tried
from sisa.core.events import DeletionCompleted, ErasureFailed, Notice, SliceTrained, TrainingStarted
from sisa.core.ports import Change, KeptVersions
from sisa.core.requests import Request, RequestState, completed, event, is_under_way
from sisa.flows.answers.routing import HeldPrompts, held_prompts
from sisa.flows.context.areas import known_by_area, purge, stores_by_area
from sisa.flows.context.commit import commit
from sisa.flows.context.consistency import check_since_last_time
from sisa.flows.context.context import Context
from sisa.flows.context.plans import plan_of, plans_of, retired, view_shard, view_shards
from sisa.flows.context.served import model_digest
from sisa.flows.context.stale_exports import (
    count_by_request,
    erase_stale_exports,
    export_standing,
    stale_exports,
)
from sisa.planning.plan import Missing, ShardPlan
from sisa.store.areas import CHECKPOINTS
from sisa.store.metrics import STAGE_DIGITS

Removed = Mapping[str, Sequence[RecordRow]]  # removed rows by request
NOTHING: Removed = MappingProxyType({})


@dataclass(frozen=True)
class Trained:
    """Describe what a reconciliation trained: towards the targets, and in the other orders."""

    record_epochs_trained: int = 0
    slices_trained: int = 0
    record_epochs_others: int = 0
    old_versions_kept: tuple[KeptVersions, ...] = ()  # that a bucket keeps of erased objects
    prompts: HeldPrompts | None = None


def reconcile(context: Context, *, defer: bool = False, removed: Removed = NOTHING) -> Trained:
    """Bring every shard to its target, and finish what a crash left open.

    With `defer`, training is left to another command. `removed` are the present deletion's rows.
    """
    adopt_and_erase(context, removed)
    for hook in context.hooks:
        hook.reconcile(context)
    plans = [] if defer else [plan for plan in open_plans(context) if plan.train]
    if plans:
        try:
            _train(context, [_chain(context, plan.shard, plan.missing[0]) for plan in plans])
        except SisaError as error:
            note_failure(context, under_way(context), error)
            raise
    _complete_requests(context)
    for hook in context.hooks:
        hook.complete(context)
    others = 0 if defer else _train_orders(context)
    prompts = held_prompts(context, note=True)
    _retire(context)
    erase_unreferenced(context)
    old_versions_kept = purge(context)
    for each in old_versions_kept:
        context.report(Notice(f"old versions of erased objects are kept at {each.where}: {each.why}"))
    context.stores.ledger.scrub()
    stages = sum(len(plan.train) for plan in plans)
    epochs = sum(plan.record_epochs for plan in plans)
    return Trained(epochs, stages, others, old_versions_kept, prompts)


def _train_orders(context: Context) -> int:
    """Train what the other orders lack, one at a time: what two of them share is trained once."""
    epochs = 0
    for number in range(1, len(context.recipe.other_orders) + 1):
        plans = [plan for plan in open_plans(context) if len(plan.missing) > number]
        lacking = [(plan.shard, plan.missing[number]) for plan in plans]
        chains = [_chain(context, shard, missing) for shard, missing in lacking if missing.train]
        _train(context, chains)
        epochs += sum(chain.record_epochs for chain in chains)
    return epochs


def _chain(context: Context, shard: int, missing: Missing) -> Chain:
    return Chain(shard, missing.train, missing.parent, tuple(context.stores.ledger.slices(shard)))


def adopt_and_erase(context: Context, removed: Removed = NOTHING) -> None:
    """Adopt stored stages of the targets, and erase every other file that the ledger does not list.

    This precedes training. A failure of one step does not stop the others; its error is raised at the
    end. `removed` are the present deletion's rows.
    """
    check_since_last_time(context)
    adopted = False
    with all_tried() as tried:
        with tried():
            _adopt(context)
            adopted = True
        with tried():
            _erase(context, frozenset() if adopted else _targets(context), removed)


def _targets(context: Context) -> frozenset[str]:
    """Return the stages of the present targets; they are clean, whichever process stored them."""
    return frozenset(key for plan in open_plans(context) for key in plan.stages)


def under_way(context: Context) -> list[Request]:
    """Return the requests that were committed and not finished."""
    return [request for request in context.stores.ledger.requests() if is_under_way(request)]


def _erase(context: Context, spared: Collection[str], removed: Removed) -> None:
    """Erase what the ledger does not list, and record it with the requests that wait for it."""
    begun = [each.request_id for each in under_way(context) if each.state != "erased"]
    rows = [row for each in begun for row in removed[each]] if removed.keys() >= {*begun} else None
    try:
        with all_tried() as tried:
            with tried():
                erase_unreferenced(context, spared)
            with tried():
                erase_stale_exports(context)
            with tried():
                context.stores.ledger.scrub(rows)  # None: the rows of an earlier deletion are not known
    except SisaError as error:
        waiting = under_way(context)
        note_failure(context, waiting, error, "erasure_failed")
        with contextlib.suppress(SisaError):  # the metrics may be what failed
            context.report(ErasureFailed(len(waiting)))
        raise
    waiting = [request for request in under_way(context) if request.state != "erased"]
    lost = count_by_request(stale_exports(context))
    notes = {name: f"{count} exports could not be found" for name, count in lost.items()}
    if waiting and (kept := purge(context)):
        what = f"old versions of erased objects are kept at {len(kept)} places"
        notes = {r.request_id: "; ".join(filter(None, (notes.get(r.request_id), what))) for r in waiting}
    _move(context, waiting, lambda each: replace(each, state="erased", cause=""), notes)


def _move(
    context: Context,
    seen: Sequence[Request],
    becoming: Callable[[Request], Request],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> list[Request]:
    """Commit and return requests in their new states, each with its note.

    They are read again: one that was extended meanwhile stays extended, and one in another state than
    was seen is left alone.
    """
    with context.stores.ledger.exclusive():
        states = {each.request_id: each.state for each in seen}
        present = context.stores.ledger.requests()
        moved = [becoming(each) for each in present if states.get(each.request_id) == each.state]
        if moved:
            now = context.now()
            events = [event(each, now, notes.get(each.request_id, "")) for each in moved]
            commit(context, Change(requests=moved, events=events))
    return moved


def note_failure(
    context: Context, requests: Sequence[Request], error: SisaError, state: RequestState = "failed"
) -> None:
    """Record the type of an error with the requests that it stopped; its text is left out."""
    cause = type(error).__name__
    notes = {request.request_id: cause for request in requests}
    with contextlib.suppress(SisaError):  # the ledger may be what failed
        _move(context, requests, lambda each: replace(each, state=state, cause=cause), notes)


def open_plans(context: Context) -> list[ShardPlan]:
    """Return plans of the shards that may lack stages: not at their target, or of several orders."""
    heads, orders = context.stores.ledger.heads(), context.recipe.other_orders
    shards = [head.shard for head in heads if orders or not head.converged]
    return plans_of(context, view_shards(context, shards))


def _adopt(context: Context) -> None:
    """Record stages that an interrupted run stored for the present targets."""
    on_disk = context.stores.checkpoints.held()
    seq = context.stores.ledger.seq()
    plans = open_plans(context)
    unknown = on_disk - {each.key for each in context.stores.ledger.checkpoints()} if plans else ()
    for job in (job for plan in plans for key, job in plan.stages.items() if key in unknown):
        try:
            saved = context.stores.checkpoints.describe(job.key)
        except IntegrityError:
            continue  # never recorded, so nothing relies on it: it is erased as unknown
        _record_checkpoint(context, _as_held(job, saved, seq))


def _as_held(job: SliceJob, saved: SavedCheckpoint, seq: int) -> HeldCheckpoint:
    """Return the ledger's entry for a stage that was found stored."""
    return HeldCheckpoint(
        key=saved.key,
        shard=job.shard,
        prefix=job.prefix,
        seq=seq,
        fingerprint=job.fingerprint,
        manifest_sha256=saved.manifest_sha256,
        adapter_sha256=saved.adapter_sha256,
        num_bytes=saved.num_bytes,
        seconds=0.0,
        record_epochs=0,
    )


def just_trained(stage: SliceTrained, seq: int) -> HeldCheckpoint:
    """Return the ledger's entry for a stage trained now, on the state of ledger number `seq`."""
    found = _as_held(stage.job, stage.saved, seq)
    return replace(found, seconds=stage.seconds, record_epochs=record_epochs(stage.job))


def _record_checkpoint(context: Context, found: HeldCheckpoint) -> None:
    """Record a stage and move its shard's head to the deepest clean one, in one transaction."""
    view = view_shard(context, found.shard)
    plan = plan_of(context, replace(view, held=(*view.held, found)))
    commit(context, Change(checkpoints=[found], heads=[plan.head]))


def _train(context: Context, chains: Sequence[Chain]) -> None:
    """Train chains; record each stage and move its shard's head as soon as it is stored."""
    seq = context.stores.ledger.seq()
    train_chains(context, chains, lambda stage: _record_checkpoint(context, just_trained(stage, seq)))


def train_unrecorded(
    context: Context, plans: Sequence[ShardPlan], slices: Sequence[SliceFile]
) -> list[HeldCheckpoint]:
    """Train plans whose slices no commit lists yet; return the stages, for their commit to number."""
    chains = [
        Chain(plan.shard, plan.train, None, tuple(f for f in slices if f.shard == plan.shard))
        for plan in plans
        if plan.train
    ]
    found: list[HeldCheckpoint] = []
    train_chains(context, chains, lambda stage: found.append(just_trained(stage, 0)))
    return found


def train_chains(
    context: Context,
    chains: Sequence[Chain],
    record: Callable[[SliceTrained], None],
    *,
    one_by_one: bool = False,
) -> int:
    """Train chains; call `record` once for each stored stage, and return their number.

    `one_by_one` is for chains that share stages. Raise SisaError if the executor leaves out a stage.
    """
    recorded: set[str] = set()

    def record_once(stage: SliceTrained) -> None:
        if stage.job.key not in recorded:
            recorded.add(stage.job.key)
            record(stage)

    if not chains:
        return 0
    context.report(training_started(chains))
    executor = context.compute.executor_for(context.stores.checkpoints)
    for batch in [[chain] for chain in chains] if one_by_one else [chains]:
        executor.run(batch, context.report, record_once)
    if missing_stages := {job.key for chain in chains for job in chain.jobs} - recorded:
        raise SisaError(f"the executor returned without {len(missing_stages)} of its stages")
    return len(recorded)


def training_started(chains: Sequence[Chain]) -> TrainingStarted:
    """Return the event that says how much there is to train."""
    jobs = [job for chain in chains for job in chain.jobs]
    return TrainingStarted(tuple((job.shard, job.slice, record_epochs(job)) for job in jobs))


def _retire(context: Context) -> None:
    if dropped := retired(context):
        commit(context, Change(dropped=dropped))
    budget = context.recipe.shard_budget
    if budget is None:
        return
    held = Counter[int]()
    for each in context.stores.ledger.checkpoints():
        held[each.shard] += each.num_bytes
    if over := sum(num_bytes > budget for num_bytes in held.values()):
        what = f"{over} shards keep more bytes than their {budget:,} of checkpoint_budget_bytes"
        context.report(
            Notice(f"{what}: heads and the last stages of orders are kept whatever the budget")
        )


def _complete_requests(context: Context) -> None:
    """Close the requests whose shards have all reached their targets."""
    open_ = {head.shard for head in context.stores.ledger.heads() if not head.converged}
    done = [r for r in under_way(context) if open_.isdisjoint(shard for shard, _, _ in r.shards)]
    if not done:
        return
    after, now = model_digest(context), context.now()
    trained = _move(context, done, lambda each: replace(each, state="retrained"))
    for each in _move(context, trained, lambda each: completed(each, now, after)):
        context.report(DeletionCompleted(each.num_records, len(each.shards), each.seconds))


def erase_unreferenced(context: Context, spared: Collection[str] = ()) -> None:
    """Erase every file that the ledger does not list, except `spared` checkpoints.

    The losses of erased stages go first, then keys, even those without a file: a file whose key is gone
    is unreadable wherever it is. An area that can't be erased does not stop the others.
    """
    known = known_by_area(context)
    with all_tried() as tried:
        with tried():
            context.stores.metrics.keep_losses({key[:STAGE_DIGITS] for key in known[CHECKPOINTS]})
        for area, names in known.items():
            with tried():
                context.stores.keyring.destroy(area, sorted(context.stores.keyring.held(area) - names))
        for area, store in stores_by_area(context).items():
            with tried():
                store.erase(sorted(store.held() - known[area] - set(spared)))


def not_erased(context: Context) -> dict[str, int | None]:
    """Count, by storage area, held files that a commit gave up; None for an unreadable area."""
    found: dict[str, int | None] = {}
    known, targets = known_by_area(context), _targets(context)
    for area, store in stores_by_area(context).items():
        try:
            found[area] = len(store.held() - known[area] - targets)
        except SisaError:
            found[area] = None
    stale = [each for each in stale_exports(context) if export_standing(context, each) == "held"]
    found["exports"] = len({each.path for each in stale})
    return {area: count for area, count in found.items() if count != 0}
