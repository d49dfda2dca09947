"""Provide a model in a directory: add, where, find, forget, verify, generate, export.

A writer holds the lock of the model's directory; a second writer gets `Busy`. Requests are submitted
beside a writer. If a caller or a machine is at fault, every method raises errors of `sisa.core.errors`
alone. `train.py` trains a model and moves one to a changed run file; `unlearn.py` makes patches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.audit.clean_process import replay_store, stages_apart
from sisa.audit.garbage import undisturbed
from sisa.audit.verify import Replay, Verification, shards_to_replay, verify
from sisa.core.domain import ExportForm, Kind, Record, WitnessHead
from sisa.core.errors import Busy, InvalidInput
from sisa.core.events import Notice, QueueSeen, Report, silent
from sisa.core.requests import Request, RequestEvent, RequestState
from sisa.core.run import running
from sisa.data.drop_lists import read_download
from sisa.data.reader import located_problems, read_like
from sisa.flows.answers.ask import Answer, Prompt, Routed, ask, prompt_form, route_and_encode, routes_of
from sisa.flows.answers.serving import Serving, open_answerer
from sisa.flows.candidates import Candidate, find_candidates, near_duplicates
from sisa.flows.context.served import model_digest
from sisa.flows.context.slices import ids_of
from sisa.flows.context.stale_exports import stale_paths
from sisa.flows.deletion import ForgetOutcome, ForgetPlan, plan_forget
from sisa.flows.export import export_adapters
from sisa.flows.ingest import Rectified, Taken, add, rectify, train
from sisa.flows.locations import Location, held_and_deleted, of_digest, of_subject, where
from sisa.flows.reconcile import reconcile, under_way
from sisa.flows.requests import (
    RequestView,
    Submitted,
    Terms,
    carry_out,
    copies,
    decide,
    extend,
    find_request,
    forget_at_once,
    new_request,
    plan_run,
    queue_seen,
    ready,
    submit,
    view_of,
    views,
)
from sisa.flows.rights import drop
from sisa.flows.rights.access import held_of, recipients_of
from sisa.flows.rights.restriction import Restriction, lift, restrict
from sisa.flows.status import (
    ShardStatus,
    SliceStanding,
    Status,
    shards_with_slices,
    status_of,
)
from sisa.flows.wiring.executors import OpenExecutor
from sisa.flows.wiring.model_directory import WAITS_S, ModelDirectory, retry_read
from sisa.flows.wiring.scratch_base import guard
from sisa.lm.routing.route import Route
from sisa.planning.batching import RunPlan
from sisa.planning.cost import estimate_seconds
from sisa.store.ledger.backend import Watch

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.hf_model import AggregatedModel

DIRECT = "sisa forget"  # approves the requests of a direct deletion
NEAR_DUPLICATE = 0.95  # least inner product of unit vectors for a near-duplicate


class Model(ModelDirectory):
    """A deletion-ready model in a directory.

    An object may live long: each call first adopts what other processes have committed, and lets the
    ledger catch up with its witness. Methods that write hold the directory's lock. Requests and
    restrictions are decided without that lock, so also while a deletion trains.
    """

    # --- records ----------------------------------------------------------------------------------

    def add(
        self, source: Path | str | Sequence[Record], *, allow_deleted: bool = False, append: bool = False
    ) -> Taken:
        """Add new records; the result equals training on all of them from scratch.

        Deleted ids and texts are refused unless `allow_deleted`. `append` puts the records into new
        slices at the end instead.
        """
        if isinstance(source, str | Path):
            source = read_like(self.config, source, subjects="column")
            self.report(Notice(source.subject_report()))
        with located_problems(source), self.writing() as context:
            guarded = partial(guard, self.config)
            return add(context, source, allow_deleted=allow_deleted, append=append, checks=[guarded])

    def rectify(self, source: Path | str | Sequence[Record]) -> Rectified:
        """Replace held records by new versions of the same ids, exactly. Raise UnknownRecord."""
        if isinstance(source, str | Path):
            source = read_like(self.config, source, subjects="column")
        with located_problems(source), self.writing() as context:
            self.resources.refuse_changed_base()
            return rectify(context, source, [partial(guard, self.config)])

    def resume(self) -> Taken:
        """Train what is missing."""
        with self.writing() as context:
            self.resources.refuse_changed_base()
            return train(context, ())

    @retry_read
    def where(self, ids: Sequence[str]) -> list[Location]:
        """Return the shard, slice, checkpoints and heads of each record. Raise UnknownRecord."""
        with self.snapshot() as context:
            return where(context, ids)

    @retry_read
    def find(
        self,
        *,
        text: str | None = None,
        subject: str | None = None,
        like: str | None = None,
        top_k: int = 10,
        show_text: bool = False,
    ) -> list[Candidate]:
        """Return candidates by content (`text`), by subject, or near-duplicates of a record (`like`).

        With `show_text`, each candidate has the beginning of its text.
        """
        if sum(each is not None for each in (text, subject, like)) != 1:
            raise InvalidInput("give exactly one of text, subject and like")
        with self.context() as context:
            return find_candidates(
                context, text=text, subject=subject, like=like, top_k=top_k, show_text=show_text
            )

    @retry_read
    def ids_of_subject(self, subject: str) -> list[str]:
        """Return the ids of a subject's held records. Raise UnknownRecord."""
        with self.context() as context:
            held, _ = of_subject(context, subject)
            return ids_of(context, held)

    @retry_read
    def plan_forget(self, ids: Sequence[str] = (), *, subject: str | None = None) -> ForgetPlan:
        """Return what `forget` would do; change nothing."""
        with self.snapshot() as context:
            planned = plan_forget(context, *held_and_deleted(context, ids, subject))
            measured = context.stores.ledger.checkpoints()
            seconds = estimate_seconds(planned.record_epochs_retrained, measured)
            return replace(planned, estimated_seconds=seconds)

    def forget(
        self,
        ids: Sequence[str] = (),
        *,
        subject: str | None = None,
        consent: str = "",
        defer: bool = False,
    ) -> ForgetOutcome:
        """Delete records exactly. Raise UnknownRecord; ids deleted before are reported, not refused.

        With `consent` (whose, or the legal ground), the text is kept encrypted for a patch if the base
        alone knows it (`unlearn.py`). With `defer`, heads roll back and bytes are erased now; retraining
        is left to the next `run`, `resume` or deletion.
        """
        with self.writing() as context:
            held, deleted = held_and_deleted(context, ids, subject)
            request = None
            if held:
                self.resources.refuse_changed_base()
                terms = Terms(approver=DIRECT, reason=DIRECT, consent=consent)
                done = forget_at_once(context, new_request(context, held, (), terms), defer=defer)
                request, kept = done.requests[0], done.old_versions_kept
            else:  # finishes a deletion after a crash
                kept = reconcile(context, defer=defer).old_versions_kept
            lost = tuple(stale_paths(context))
            return ForgetOutcome(request, tuple(deleted), model_digest(context), lost, kept, defer)

    # --- requests for deletion --------------------------------------------------------------------

    def submit(
        self, ids: Sequence[str] = (), *, subject: str | None = None, terms: Terms | None = None
    ) -> Submitted:
        """Submit a request that waits to be approved and run. Raise UnknownRecord, ConfigConflict."""
        exact_copies, near = self.alike(ids, subject=subject)
        with self.deciding() as context:
            held, deleted = held_and_deleted(context, ids, subject)
            request = submit(context, held, deleted, terms or Terms())
        return Submitted(request, exact_copies, near, tuple(deleted))

    @retry_read
    def alike(
        self, ids: Sequence[str] = (), *, subject: str | None = None
    ) -> tuple[tuple[str, ...], tuple[Candidate, ...]]:
        """Return the ids of exact copies of records, and near-duplicates."""
        with self.context() as context:
            held, _ = held_and_deleted(context, ids, subject)
            found = copies(context, held, full_scan=True)
            near = near_duplicates(context, held, NEAR_DUPLICATE, found) if held else []
            return tuple(ids_of(context, found)), tuple(near)

    @retry_read
    def requests(self) -> list[RequestView]:
        """Return all requests, oldest first, with the days left to each."""
        with self.snapshot() as context:
            return views(context)

    @retry_read
    def request(self, request_id: str) -> RequestView:
        """Return one request by its id or external id, with its history. Raise UnknownRecord."""
        with self.snapshot() as context:
            return view_of(context, find_request(context, request_id))

    @retry_read
    def request_events(self) -> tuple[list[RequestEvent], dict[str, Request]]:
        """Return all events of requests, in order, and the requests by id, both of one state."""
        with self.snapshot() as context:
            ledger = context.stores.ledger
            return ledger.events(), {each.request_id: each for each in ledger.requests()}

    def decide(
        self, request_id: str, state: RequestState, note: str = "", *, by: str = ""
    ) -> RequestView:
        """Move a request to approved, held, denied or cancelled, in the name `by`. Raise ConfigConflict.

        An approval needs `by`, a denial or a hold a note.
        """
        with self.deciding() as context:
            return view_of(context, decide(context, request_id, state, note, by=by))

    def extend(self, request_id: str, reason: str, *, by: str = "") -> RequestView:
        """Extend a request's due date once, with a reason, in the name `by`. Raise ConfigConflict."""
        with self.deciding() as context:
            return view_of(context, extend(context, request_id, reason, by=by))

    @retry_read
    def plan_run(self) -> RunPlan:
        """Return whether to carry out the approved requests now or later, and why; change nothing."""
        with self.snapshot() as context:
            return plan_run(context)

    def run(self) -> tuple[Request, ...]:
        """Carry out all approved requests as one batch, and finish deferred or interrupted ones.

        Return all requests that were worked on; those begun earlier come first.
        """
        with self.writing() as context:
            begun = {each.request_id for each in under_way(context)}
            waiting = ready(context)
            if waiting:
                self.resources.refuse_changed_base()
                done = carry_out(context, waiting)
            else:
                done = ()
                reconcile(context)
            requests = context.stores.ledger.requests()
            return (*(each for each in requests if each.request_id in begun), *done)

    @retry_read
    def queue(self, *, recorded: bool = True) -> QueueSeen:
        """Return the number of requests in each state, and report it unless `recorded` is false."""
        with running(), self.context() as context:
            with context.stores.ledger.snapshot():
                seen = queue_seen(context)
            if recorded:
                context.report(seen)
            return seen

    # --- California's DROP ------------------------------------------------------------------------

    def drop_import(
        self, file: Path | str, *, approver: str | None = None, submitter: str = ""
    ) -> drop.Imported:
        """Import a download of California's DROP, and submit a request for each consumer it matches.

        With `approver`, new requests are approved at once. Raise InvalidInput with every problem.
        """
        download = read_download(Path(file), self.config.limits)
        with self.deciding(whole=True) as context:
            return drop.import_lists(context, download, approver, submitter)

    def drop_report(
        self,
        directory: Path | str,
        *,
        opted_out: bool = False,
        again: bool = False,
        suffix: str = "",
    ) -> drop.Reported:
        """Write the responses to DROP that are due; `opted_out` states that shared ones were opted out.

        `again` also writes what was reported before, and `suffix` distinguishes several responses to one
        list. Raise InvalidInput if a file exists.
        """
        with self.deciding(whole=True) as context:
            return drop.report(context, Path(directory), opted_out=opted_out, again=again, suffix=suffix)

    @retry_read
    def drop_standing(self) -> drop.Standing | None:
        """Return where the 45-day cycle of DROP stands; None before the first import.

        None, too, if only some shards may be read here: the cycle concerns the whole model.
        """
        if self._group is not None:
            return None
        with self.snapshot() as context:
            return drop.cycle_standing(context)

    @retry_read
    def drop_details(self, *, show_ids: bool = False) -> drop.Details | None:
        """Return where DROP's cycle stands, and what waits for a decision, a run or an opt-out."""
        self._check_whole()
        with self.snapshot() as context:
            return drop.details(context, show_ids=show_ids)

    # --- rights beside erasure --------------------------------------------------------------------

    @retry_read
    def access(
        self, ids: Sequence[str] = (), *, subject: str | None = None, digest: str | None = None
    ) -> dict[str, Any]:
        """Return what is held of a person as JSON values (`rights/access.schema.json`).

        `digest`, from `subject_digest`, names the subject instead of `subject`.
        """
        with self.snapshot() as context:
            if digest is None:
                return held_of(context, *held_and_deleted(context, ids, subject), subject)
            found = held_of(context, *of_digest(context, digest))
            names = (each["data"].get("subject_id") for each in found["records"])
            return {**found, "subject": next(names, None)}

    @retry_read
    def subject_digest(self, subject: str) -> str:
        """Return the keyed digest that names a subject at rest. Raise UnknownRecord."""
        with self.context() as context:
            held, deleted = of_subject(context, subject)
            return str((held or deleted)[0].subject_digest)

    @retry_read
    def check_subject(self, digest: str) -> None:
        """Raise UnknownRecord if no record was ever held of the subject that this digest names."""
        with self.context() as context:
            of_digest(context, digest)

    @retry_read
    def recipients(self, ids: Sequence[str] = (), *, subject: str | None = None) -> dict[str, Any]:
        """Return which exports a person's records touched, as JSON values."""
        with self.snapshot() as context:
            return recipients_of(context, *held_and_deleted(context, ids, subject), subject)

    def restrict(self, subject: str) -> Restriction:
        """Store a subject's records, and serve none of them, until `release`. Raise UnknownRecord.

        No shard serves a checkpoint that saw one; nothing is erased or trained.
        """
        with self.deciding(whole=True) as context:
            found = restrict(context, subject)
        self._complete_hooks()
        return found

    def release(self, subject: str) -> Restriction:
        """End a restriction: their records are served again. Raise ConfigConflict without one."""
        with self.deciding(whole=True) as context:
            found = lift(context, subject)
        self._complete_hooks()
        return found

    def _complete_hooks(self) -> None:
        """Call the hooks' `complete`; if another process writes, it will call them."""
        with contextlib.suppress(Busy), self.writing() as context:
            for hook in context.hooks:
                hook.complete(context)

    # --- state and proof --------------------------------------------------------------------------

    @retry_read
    def status(self) -> Status:
        """Return shards, slices, heads, requests and sizes."""
        with self.context(outdated=True) as context:
            names = self.base.name, self.embedder.name
            return status_of(context, self.directory, *names)

    @retry_read
    def shards(self) -> list[tuple[ShardStatus, list[SliceStanding]]]:
        """Return every shard and its slices (clean, retrained, restricted, ...), all at one moment."""
        with self.snapshot() as context:
            return shards_with_slices(context)

    def verify(
        self,
        replay: Replay = "none",
        shard: int | Collection[int] | None = None,
        *,
        apart: bool = True,
        require_replay: bool = False,
        anchor: WitnessHead | None = None,
    ) -> Verification:
        """Check every held byte; with `replay`, train shards from scratch and compare the bytes.

        Unless `apart` is false, one of these shards is also trained stage by stage, each stage in its
        own process on this machine. With `require_replay`, a chosen shard that can't be replayed is a
        finding. With `anchor`, an earlier `Status.event_head`, a history of requests that does not
        continue it is a finding.
        """
        if replay == "none":
            return self._verify_held(anchor)
        with self.writing() as context:
            chosen = shards_to_replay(context, replay, shard)
            context = replace(context, report=self.report)  # a replay's metrics are not kept
            try:
                alone = stages_apart(self, context) if apart else None
                store = replay_store(context)
                return verify(
                    context, chosen, store, alone, require_replay=require_replay, anchor=anchor
                )
            finally:
                self._erase_replays()

    @retry_read
    def _verify_held(self, anchor: WitnessHead | None) -> Verification:
        """Check every held byte without the writer lock.

        Uncommitted work of a writer looks like damage, so findings are checked again while nobody
        writes. Raise Busy if there is no such moment.
        """
        for wait_s in WAITS_S:
            time.sleep(wait_s)
            with self.context(outdated=True) as context:
                found = verify(context, [], None, anchor=anchor)
            if found.ok:
                return found
            with undisturbed(self.directory) as free:
                if free:
                    with self.context(as_it_is=True) as context:
                        return verify(context, [], None, anchor=anchor)
        raise self.busy()

    # --- answers ----------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 48, kind: Kind | None = None) -> Answer:
        """Answer a text or continue a conversation (turns with `role` and `content`, a user's last).

        The run file's aggregation chooses the constituent models. `kind` is the form in which they get a
        text. Raise InvalidInput for a conversation that can't be answered.
        """
        return self.generate_all([prompt], max_new_tokens=max_new_tokens, kind=kind)[0]

    @retry_read
    def generate_all(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 48, kind: Kind | None = None
    ) -> list[Answer]:
        """Answer several prompts; the models are loaded once."""
        with self.context() as context:
            return ask(context, prompts, max_new_tokens, kind, self._ledger)

    @retry_read
    def routes(self, prompts: Sequence[Prompt]) -> list[Route]:
        """Return the shards that would answer each prompt, and their weights."""
        with self.context() as context:
            return routes_of(context, prompts)

    @retry_read
    def answerer(self) -> tuple[Answerer, Kind]:
        """Return all constituent models served now, and the form in which they get prompts.

        They raise Outdated instead of answering once one of them is replaced.
        """
        with self.context() as context:
            return open_answerer(context, open_ledger=self._ledger), prompt_form(context)

    @retry_read
    def serving(self, /, **limits: int) -> Serving:
        """Return the constituent models served now, to answer requests for a long time.

        `adopt` keeps them current. `limits` are those of `sisa.lm.answer.continuous.ContinuousBatching`.
        """
        with self.context() as context:
            return Serving(context, **limits)

    @retry_read
    def adopt(self, serving: Serving) -> list[Hashable]:
        """Replace loaded models that are no longer served; return the keys of requests cut short.

        Without a commit since the last call, this only reads a number from the ledger.
        """
        if self.seq() == serving.served.seq:
            return []
        with self.context() as context:
            return serving.adopt(context)

    @retry_read
    def routed(self, prompts: Sequence[Prompt], *, kind: Kind | None = None) -> list[Routed]:
        """Return the token ids and the route of each prompt. Raise InvalidInput."""
        with self.context() as context:
            return route_and_encode(context, prompts, kind)

    def as_transformers(self, **options: Any) -> AggregatedModel:
        """Return the served models as a `PreTrainedModel` with `generate`, for tools without shards.

        `options` are those of `sisa.lm.answer.hf_model.AggregatedModel`. It raises Outdated, too.
        """
        from sisa.lm.answer.hf_model import AggregatedModel

        return AggregatedModel(self.answerer()[0], self.routes, **options)

    # --- exports ----------------------------------------------------------------------------------

    def export(self, to: Path | str, form: ExportForm = "peft") -> list[Path]:
        """Export the served adapters for other tools, as a new version under `to`.

        The ledger records the export, and a deletion that touches it erases it. Raise InvalidInput if
        `to` is not a directory.
        """
        with self.writing() as context:
            return export_adapters(context, Path(to), form)

    @retry_read
    def exports_missing(self) -> list[str]:
        """Return the paths of exports that a deletion could not erase: they were moved or changed."""
        with self.context() as context:
            return stale_paths(context)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Provide a function that waits for a commit, some seconds at most; it returns whether one came.

        Once the ledger is moved, it raises or waits in vain: bound the wait, and compare.
        """
        with self._ledger() as ledger, ledger.watch() as wait:
            yield wait


def open_model(
    directory: Path | str, *, executor: str | OpenExecutor = "auto", report: Report = silent
) -> Model:
    """Open the model in a directory."""
    return Model(directory, executor=executor, report=report)
