"""Audit a model as it is now: replay shards that a seed draws, check all evidence, and report.

README.md lists the checks, and how a seed draws shards: anyone can repeat the draw.

>>> drawn("a seed", range(8), 3)
[4, 5, 7]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from sisa.audit.doctor import CLOCK_TOLERANCE_S, diagnose
from sisa.audit.residue import sweep_model
from sisa.config.fields import is_uri
from sisa.core.digest import sha256_hex
from sisa.core.errors import Problem, SisaError
from sisa.evidence.attestations import served_subject
from sisa.evidence.issuing import served_by
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import PUBLIC_KEYS, log_for_writing, open_keys
from sisa.evidence.log.log import Log
from sisa.evidence.log.published import check_log
from sisa.evidence.log.tiles import CHECKPOINT, Read, cutting_full_tiles
from sisa.evidence.membership import Membership
from sisa.evidence.statements import check_facts, parse_time, statement
from sisa.flows.context.context import Context
from sisa.flows.context.served import held_state
from sisa.flows.reconcile import under_way
from sisa.flows.restored_backup import REPLAYED
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.model import Model
from sisa.store.areas import LOCAL_AREAS, LOG, SHARED_AREAS
from sisa.verifier.certificate import AUDIT, CERTIFICATES, CHAINED, verify_chain
from sisa.verifier.envelope import PublicKeys, Refused, parse_keys

DRAWING = "deletion-ready-model/audit/v1"
NO_EVIDENCE = "the model has no log: `sisa keys init` makes its keys"


@dataclass(frozen=True)
class Check:
    """Hold one check of an audit: it passed if it found nothing. `skipped` says why it was not made."""

    name: str
    findings: tuple[Problem, ...] = ()
    skipped: str = ""

    @property
    def result(self) -> str:
        return "skipped" if self.skipped else "failed" if self.findings else "passed"


@dataclass(frozen=True)
class Audit:
    """Hold the result of an audit; without keys it has no envelope and no entry in the log."""

    model: str
    at: str
    seed: str
    sample: int
    shards: tuple[int, ...]
    subject: list[dict[str, Any]]  # what is served, as statements name it
    checks: tuple[Check, ...]
    envelope: bytes = b""
    index: int | None = None

    @property
    def passed(self) -> bool:
        return all(each.result != "failed" for each in self.checks)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what is signed and what `--json` prints."""
        return {
            "model": self.model,
            "at": self.at,
            "seed": self.seed,
            "sample": self.sample,
            "shards": list(self.shards),
            "checks": [asdict(each) | {"result": each.result} for each in self.checks],
            "passed": self.passed,
        }


def drawn(seed: str, shards: Iterable[int], sample: int) -> list[int]:
    """Return the shards that a seed draws, in their order."""

    def lot(shard: int) -> str:
        return sha256_hex(f"{DRAWING}\n{seed}\n{shard}".encode())

    return sorted(sorted(shards, key=lot)[:sample])


def audit_model(
    model: Model,
    sample: int,
    seed: str,
    *,
    public: PublicKeys | None = None,
    kept: Sequence[bytes] = (),
    cosigners: Sequence[str] = (),
) -> Audit:
    """Audit a model; sign and log the result if its keys are here.

    `public` are keys that the auditor holds, by default those beside the log; `kept` are checkpoints of
    the log that somebody kept, `cosigners` the keys of those who must have cosigned it. Nothing is
    changed but the log. Raise Busy if another process wrote meanwhile.
    """
    # The doctor is first: opening the model to write repeats deletions that a backup has lost.
    doctor = _check("doctor", partial(_doctor_findings, model.directory))
    shards = drawn(seed, [each.shard for each in model.status().shards if each.records], sample)
    state = model.held_state()
    replay = _check("replay", partial(_replay_findings, model, shards))
    sweep = _check("sweep", partial(_sweep_findings, model))
    with model.writing() as context:
        if held_state(context.stores.ledger) != state:  # what was replayed is not what is there now
            raise model.busy()
        keys = open_keys(model.config, model.id)
        read = cutting_full_tiles(partial(context.stores.blobs[LOG].get, what="file of the log"))
        evidence = _Evidence(context, model.directory, shards, keys, public, kept, cosigners, read)
        found = [
            _check(name, partial(find, evidence), evidence.missing) for name, find in EVIDENCE_CHECKS
        ]
        checks = (doctor, replay, sweep, *found)
        subject = served_subject(context)
        done = Audit(model.id, context.now(), seed, sample, tuple(shards), subject, checks)
        if keys is None:
            return done
        done = replace(done, envelope=keys.sign(audit_statement(done, model.directory)))
        with suppress(SisaError):  # a log that was set back or has forked takes nothing: see `log` above
            log = log_for_writing(keys, context.stores.blobs[LOG])
            done = replace(done, index=log.append(done.envelope, AUDIT))
        return done


def audit_statement(done: Audit, directory: Path) -> dict[str, Any]:
    """Return what is signed. The log is published, and the name of a file may be a record's id."""

    def place(where: str) -> str:
        if where.startswith(f"{directory.absolute()}{os.sep}"):
            area = os.path.relpath(where, directory).partition(os.sep)[0]
            return area if area in (*LOCAL_AREAS, *SHARED_AREAS) else "the model's directory"
        return "outside the model" if os.path.isabs(where) or is_uri(where) else where

    def published(check: Check) -> Check:
        found = (Problem(place(each.where), each.what) for each in check.findings)
        return replace(check, findings=tuple(found))

    public = replace(done, checks=tuple(map(published, done.checks)))
    return statement(done.subject, AUDIT, public.facts)


def _check(name: str, find: Callable[[], Iterable[Problem]], skipped: str = "") -> Check:
    if skipped:
        return Check(name, skipped=skipped)
    try:
        return Check(name, tuple(find()))
    except SisaError as error:
        return Check(name, error.as_problems(name))
    except Refused as error:
        what = ": ".join(filter(None, (error.what, error.got or error.expected)))
        return Check(name, (Problem(error.where or name, what),))


def _doctor_findings(directory: Path) -> Iterator[Problem]:
    for each in diagnose(directory).findings:
        if each.severity == "error":
            yield Problem(each.where, each.what)


def _replay_findings(model: Model, shards: Sequence[int]) -> Iterable[Problem]:
    if not shards:
        return model.verify().findings
    return model.verify("sample", shards, require_replay=True).findings


def _sweep_findings(model: Model) -> Iterator[Problem]:
    for each in sweep_model(model).residue:
        yield Problem(each.where, f"{each.what} ({each.position})" if each.position else each.what)


@dataclass(frozen=True)
class _Evidence:
    """The evidence of an open model, and what the auditor holds of it."""

    context: Context
    directory: Path
    shards: Sequence[int]  # that were drawn
    keys: Keys | None
    given: PublicKeys | None
    kept: Sequence[bytes]
    cosigners: Sequence[str]
    read: Read

    @property
    def missing(self) -> str:
        """Return why there is no evidence to check; empty if there is some."""
        return "" if self.keys or self.context.stores.blobs[LOG].num_bytes(CHECKPOINT) else NO_EVIDENCE

    @cached_property
    def public(self) -> PublicKeys:
        return self.given or (self.keys.public if self.keys else parse_keys(self.read(PUBLIC_KEYS)))

    @cached_property
    def entries(self) -> list[bytes]:
        """Return the log's entries, which its checkpoint covers."""
        return check_log(self.read, self.public.log)[1]

    @cached_property
    def statements(self) -> list[dict[str, Any]]:
        """Return the statements of the log that the model's keys signed, in order.

        Raise Refused if one lacks facts: whoever holds the keys may sign anything.
        """
        found = []
        for sha256, each in verify_chain(self.entries, self.read, self.public):
            check_facts(each["predicateType"], each["predicate"], f"the statement {sha256}")
            found.append(each)
        return found

    @property
    def chained(self) -> list[dict[str, Any]]:
        """Return the statements about what the model holds: an unbroken chain."""
        return [each for each in self.statements if each["predicateType"] in CHAINED]

    @property
    def certificates(self) -> dict[str, dict[str, Any]]:
        """Return the predicates of certificates by request."""
        found = [each["predicate"] for each in self.chained if each["predicateType"] in CERTIFICATES]
        return {each["request"]["id"]: each for each in found}

    def log_findings(self) -> Iterable[Problem]:
        """Find a log that contradicts itself, or does not continue a checkpoint that was kept."""
        signed = Log(self.context.stores.blobs[LOG], self.keys).signed_note() if self.keys else b""
        kept = [*self.kept, signed] if signed else self.kept
        check_log(self.read, self.public.log, self.cosigners, kept)
        return ()

    def chain_findings(self) -> Iterator[Problem]:
        """Find a broken chain, dates that run backwards, and records that left without a request."""
        num_left = 0
        for before, after in pairwise(each["predicate"] for each in self.chained):
            earlier, later = (parse_time(each["issued_at"]) for each in (before, after))
            if (earlier - later).total_seconds() > CLOCK_TOLERANCE_S:
                what = "is dated before the statement that precedes it"
                yield Problem(f"entry {after['sequence']}", what)
            sizes = [each["membership"]["num_records"] for each in (before, after)]
            num_left += max(0, sizes[0] - sizes[1])
        num_named = sum(each["commitments"]["number"] for each in self.certificates.values())
        num_named += sum(each.num_records for each in under_way(self.context))
        if num_left > num_named:
            what = f"{num_left} records left the model, and requests account for {num_named}"
            yield Problem("log", what)

    def certificate_findings(self) -> Iterator[Problem]:
        """Find completed requests without a certificate, and certificates that contradict the ledger."""
        first = self.chained[0]["predicate"]["issued_at"] if self.chained else ""
        ledger = self.context.stores.ledger
        known = {each.request_id: each for each in ledger.requests()}
        again = {each.request_id for each in ledger.events() if each.note == REPLAYED}
        done = {name for name, each in known.items() if each.state == "completed"}
        for name in sorted(done - self.certificates.keys()):
            if known[name].committed_at >= first:
                yield Problem(name, "is completed, and has no certificate: `sisa certificate issue`")
        for name, predicate in self.certificates.items():
            times, request = predicate["request"]["times"], known.get(name)
            if request is None:
                yield Problem(name, "has a certificate, and the ledger does not know the request")
            elif name in again:
                continue  # carried out once more after a backup was restored: the certificate is older
            elif (request.created_at, request.committed_at) != (times["received"], times["committed"]):
                yield Problem(name, "the ledger and its certificate have different dates")

    def membership_findings(self) -> Iterator[Problem]:
        """Find a tree that differs from the ledger, or from the last certified root."""
        if self.keys is not None:
            tree = Membership(self.directory / EVIDENCE, self.keys.vrf_secret)
            tree.check()
            tree.check_records(self.context, self.shards)
            if self.chained and self.chained[-1]["predicate"]["membership"]["after"] != tree.root:
                yield Problem("tree of records", "its root is not the last certified one")

    def head_findings(self) -> Iterator[Problem]:
        """Find served adapters that the last certificate or statement does not name."""
        now = {each.shard: each.sha256 for each in served_by(self.context.stores.ledger)}
        served = self.chained[-1]["predicate"]["served"] if self.chained else []
        certified = {each["shard"]: each["sha256"] for each in served}
        for shard in sorted(now.keys() | certified.keys()):
            if now.get(shard) != certified.get(shard):
                yield Problem(f"shard {shard}", "serves another adapter than the last certified one")


EVIDENCE_CHECKS = (
    ("log", _Evidence.log_findings),
    ("chain", _Evidence.chain_findings),
    ("certificates", _Evidence.certificate_findings),
    ("membership", _Evidence.membership_findings),
    ("heads", _Evidence.head_findings),
)
