"""Sign and log the statements of a model that its log lacks.

Each step compares with the log, so it also makes what a crash or a failing signer left out. Nothing is
stated twice: a signed statement is noted, then logged from that note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.audit.own_files import search_model
from sisa.core.digest import digest_of
from sisa.core.domain import Head, Record, RecordRow, Tombstone
from sisa.core.errors import IntegrityError
from sisa.core.events import Notice
from sisa.core.patches import active
from sisa.core.ports import Ledger
from sisa.core.requests import Request
from sisa.evidence import statements
from sisa.evidence.database import EvidenceTables, Logged, parse_logged
from sisa.evidence.keys.keys import Keys
from sisa.evidence.log.log import Log
from sisa.evidence.membership import Membership
from sisa.evidence.statements import (
    ACCESS,
    APPROX_REPORT,
    NOT_RUN,
    RESTRICTION,
    Draft,
    Outcome,
    Served,
    State,
    erased_name,
)
from sisa.flows.context.areas import purge, unlisted
from sisa.flows.context.context import Context
from sisa.flows.context.served import restricted_rows, restrictions, served_heads
from sisa.flows.context.stale_exports import count_by_request, stale_exports
from sisa.flows.restored_backup import REPLAYED
from sisa.lm.base.numerics import PROCEDURE_VERSION
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.verifier.certificate import CERTIFICATES, CHAINED, STATE

MAX_STRINGS, MAX_SEARCHED_BYTES = 200, 64 * 2**20  # half a second of a core


@dataclass(frozen=True)
class Issuing:
    """The statements of one model that are to be made now."""

    context: Context
    tables: EvidenceTables
    keys: Keys
    log: Log
    directory: Path
    removed: Mapping[str, Mapping[str, Record]] = field(repr=False)  # now, by request and keyed id
    why_not_swept: str  # for what other requests removed

    @cached_property
    def sweeps(self) -> dict[str, Mapping[str, Any] | str]:
        """Return by request what a search for what it removed found, or why there was none."""
        return _search(self.context, self.directory, self.removed)

    @cached_property
    def old_versions_kept(self) -> list[str]:
        """Return why a bucket keeps old versions of erased objects, one for each place."""
        return [each.why for each in purge(self.context, dry_run=True)]

    @cached_property
    def present(self) -> State:
        """Return what the model holds and serves, without its place in the log."""
        tree = Membership(self.tables.path, self.keys.vrf_secret)
        tree.sync(self.context)
        return State(
            model=self.keys.model,
            base=self.context.settings.base,
            after=tree.root,
            num_records=tree.num_records,
            served=tuple(served_by(self.context.stores.ledger)),
            patches=tuple(active(self.context.stores.ledger.patches())),
            code={
                "package": metadata.version("deletion-ready-model"),
                "procedure_version": str(PROCEDURE_VERSION),
            },
        )

    @cached_property
    def logged(self) -> list[Logged]:
        """Return what the log's statements are about, in order; statements made here are added to it."""
        return self.tables.logged(self.log)

    def recover(self) -> list[Logged]:
        """Log what was signed before a crash; drop it if another statement has taken its entry."""
        waiting = self.tables.signed()
        return [self._append(*waiting)] if waiting and waiting[0] == len(self.logged) else []

    def _issue(self, unsigned: Mapping[str, Any]) -> Logged:
        """Sign a statement, note it, and log it."""
        kind, sequence = str(unsigned["predicateType"]), len(self.logged)
        envelope = self.keys.sign(unsigned)
        self.tables.put_signed(sequence, kind, envelope)
        return self._append(sequence, kind, envelope)

    def _append(self, sequence: int, kind: str, envelope: bytes) -> Logged:
        if (index := self.log.append(envelope, kind)) != sequence:
            raise IntegrityError(
                "a statement was logged at another index than it names",
                expected=f"entry {sequence}",
                got=f"entry {index}",
                next_step="`sisa log show` shows the log; another process may have written to it",
            )
        found = parse_logged(sequence, kind, envelope)
        self.logged.append(found)
        self.tables.put_logged(found)
        return found

    def certificates(self) -> list[Logged]:
        """Issue the certificates of completed requests that have a draft and none yet."""
        drafts = self.tables.drafts()
        ledger = self.context.stores.ledger
        done = [r for r in ledger.requests() if r.state == "completed" and r.request_id in drafts]
        issued = {each.about for each in self.logged if each.kind in CERTIFICATES}
        made = []
        for request in done:
            drafted = drafts[request.request_id]
            if request.request_id not in issued:  # it is, after a crash here or a restored backup
                sweep = self.sweeps.get(request.request_id, self.why_not_swept)
                outcome = _outcome(self.context, request, drafted, sweep, self.old_versions_kept)
                keyed = self.context.settings.chain.keyed
                now = self._next_state()
                made.append(self._issue(statements.deletion_statement(keyed, drafted, outcome, now)))
            self.tables.drop_adapters(drafted.revokes)
            self.tables.drop_drafts([request.request_id], commitments=False)
        return made

    def state(self) -> list[Logged]:
        """State what the model holds and serves, unless the last statement says the same."""
        now = self._next_state()
        last = _last(self.logged)
        if last is not None and (last.after, last.subject) == (now.after, digest_of(now.subject)):
            return []
        return [self._issue(now.statement(STATE))]

    def patches(self) -> list[Logged]:
        """State the reports of patches that were made, each once."""
        stated = {each.about for each in self.logged if each.kind == APPROX_REPORT}
        made = [each for each in self.context.stores.ledger.patches() if each.adapter_sha256]
        now, model = self.context.now, self.keys.model
        return [
            self._issue(statements.approx_report(each, model, now(), len(self.logged)))
            for each in made
            if each.key not in stated
        ]

    def restrictions(self) -> list[Logged]:
        """State whose processing is restricted and what is served, unless the log says the same."""
        ledger = self.context.stores.ledger
        known = restrictions(ledger)
        if not known.number:
            return []
        counts = Counter(row.subject_digest for row in restricted_rows(ledger))
        keyed, served = self.context.settings.chain.keyed, served_by(ledger, served_heads(ledger))
        heads = served_by(ledger)
        predicate = statements.restriction_predicate(keyed, known, counts, heads, served)
        stated = [each.subject for each in self.logged if each.kind == RESTRICTION]
        if stated[-1:] == [statements.restriction_digest(predicate)]:
            return []
        subject = statements.subject_of(served, active(ledger.patches()), self.context.settings.base)
        return [self._issue_right(RESTRICTION, subject, predicate)]

    def given(self) -> list[Logged]:
        """State the files that were handed to people, each once."""
        return [
            self._issue_right(ACCESS, [{"name": "file", "digest": {"sha256": sha256}}], predicate)
            for sha256, predicate in self.tables.given()
        ]

    def _issue_right(self, kind: str, subject: Sequence[Any], predicate: Mapping[str, Any]) -> Logged:
        """Issue a statement about a person's right other than erasure."""
        issued = {"model": self.keys.model, "issued_at": self.context.now()}
        return self._issue(statements.statement(subject, kind, {**issued, **predicate}))

    def _next_state(self) -> State:
        """Return what the model holds and serves, as the next entry of the log states it."""
        last = _last(self.logged)
        before = last.after if last else ""
        if last is not None and last.after == self.present.after:
            before = last.before  # several statements may be about the same change
        return replace(
            self.present,
            issued_at=self.context.now(),
            sequence=len(self.logged),
            previous=last.sha256 if last else "",
            before=before,
        )


def served_by(ledger: Ledger, heads: Sequence[Head] | None = None) -> list[Served]:
    """Return the adapters of some heads, or of all heads."""
    held = {each.key: each for each in ledger.checkpoints()}
    return [
        Served(each.shard, found.adapter_sha256, found.key, found.fingerprint, each.depth)
        for each in (ledger.heads() if heads is None else heads)
        if each.key is not None and (found := held[each.key])
    ]


def _last(logged: Sequence[Logged]) -> Logged | None:
    """Return the last statement of what the model holds."""
    return next((each for each in reversed(logged) if each.kind in CHAINED), None)


def _outcome(
    context: Context,
    request: Request,
    drafted: Draft,
    sweep: Mapping[str, Any] | str,
    old_versions_kept: Sequence[str],
) -> Outcome:
    """Return what became of a completed request, after checking that what it erased is gone."""
    ledger = context.stores.ledger
    named = ledger.lookup(ledger.named_by(request.request_id))
    live = [each for each in named.values() if isinstance(each, RecordRow)]
    events = ledger.events_of(request.request_id)
    return Outcome(
        request=request,
        events=events,
        tombstones=[each.id_digest for each in named.values() if isinstance(each, Tombstone)],
        exports_left=count_by_request(stale_exports(context))[request.request_id],
        old_versions_kept=old_versions_kept,
        holds=sum(each.state == "held" for each in ledger.requests()),
        rectified=bool(live) and len(live) == len(named),
        restored=any(each.note == REPLAYED for each in events),
        passed=_check_erasure(context, drafted, added_again=bool(live)),
        sweep=sweep,
    )


def _search(
    context: Context, directory: Path, removed: Mapping[str, Mapping[str, Record]]
) -> dict[str, Mapping[str, Any] | str]:
    """Search once for what some requests removed; return what was found, by request, in numbers.

    An id that was given again is not searched for, and a record that could not be read can't be.
    """
    live = context.stores.ledger.lookup([key for records in removed.values() for key in records])
    ids: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for request, records in removed.items():
        if records:
            gone = (each for key, each in records.items() if not isinstance(live.get(key), RecordRow))
            ids[request] = {each.id for each in gone}
            texts[request] = {part.text for each in records.values() for part in each.parts}
    if not ids:
        return {}
    all_ids, all_texts = set[str]().union(*ids.values()), set[str]().union(*texts.values())
    if (number := len(all_ids | all_texts)) > MAX_STRINGS:
        return dict.fromkeys(ids, f"{NOT_RUN}: {number:,} ids and texts, more than {MAX_STRINGS}")
    searched = search_model(context, directory, sorted(all_ids), sorted(all_texts), MAX_SEARCHED_BYTES)
    if found := len(searched.found):
        what = f"ids and texts that were deleted and are still in the model's directory: {found}"
        context.report(Notice(f"{what}; `sisa sweep` says where"))
    return {
        request: statements.search_results(ids[request] | texts[request], searched).embedded()
        for request in ids
    }


def _check_erasure(context: Context, drafted: Draft, *, added_again: bool) -> list[str]:
    """Return the names of the checks that passed. Raise IntegrityError if something erased is held.

    A record that was added again, as it was, brings its checkpoints back: they are not checked.
    """
    keyed = context.settings.chain.keyed
    erased = {name for e in drafted.erased if e["what"] == "checkpoint" for name in e["digests"]}
    held = {erased_name(keyed, "checkpoint", key) for key in context.stores.checkpoints.held()}
    left = {
        area: sum(not name.startswith(TEMPORARY_PREFIX) for name in names)
        for area, names in unlisted(context).items()
    }
    if any(left.values()) or not (added_again or erased.isdisjoint(held)):
        raise IntegrityError(
            "what a deletion erased is still held",
            got=", ".join(f"{count} files in {area}" for area, count in left.items() if count),
            next_step="run `sisa gc`, then `sisa certificate issue`",
        )
    checked = [] if added_again else ["no erased checkpoint is held"]
    return [*checked, "no file is held that the ledger does not list"]
