"""Turn facts into the statements that are signed, in-toto Statements v1: certificates, states, reports.

A certificate is drafted before the deletion's commit, while what will be erased can still be named, and
stated when heads have advanced. `schemas/` describes every field. Nothing here reads or writes.

    Draft      commitments to the records, what they touched, keyed digests of what will be erased
    Outcome    what is known when the request is completed
    State      what the model holds and serves now, and the statement before this one: the chain
    FORMS      the facts that are read again, which `check_facts` checks once

Nobody learns from a statement who was deleted: records, files and checkpoints are named by digests under
the model's secret, and words that people gave with a request (its external id, reasons, approver) are
left out. Fractions are decimal text, so that canonical JSON has no floating-point numbers.

>>> decimal(1 / 3), decimal(2)
('0.333333', '2')
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sisa.audit.own_files import Searched
from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Export, HeldCheckpoint, IndexFile, RecordRow, Restrictions, SliceFile
from sisa.core.hooks import Copies
from sisa.core.patches import Patch
from sisa.core.requests import Probed, Request, RequestEvent, RequestState
from sisa.planning.plan import tainted_checkpoints
from sisa.store.areas import CHECKPOINTS, HIDDEN_STATES, INDEX, RECORDS
from sisa.verifier.certificate import (
    CERTIFICATES,
    CHAINED,
    EXACT,
    MIXED,
    RECTIFICATION,
    STATE,
    TEST_RESULT,
    URN,
    commitment,
)
from sisa.verifier.envelope import MAX_NUMBER, SHA256_HEX, Among, Refused, check_form
from sisa.verifier.merkle import leaf_hash, root

PROVENANCE = "https://slsa.dev/provenance/v1"
SHARD_TRAINING = f"{URN}shard-training:v1"
ACCESS, RESTRICTION = f"{URN}access:v1", f"{URN}restriction:v1"
APPROX_REPORT = f"{URN}approx-report:v1"
NOT_RUN = "not run"
ROW_KINDS = ("index row", "ledger row", "tombstone")  # one for each record
MAX_LISTED = 1_000  # rows that a certificate lists
COVERS = (
    "Each record that the commitments name is in no slice file, index, checkpoint or optimizer state of "
    "the model, and in no export that was still where it was written.",
    "No parameter of the adapters listed as subjects was trained on these records: every checkpoint "
    "that they touched was erased, and what depended on it was trained again without them.",
    "The set of records that remain is the one with the root `membership.after`.",
)
DOES_NOT_COVER = (
    "What the frozen base learnt before any record arrived; `probe` says what was found of that.",
    "Copies of exports, whose holders `revokes` tells what must go; backups that nobody has restored; "
    "freed disk blocks.",
    "Source files, which belong to whoever gave them.",
    "Whether the operator did what this says: `sisa verify --replay` and `sisa rebuild` show that.",
)
CLAIMS = {
    "no_parameter_saw_the_record": "claimed; proved by training again (`sisa verify --replay`)",
    "does_not_behave_as_if_it_knew": "not claimed here; it is measured, attack by attack",
    "nobody_can_tell_that_it_was_deleted": "not claimed; whoever asks before and after can see it",
}
_SERVED = {"shard": int, "sha256": SHA256_HEX, "key": SHA256_HEX, "fingerprint": str, "depth": int}
_STATE = {
    "sequence": int,
    "issued_at": str,
    "membership": Among({"before": str, "after": str, "num_records": int}),
    "served": [_SERVED],
}
_DELETION = {
    "request": Among({"id": str, "times": Among({"received": str, "committed": str})}),
    "commitments": Among({"number": int}),
    "touched": [Among({"shard": int})],
}
FORMS = {  # the facts that are read of a predicate again, by its type
    STATE: Among(_STATE),
    **dict.fromkeys(CERTIFICATES, Among(_STATE | _DELETION)),
    APPROX_REPORT: Among({"patch": Among({"key": str})}),
    RESTRICTION: Among({"number": int, "in_force": list, "held_back": list}),
}
BACKUPS = "The next command deletes these records from a restored backup: the witness names them."


def check_facts(kind: str, predicate: Mapping[str, Any], what: str) -> None:
    """Raise Refused unless a predicate has the facts that are read again of its type."""
    check_form(predicate, what, FORMS.get(kind, dict))
    if kind in CHAINED:
        parse_time(predicate["issued_at"])


def parse_time(text: str) -> datetime:
    """Return a time in ISO 8601 with its offset from UTC. Raise Refused."""
    with suppress(ValueError):
        if (found := datetime.fromisoformat(text)).tzinfo:
            return found
    raise Refused("a statement has another form", expected="a time with its offset from UTC")


def decimal(number: float) -> str:
    """Return a number as decimal text of at most six places."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def erased_name(keyed: Keyed, *parts: str) -> str:
    """Return the name of something erased: without the model's secret it confirms no guess."""
    return keyed.digest("erased", *parts)


def salt_of(keyed: Keyed, request_id: str, id_digest: str) -> bytes:
    """Return the salt of a record's commitment; it is computed again for a receipt, and never stored."""
    return bytes.fromhex(keyed.digest("receipt", request_id, id_digest))


@dataclass(frozen=True)
class Held:
    """What the shards concerned hold before a deletion's commit."""

    slices: Sequence[SliceFile]
    indexes: Sequence[IndexFile]
    checkpoints: Sequence[HeldCheckpoint]
    hidden_states: Collection[str] = ()  # names of the files with those of these slices
    copies: Sequence[Copies] = ()  # that other hooks keep


@dataclass(frozen=True)
class Draft:
    """What can't be named any more after a deletion's commit."""

    request_id: str
    commitments: tuple[str, ...]  # sorted, in hex
    erased: tuple[Mapping[str, Any], ...]
    touched: tuple[Mapping[str, Any], ...]
    revokes: tuple[str, ...]  # sha256 of the adapters of which copies must go


def tree_over(digests: Sequence[str]) -> dict[str, Any]:
    """Return the root of the tree over digests and their number; no root without any.

    >>> tree_over([])
    {'number': 0, 'root': ''}
    """
    leaves = [leaf_hash(bytes.fromhex(each)) for each in digests]
    return {"number": len(leaves), "root": root(leaves).hex() if leaves else ""}


def inventory(what: str, where: str, digests: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """Return the item of `erased` or `remains` for one kind of thing in one storage area.

    Of more than MAX_LISTED rows it has the root alone.
    """
    names = sorted(digests)
    listed = [] if what in ROW_KINDS and len(names) > MAX_LISTED else names
    return {"what": what, "where": where, **more, **tree_over(names), "digests": listed}


def draft_certificate(
    keyed: Keyed,
    request_id: str,
    rows: Sequence[RecordRow],
    ids: Mapping[str, str],
    held: Held,
    exports: Iterable[Export],
    revokes: Collection[str],
) -> Draft:
    """Return the draft of a request that removes `rows`; `ids` are the records' ids by keyed id."""
    commitments = [
        commitment(salt_of(keyed, request_id, id_digest), record_id).hex()
        for id_digest, record_id in ids.items()
    ]
    erased: list[dict[str, Any]] = []
    touched: list[dict[str, Any]] = []
    for shard in sorted({row.shard for row in rows}):
        removed = [row for row in rows if row.shard == shard]
        slices = sorted({row.slice for row in removed})
        of_shard = [each for each in held.checkpoints if each.shard == shard]
        tainted = tainted_checkpoints(of_shard, removed)
        start = f"shard-{shard:05d}-"
        found = {
            ("index row", INDEX): [row.id_digest for row in removed],
            ("ledger row", "ledger"): [row.id_digest for row in removed],
            ("slice file", RECORDS): [
                each.sha256 for each in held.slices if each.shard == shard and each.slice in slices
            ],
            ("index file", INDEX): [each.sha256 for each in held.indexes if each.shard == shard],
            ("checkpoint", CHECKPOINTS): list(tainted),
            ("optimizer state", CHECKPOINTS): list(tainted),
            ("hidden states", HIDDEN_STATES): [
                name for name in held.hidden_states if name.startswith(start)
            ],
        }
        erased += [
            inventory(what, where, [erased_name(keyed, what, each) for each in names], shard=shard)
            for (what, where), names in found.items()
            if names
        ]
        touched.append({"shard": shard, "slices": slices, "checkpoints": len(tainted)})
    if exported := {erased_name(keyed, "export", each.path, each.key) for each in exports}:
        erased.append(inventory("export", "exports", exported, shard=-1))
    for each in held.copies:
        if names := [erased_name(keyed, each.what, name) for name in each.names]:
            erased.append(inventory(each.what, each.where, names, shard=-1))
    return Draft(
        request_id,
        tuple(sorted(commitments)),
        tuple(erased),
        tuple(touched),
        tuple(sorted(revokes)),
    )


@dataclass(frozen=True)
class Served:
    """An adapter that a shard serves."""

    shard: int
    sha256: str
    key: str
    fingerprint: str
    depth: int


def subject_of(served: Iterable[Served], patches: Iterable[Patch], base: str) -> list[dict[str, Any]]:
    """Return what is served: the adapters, and patches beneath them; without any, the base."""
    named = [(f"shard-{each.shard:05d}", each.sha256) for each in served]
    named += [(f"patch-{each.version}", each.adapter_sha256) for each in patches]
    found = named or [("base", base)]
    return [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in found]


@dataclass(frozen=True)
class State:
    """What the model holds and serves when a statement is made, and where in the log it belongs."""

    model: str
    base: str  # digest of the frozen base
    after: str  # root of the records
    num_records: int
    served: tuple[Served, ...]
    patches: tuple[Patch, ...] = ()  # active ones
    code: Mapping[str, Any] = field(default_factory=dict)
    issued_at: str = ""
    sequence: int = 0  # of its entry in the log
    previous: str = ""  # sha256 of the last statement about what the model holds
    before: str = ""  # root of the records that it ended with

    @property
    def fingerprints(self) -> list[str]:
        return sorted({each.fingerprint for each in self.served})

    @property
    def subject(self) -> list[dict[str, Any]]:
        return subject_of(self.served, self.patches, self.base)

    def statement(self, kind: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a statement of this state, with more about what led to it."""
        predicate = {
            "model": self.model,
            "sequence": self.sequence,
            "previous": self.previous,
            "issued_at": self.issued_at,
            "membership": {"before": self.before, "after": self.after, "num_records": self.num_records},
            "served": [asdict(each) for each in self.served],
            "numerics": {"fingerprints": self.fingerprints},
            "code": dict(self.code),
        }
        return statement(self.subject, kind, {**predicate, **(more or {})})


def statement(subject: Sequence[Any], kind: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a statement to sign: `Keys.sign` adds its `_type`."""
    return {"subject": list(subject), "predicateType": kind, "predicate": dict(predicate)}


@dataclass(frozen=True)
class Outcome:
    """What is known when a request is completed, besides its draft."""

    request: Request
    events: Sequence[RequestEvent]  # of the request
    tombstones: Sequence[str]  # keyed ids of the request's records that are still marked as deleted
    exports_left: int  # exports that could not be found, and so not be erased
    old_versions_kept: Sequence[str]  # why a bucket keeps them, one for each place
    holds: int  # requests under a legal hold
    rectified: bool  # all of its records were added again
    restored: bool  # a restored backup held the records again
    passed: Sequence[str]  # checks of the erasure that passed
    sweep: Mapping[str, Any] | str  # what a search for what was deleted found; or why there was none


def deletion_statement(keyed: Keyed, drafted: Draft, done: Outcome, state: State) -> dict[str, Any]:
    """Return the certificate of a completed request; its type is its tier."""
    request = done.request
    bit_exact = len(state.fingerprints) <= 1
    more = {
        "guarantee": "bit-exact" if bit_exact else "same procedure, other bits",
        "request": _request(request, done.events),
        "commitments": tree_over(drafted.commitments),
        "touched": list(drafted.touched),
        "erased": list(drafted.erased),
        "revokes": list(drafted.revokes),
        "remains": _remains(keyed, request, done.tombstones),
        "backups": {"restored": done.restored, "words": BACKUPS},
        "plan": {
            "record_epochs_retrained": request.record_epochs_retrained,
            "record_epochs_other_orders": request.record_epochs_others,
            "record_epochs_full": request.record_epochs_full,
            "share_retrained": decimal(
                request.record_epochs_retrained / request.record_epochs_full
                if request.record_epochs_full
                else 0
            ),
            "stages": [dict(zip(_STAGES, each, strict=True)) for each in request.shards],
            "seconds": decimal(request.seconds),
        },
        "training": _provenance(request, state),
        "checks": {"erasure": Results(done.passed).embedded(), "sweep": done.sweep, "replay": NOT_RUN},
        "probe": _probe(request.probed),
        "live_patches": [
            {"version": each.version, "sha256": each.adapter_sha256} for each in state.patches
        ],
        "exceptions": {
            "exports_not_found": done.exports_left,
            "old_versions_kept": list(done.old_versions_kept),
            "text_kept_by_consent": bool(request.vaulted),
        },
        "legal_holds": done.holds,
        "coverage": {"covers": list(COVERS), "does_not_cover": list(DOES_NOT_COVER), "claims": CLAIMS},
    }
    kind = RECTIFICATION if done.rectified else EXACT if bit_exact else MIXED
    return state.statement(kind, more)


_STAGES = ("shard", "first_slice", "stages_retrained")
_TIMES: tuple[RequestState, ...] = ("approved", "committed", "erased", "completed")


def _request(request: Request, events: Iterable[RequestEvent]) -> dict[str, Any]:
    """Return the request without the words that people gave with it."""
    at = {each.state: each.at for each in events}
    return {
        "id": request.request_id,
        "regime": request.regime,
        "received_on": request.received_on,
        "due": request.due,
        "extended": bool(request.extension),
        "num_records": request.num_records,
        "copies_included": request.copies_included,
        "times": {"received": request.created_at, **{state: at.get(state, "") for state in _TIMES}},
    }


def _remains(keyed: Keyed, request: Request, tombstones: Iterable[str]) -> list[dict[str, Any]]:
    """Return what is kept of the request, where and why; its digests differ from other requests'."""
    named = sorted(keyed.digest("remains", request.request_id, each) for each in tombstones)
    why = "keyed digests of id, subject and text: so that the record is not taken in again unnoticed"
    found = [inventory("tombstone", at, named, why=why) for at in ("ledger", "witness") if named]
    noted = {
        "ledger": "the request with its times and outcome, and keyed ids of the records that it named",
        "evidence": "commitments, from which receipts are made",
        "log": "this certificate",
    }
    found += [inventory("request", at, why=why) for at, why in noted.items()]
    if request.vaulted:
        why = "the text itself, encrypted, by consent, until a patch is made from it"
        found.append(inventory("text", "vault", why=why))
    return found


def _provenance(request: Request, state: State) -> dict[str, Any]:
    """Return the predicate of SLSA Provenance v1 for what was trained again.

    `provenance_predicate` (`attestations.py`) states more, of all that is served.
    """
    return {
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": SHARD_TRAINING,
                "externalParameters": {"shards": [shard for shard, _, _ in request.shards]},
                "internalParameters": {"fingerprints": state.fingerprints},
                "resolvedDependencies": [{"name": "base", "digest": {"sha256": state.base}}],
            },
            "runDetails": {
                "builder": {"id": "urn:deletion-ready-model:trainer", "version": dict(state.code)},
                "metadata": {
                    "invocationId": request.request_id,
                    "startedOn": request.committed_at,
                    "finishedOn": state.issued_at,
                },
            },
        },
    }


@dataclass(frozen=True)
class Results:
    """The names of tests that passed, passed with a warning, and failed."""

    passed: Sequence[str] = ()
    warned: Sequence[str] = ()
    failed: Sequence[str] = ()

    @property
    def result(self) -> str:
        return "FAILED" if self.failed else "WARNED" if self.warned else "PASSED"

    def predicate(self, configuration: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Return the predicate of in-toto's test-result v0.1."""
        return {
            "result": self.result,
            "configuration": list(configuration),
            "passedTests": list(self.passed),
            "warnedTests": list(self.warned),
            "failedTests": list(self.failed),
        }

    def embedded(self) -> dict[str, Any]:
        """Return the predicate with its type, as part of another one."""
        return {"predicateType": TEST_RESULT, "predicate": self.predicate()}


def search_results(strings: Collection[str], searched: Searched) -> Results:
    """Return what a search of the model's own files found of some ids and texts, in numbers alone."""
    files = f"files: {searched.num_files}, bytes: {searched.num_bytes}"
    what = f"deleted ids and texts (searched: {len(strings)}; {files})"
    found = sum(bool(searched.found.get(each)) for each in strings)
    left_out = searched.num_left_out
    return Results(
        passed=[] if found else [f"{what}: none found"],
        warned=[f"not searched, for their size or place (files: {left_out})"] if left_out else [],
        failed=[f"{what}: {found} found"] if found else [],
    )


def _probe(found: Probed | None) -> dict[str, Any]:
    if found is None:
        return {"result": NOT_RUN}
    numbers = {
        name: decimal(each) if isinstance(each, float) else each for name, each in asdict(found).items()
    }
    return {"result": "failed" if found.failure else "approximate", **numbers}


def restriction_predicate(
    keyed: Keyed,
    restrictions: Restrictions,
    counts: Mapping[str | None, int],
    heads: Sequence[Served],
    served: Sequence[Served],
) -> dict[str, Any]:
    """Return the predicate of a restriction: numbers, times and keyed digests.

    `counts` are the numbers of restricted records by subject; `heads` would be served without them.
    """
    now = {each.shard: each for each in served}
    in_order = sorted((since, subject) for subject, since in restrictions.since.items())
    return {
        "number": restrictions.number,
        "in_force": [
            {
                "person": keyed.digest("restriction", subject, since),
                "since": since,
                "num_records": counts.get(subject, 0),
            }
            for since, subject in in_order
        ],
        "held_back": [
            {
                "shard": each.shard,
                "head": each.sha256,
                "served": now[each.shard].sha256 if each.shard in now else "",
            }
            for each in heads
            if now.get(each.shard) != each
        ],
    }


def restriction_digest(predicate: Mapping[str, Any]) -> str:
    """Return the digest of a restriction's predicate without the time of its signature."""
    return digest_of([predicate["number"], predicate["in_force"], predicate["held_back"]])


def access_predicate(
    keyed: Keyed, right: str, names: Iterable[str], at: str, counts: Mapping[str, int]
) -> dict[str, Any]:
    """Return the predicate for a file that a person got; records or a subject name the person."""
    return {"right": right, "at": at, "person": keyed.digest("access", at, *sorted(names)), **counts}


def approx_report(patch: Patch, model: str, issued_at: str, sequence: int) -> dict[str, Any]:
    """Return the statement of a patch's report: approximate, and never a certificate."""
    subject = {"name": f"patch-{patch.version}", "digest": {"sha256": patch.adapter_sha256}}
    predicate = {
        "model": model,
        "sequence": sequence,
        "issued_at": issued_at,
        "patch": {
            "version": patch.version,
            "key": patch.key,
            "base": patch.job.base,
            "made_at": patch.made_at,
        },
        "settings": _decimals(patch.job.settings),
        "report": _decimals({key: each for key, each in patch.report.items() if key != _OF_RECORDS}),
        "exact": "no: this is a measurement of an approximate method, and no certificate",
    }
    return statement([subject], APPROX_REPORT, predicate)


_OF_RECORDS = "composition"  # measured on records, which may be deleted later; a log forgets nothing


def _decimals(value: Any) -> Any:
    """Return JSON values with fractions, and numbers that other parsers would round, as text."""
    if isinstance(value, float) or (type(value) is int and abs(value) >= MAX_NUMBER):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _decimals(each) for key, each in value.items()}
    return [_decimals(each) for each in value] if isinstance(value, list | tuple) else value
