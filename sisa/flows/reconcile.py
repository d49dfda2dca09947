"""Bring what is held to its target, whatever happened before.

    adopt    stages that an interrupted run stored for the present targets
    erase    every file that the ledger does not list (tainted, retired, half-written), its key first;
             stale exports
    unneeded what hooks keep and nothing needs any more
    train    what the targets lack; each stored stage is recorded and moves its shard's head
    close    requests whose shards have reached their targets
    orders   what the other orders lack, one order of all shards after another
    retire   clean checkpoints that are neither on any order's path nor a head
    scrub    the ledger's own pages

Every step looks at what is there, not at what was done, so the next reconciliation recovers from a crash
anywhere. Training can be deferred: then the heads serve what is clean and held until another command
trains. The flows decide beforehand what remains (`ingest.py`, `deletion.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sisa.core.domain import (
    Chain,
    HeldCheckpoint,
    RecordRow,
    Request,
    RequestState,
    SavedCheckpoint,
    SliceFile,
    SliceJob,
    WitnessHead,
    record_epochs,
)
from sisa.core.errors import IntegrityError, SisaError, all_tried
from sisa.core.events import (
    DeletionCompleted,
    ErasureFailed,
    Notice,
    SliceTrained,
    TrainingStarted,
)
from sisa.core.ports import Change, KeptVersions, Ledger
from sisa.core.requests import completed, contradicted, event, is_under_way
from sisa.flows.stale_exports import erase_stale, export_standing, missing
from sisa.flows.wiring.context import (
    Context,
    areas,
    commit,
    known_by_area,
    model_digest,
    open_shards,
    plan_of,
    plans_of,
    purge,
    view_shard,
    view_shards,
)
from sisa.planning.plan import Missing, ShardPlan
from sisa.store.metrics import STAGE_DIGITS

CHECKED = "events_checked"  # key in the ledger's `meta`: link and number of the last checked event
MANY_EVENTS = 256  # number of new events after which the last checked one is stored
BEGINNING = WitnessHead("", 0)

Removed = Mapping[str, Sequence[RecordRow]]  # removed rows by request
NOTHING: Removed = MappingProxyType({})


@dataclass(frozen=True)
class Trained:
    """Describe what a reconciliation trained: towards the targets, and in the other orders."""

    record_epochs_trained: int
    slices_trained: int
    shards_trained: tuple[int, ...]
    record_epochs_others: int = 0
    kept_versions: tuple[KeptVersions, ...] = ()  # old versions of erased objects that a bucket keeps


def reconcile(context: Context, *, defer: bool = False, removed: Removed = NOTHING) -> Trained:
    """Bring every shard to its target, and finish what a crash left open.

    With `defer`, all training is left to the next command that does not defer. `removed` are the rows
    that the present deletion removed.
    """
    erase_unknown(context, removed)
    for hook in context.hooks:
        hook.erase_unneeded(context)
    plans = [] if defer else [plan for plan in open_plans(context) if plan.train]
    if plans:
        try:
            _train(context, [_chain(context, plan.shard, plan.missing[0]) for plan in plans])
        except SisaError as error:
            note_failure(context, _under_way(context), error)
            raise
    _complete_requests(context)
    others = 0 if defer else _train_orders(context)
    _retire(context)
    erase_unreferenced(context)
    kept_versions = purge(context)
    for each in kept_versions:
        context.report(Notice(f"old versions of erased objects are kept at {each.where}: {each.why}"))
    context.stores.ledger.scrub()
    return Trained(
        sum(plan.record_epochs for plan in plans),
        sum(len(plan.train) for plan in plans),
        tuple(plan.shard for plan in plans),
        others,
        kept_versions,
    )


def _train_orders(context: Context) -> int:
    """Train what the orders other than order 0 lack, and return its record-epochs.

    Orders are trained one at a time, so that a prefix shared by two of them is trained once.
    """
    epochs = 0
    for number in range(1, len(context.settings.recipe.orders) + 1):
        plans = [plan for plan in open_plans(context) if len(plan.missing) > number]
        found = [(plan.shard, plan.missing[number]) for plan in plans]
        chains = [_chain(context, shard, missing) for shard, missing in found if missing.train]
        if chains:
            _train(context, chains)
        epochs += sum(chain.record_epochs for chain in chains)
    return epochs


def _chain(context: Context, shard: int, missing: Missing) -> Chain:
    return Chain(shard, missing.train, missing.parent, tuple(context.stores.ledger.slices(shard)))


def check_consistent(context: Context, since: WitnessHead = BEGINNING) -> None:
    """Raise IntegrityError if the ledger lost rows: reconciling would erase their files.

    Of the requests' history, only the events after `since` are compared.
    """
    ledger = context.stores.ledger
    events = ledger.events(since.num_events)
    check_rows(ledger)
    heads, slices = ledger.heads(), ledger.slices()
    known = {each.key for each in ledger.checkpoints()}
    lost = {
        "heads": len(heads) != context.settings.assigner.layout.num_shards,
        "records or slices": sum(ledger.kinds().values()) != sum(f.num_records for f in slices),
        "indexes": {f.shard for f in slices} != {f.shard for f in ledger.indexes()},
        "checkpoints": any(head.key not in known for head in heads if head.key is not None),
        "requests or events": contradicted(
            ledger.requests(), events, context.settings.chain, since.link
        ),
    }
    _raise_lost([name for name, each in lost.items() if each])


def _check_since_last_time(context: Context) -> None:
    """Refuse contradictions in the history since the last checked event; store the new one.

    This way a writer does not hash the whole history each time; `verify` and `doctor` do.
    """
    kept = json.loads(context.stores.ledger.meta().get(CHECKED, "null"))
    since = WitnessHead(*kept) if kept else BEGINNING
    check_consistent(context, since)
    head = context.stores.ledger.event_head()
    if head.num_events - since.num_events >= MANY_EVENTS:
        commit(context, Change(meta={CHECKED: json.dumps([head.link, head.num_events])}))


def check_rows(ledger: Ledger) -> None:
    """Raise IntegrityError if tables lost rows. This check is cheap enough for every commit."""
    _raise_lost(ledger.lost())


def _raise_lost(lost: Sequence[str]) -> None:
    if lost:
        raise IntegrityError(
            "the ledger contradicts itself; nothing was changed",
            got=", ".join(lost) + " are missing",
            next_step="restore the model directory from a backup",
        )


def erase_unknown(context: Context, removed: Removed = NOTHING) -> None:
    """Adopt stages stored for a target, and erase what no commit lists: the part before training.

    A failure does not stop the rest; its error is raised at the end.
    """
    _check_since_last_time(context)
    adopted = False
    with all_tried() as tried:
        with tried():
            adopt(context)
            adopted = True
        with tried():
            _erase(context, frozenset() if adopted else _targets(context), removed)


@contextlib.contextmanager
def erasing_anyway(context: Context) -> Iterator[None]:
    """Erase what can be erased if an error stops a deletion after its commit; then raise the error."""
    try:
        yield
    except SisaError:
        with contextlib.suppress(SisaError):
            if _under_way(context):
                erase_unknown(context)
        raise


def _targets(context: Context) -> frozenset[str]:
    """Return the stages of the present targets; they are clean, whoever stored them."""
    return frozenset(key for plan in open_plans(context) for key in plan.stages)


def _under_way(context: Context) -> list[Request]:
    return [request for request in context.stores.ledger.requests() if is_under_way(request)]


def _erase(context: Context, spared: Collection[str], removed: Removed) -> None:
    """Erase what the ledger does not list, and record it with the requests that wait for it."""
    begun = [each.request_id for each in _under_way(context) if each.state != "erased"]
    known = all(each in removed for each in begun)
    try:
        with all_tried() as tried:
            with tried():
                erase_unreferenced(context, spared)
            with tried():
                erase_stale(context)
            with tried():
                context.stores.ledger.scrub(
                    [row for each in begun for row in removed[each]] if known else None
                )
    except SisaError as error:
        waiting = _under_way(context)
        note_failure(context, waiting, error, "erasure_failed")
        with contextlib.suppress(SisaError):  # the metrics may be what failed
            context.report(ErasureFailed(len(waiting)))
        raise
    waiting = [request for request in _under_way(context) if request.state != "erased"]
    lost = Counter(export.request_id for export in missing(context))
    notes = {name: f"{count} exports could not be found" for name, count in lost.items()}
    if waiting and (kept := purge(context)):
        what = f"old versions of erased objects are kept at {len(kept)} places"
        notes = {r.request_id: "; ".join(filter(None, (notes.get(r.request_id), what))) for r in waiting}
    _move(context, [replace(request, state="erased", cause="") for request in waiting], notes=notes)


def _move(
    context: Context,
    requests: Sequence[Request],
    note: str = "",
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Commit requests in their new states, each with its own note in `notes`, or else with `note`."""
    if requests:
        now = context.now()
        events = [event(each, now, notes.get(each.request_id, note)) for each in requests]
        commit(context, Change(requests=requests, events=events))


def note_failure(
    context: Context, requests: Sequence[Request], error: SisaError, state: RequestState = "failed"
) -> None:
    """Record the type of an error with the requests that it stopped; its text is left out."""
    cause = type(error).__name__
    with contextlib.suppress(SisaError):  # the ledger may be what failed
        _move(context, [replace(request, state=state, cause=cause) for request in requests], cause)


def open_plans(context: Context) -> list[ShardPlan]:
    """Return plans of the shards whose head is not their target, under the present fingerprint.

    With several orders, return plans of all shards, since any stage may be missing.
    """
    return _plans(context, open_shards(context))


def _plans(context: Context, shards: Sequence[int]) -> list[ShardPlan]:
    return plans_of(context, view_shards(context, shards))


def adopt(context: Context) -> None:
    """Record stages that an interrupted run stored for the present targets."""
    on_disk = context.stores.checkpoints.held()
    seq = context.stores.ledger.seq()
    plans = open_plans(context)
    known = {each.key for each in context.stores.ledger.checkpoints()} if plans else set()
    for plan in plans:
        for job in plan.stages.values():
            if job.key not in on_disk or job.key in known:
                continue
            try:
                saved = context.stores.checkpoints.describe(job.key)
            except IntegrityError:
                continue  # never recorded, so nothing relies on it: it is erased as unknown
            _record_checkpoint(context, as_held(job, saved, seq))


def as_held(
    job: SliceJob, saved: SavedCheckpoint, seq: int, *, seconds: float = 0.0, epochs: int = 0
) -> HeldCheckpoint:
    """Return the ledger's entry for a stored stage.

    `seconds` and `epochs` (record-epochs) are those of its training; 0 if it was found stored.
    """
    return HeldCheckpoint(
        key=saved.key,
        shard=job.shard,
        prefix=job.prefix,
        seq=seq,
        fingerprint=job.fingerprint,
        manifest_sha256=saved.manifest_sha256,
        adapter_sha256=saved.adapter_sha256,
        num_bytes=saved.num_bytes,
        seconds=seconds,
        record_epochs=epochs,
    )


def just_trained(stage: SliceTrained, seq: int) -> HeldCheckpoint:
    """Return the ledger's entry for a stage trained now, on the state of ledger number `seq`."""
    epochs = record_epochs(stage.job)
    return as_held(stage.job, stage.saved, seq, seconds=stage.seconds, epochs=epochs)


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
    context: Context, plans: Sequence[ShardPlan], slices: Sequence[SliceFile], seq: int
) -> list[HeldCheckpoint]:
    """Train plans whose slices no commit lists yet; return the stages for the commit `seq` to record."""
    files: dict[int, list[SliceFile]] = {}
    for file in slices:
        files.setdefault(file.shard, []).append(file)
    chains = [Chain(p.shard, p.train, None, tuple(files[p.shard])) for p in plans if p.train]
    found: list[HeldCheckpoint] = []
    train_chains(context, chains, lambda stage: found.append(just_trained(stage, seq)))
    return found


def train_chains(
    context: Context,
    chains: Sequence[Chain],
    record: Callable[[SliceTrained], None],
    *,
    one_by_one: bool = False,
) -> int:
    """Train chains and return the number of stages; call `record` once for each stored stage.

    An executor may run chains side by side; `one_by_one` is for chains that share stages. Raise the
    errors of the executor, and SisaError if it leaves out a stage.
    """
    recorded: set[str] = set()

    def record_once(stage: SliceTrained) -> None:
        if stage.job.key not in recorded:
            recorded.add(stage.job.key)
            record(stage)

    if not chains:
        return 0
    jobs = [job for chain in chains for job in chain.jobs]
    context.report(training_started(chains))
    executor = context.compute.executor_for(context.stores.checkpoints)
    for some in [[chain] for chain in chains] if one_by_one else [chains]:
        executor.run(some, context.report, record_once)
    if missing_stages := {job.key for job in jobs} - recorded:
        raise SisaError(f"the executor returned without {len(missing_stages)} of its stages")
    return len(recorded)


def training_started(chains: Sequence[Chain]) -> TrainingStarted:
    """Return the event that says how much there is to train."""
    jobs = [job for chain in chains for job in chain.jobs]
    return TrainingStarted(tuple((job.shard, job.slice, record_epochs(job)) for job in jobs))


def _retire(context: Context) -> None:
    converged = [head.shard for head in context.stores.ledger.heads() if head.converged]
    dropped = [key for plan in _plans(context, converged) for key in plan.retired]
    if dropped:
        commit(context, Change(dropped=dropped))
    budget = context.settings.recipe.shard_budget
    held = Counter[int]()
    for each in context.stores.ledger.checkpoints() if budget is not None else ():
        held[each.shard] += each.num_bytes
    over = [shard for shard, num_bytes in held.items() if num_bytes > (budget or 0)]
    if over:
        what = f"{len(over)} shards keep more bytes than their {budget:,} of checkpoint_budget_bytes"
        context.report(
            Notice(f"{what}: heads and the last stages of orders are kept whatever the budget")
        )


def _complete_requests(context: Context) -> None:
    """Close the requests whose shards have all reached their targets."""
    open_ = {head.shard for head in context.stores.ledger.heads() if not head.converged}
    done = [r for r in _under_way(context) if open_.isdisjoint(shard for shard, _, _ in r.shards)]
    if not done:
        return
    after, now = model_digest(context), context.now()
    _move(context, [replace(request, state="retrained") for request in done])
    finished = [completed(request, now, after) for request in done]
    _move(context, finished)
    for each in finished:
        context.report(DeletionCompleted(each.num_records, len(each.shards), each.seconds))


def erase_unreferenced(context: Context, spared: Collection[str] = ()) -> None:
    """Erase every file that the ledger does not list (tainted, retired, half-written), except `spared`.

    `spared` are checkpoints. The losses of erased stages are erased first, then keys, even those without
    a file: a file whose key is gone is unreadable wherever it is. An area that can't be erased does not
    stop the others; its error is raised at the end.
    """
    known = known_by_area(context)
    with all_tried() as tried:
        with tried():
            context.stores.metrics.keep_losses({key[:STAGE_DIGITS] for key in known["checkpoints"]})
        for area, names in known.items():
            with tried():
                context.stores.keyring.destroy(area, sorted(context.stores.keyring.held(area) - names))
        for area, store in areas(context).items():
            with tried():
                store.erase(sorted(store.held() - known[area] - set(spared)))


def not_erased(context: Context) -> dict[str, int | None]:
    """Count, by storage area, the files that a commit gave up and that are still held.

    An area that can't be read counts as None.
    """
    found: dict[str, int | None] = {}
    known, targets = known_by_area(context), _targets(context)
    for area, store in areas(context).items():
        try:
            found[area] = len(store.held() - known[area] - targets)
        except SisaError:
            found[area] = None
    stale = [export_standing(context, each) for each in context.stores.ledger.exports() if each.stale]
    found["exports"] = stale.count("held")
    return {area: count for area, count in found.items() if count != 0}
