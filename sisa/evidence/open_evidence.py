"""Open a model's evidence, and hand it out as files: certificates, receipts, membership proofs.

A file holds all that an outsider needs besides the public keys (`sisa/verifier/certificate.py`).
Receipts and membership proofs name one record: give them to its requester alone.

    certificate_file(model, "req-...")             a certificate, or any other statement by its sha256
    receipt_file(model, "req-...", "p001-q1")      shows that the certificate is about this record
    membership_file(model, "p001-q1")              shows whether the model holds this record
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sisa.core.errors import IntegrityError, Outdated, SisaError, UnknownRecord
from sisa.core.requests import Request
from sisa.evidence.database import Logged
from sisa.evidence.hook import EvidenceHook, hook_of
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import keys_of
from sisa.evidence.log.log import Log
from sisa.evidence.membership import Membership
from sisa.evidence.statements import salt_of, tree_over
from sisa.flows.context.context import Context
from sisa.flows.requests import find_request
from sisa.model import Model
from sisa.store.areas import LOG
from sisa.verifier.certificate import (
    AUDIT,
    CERTIFICATE_FILE,
    CERTIFICATES,
    CHAINED,
    RECEIPT_FILE,
    TEST_RESULT,
    commitment,
    log_entry,
)
from sisa.verifier.envelope import canonical, verify_envelope
from sisa.verifier.membership import MEMBERSHIP_FILE
from sisa.verifier.merkle import leaf_hash, parents


@dataclass(frozen=True)
class Issued:
    """What is in a model's log, and the completed requests whose certificates are not."""

    logged: tuple[Logged, ...]
    pending: tuple[str, ...]

    @property
    def certificates(self) -> dict[str, Logged]:
        """Return the certificates by request."""
        return {each.about: each for each in self.logged if each.kind in CERTIFICATES}


@dataclass(frozen=True)
class OpenEvidence:
    """The evidence of an open model."""

    context: Context
    hook: EvidenceHook
    keys: Keys
    log: Log

    @property
    def issued(self) -> Issued:
        requests = self.context.stores.ledger.requests()
        return Issued(tuple(self.hook.tables.logged(self.log)), tuple(self.hook.pending(requests)))

    def find(self, name: str) -> Logged:
        """Return a statement by its sha256, or the certificate of a request. Raise UnknownRecord."""
        issued = self.issued
        for each in issued.logged:
            if name == each.sha256:
                return each
        request = find_request(self.context, name)
        if request.request_id in issued.certificates:
            return issued.certificates[request.request_id]
        is_pending = request.request_id in issued.pending
        raise UnknownRecord(
            "this request has no certificate",
            where=request.request_id,
            got="it is pending" if is_pending else f"it is {request.state}",
            next_step=_next_step(request, pending=is_pending),
        )


def _next_step(request: Request, *, pending: bool) -> str:
    if pending:
        return "`sisa certificate issue` signs it"
    if request.state == "completed":
        return (
            "the model had no keys when it was carried out: `sisa keys init` certifies later deletions"
        )
    return "a certificate is issued when the request is completed"


@contextmanager
def open_evidence(model: Model) -> Iterator[OpenEvidence]:
    """Open a model's evidence. Raise InvalidInput for a model that has no keys."""
    keys = keys_of(model)
    with model.context() as context:
        hook = hook_of(model)
        yield OpenEvidence(context, hook, keys, Log(context.stores.blobs[LOG], keys))


def issued(model: Model) -> Issued:
    """Return what has been issued for a model. Raise InvalidInput without keys."""
    with open_evidence(model) as found:
        return found.issued


def issue(model: Model) -> list[Logged]:
    """Sign and log whatever lacks a statement; return what was logged. Raise SisaError."""
    keys_of(model)  # refuses a model without keys before anything is written
    with model.writing() as context:
        return hook_of(model).issue(context)


def state_what_is_held(model: Model) -> None:
    """State what a model with new keys holds: the beginning of its chain. Report a failure."""
    with model.writing() as context:
        hook_of(model).complete(context)


def pending(model: Model) -> list[str]:
    """Return the completed requests whose certificates are not logged yet, with or without keys."""
    return hook_of(model).pending([each.request for each in model.requests()])


def standing(model: Model, request_id: str) -> str:
    """Return "issued", "pending" or "none" for the certificate of a request."""
    tables = hook_of(model).tables
    try:
        is_issued = request_id in issued(model).certificates
    except SisaError:  # without the keys or the log, what was noted counts
        is_issued = tables.is_certified(request_id)
    if is_issued:
        return "issued"
    return "pending" if request_id in tables.drafts() else "none"


def results_of_checks(model: Model) -> list[tuple[str, dict[str, Any]]]:
    """Return the statements in the log of what checks found, with their sha256, in order."""
    results = []
    with open_evidence(model) as found:
        for each in found.issued.logged:
            if each.kind in (AUDIT, TEST_RESULT):
                envelope = found.log.statement(each.sha256)
                statement = verify_envelope(envelope, found.keys.public, each.sequence)
                results.append((each.sha256, statement))
    return results


def certificate_file(model: Model, name: str) -> bytes:
    """Return a certificate, by its request, or any statement, by its sha256, as a file."""
    with open_evidence(model) as found:
        return _as_file(found.log, found.find(name))


def _as_file(log: Log, each: Logged) -> bytes:
    file = {
        "type": CERTIFICATE_FILE,
        "envelope": log.statement(each.sha256).decode(),
        "entry": log_entry(each.sha256, each.kind).decode(),
        "proof": log.proof(each.sequence).decode(),
    }
    return canonical(file) + b"\n"


def membership_file(model: Model, record_id: str) -> bytes:
    """Return the proof that an id is in the model, or that it is not, by the newest statement.

    Raise Outdated if the model has changed since.
    """
    with open_evidence(model) as found:
        stated = [each for each in found.issued.logged if each.kind in CHAINED]
        tree = Membership(found.hook.tables.path, found.keys.vrf_secret)
        if not stated or tree.root != stated[-1].after or tree.is_behind(found.context):
            raise Outdated(
                "no statement says what the model holds now",
                where=str(model.directory),
                next_step="`sisa certificate issue` makes one",
            )
        proof, state = tree.prove(record_id), _as_file(found.log, stated[-1]).decode()
    file = {"type": MEMBERSHIP_FILE, "id": record_id, "state": state, **proof}
    return canonical(file) + b"\n"


def receipt_file(model: Model, request_name: str, record_id: str) -> bytes:
    """Return the receipt of a record of a certified request.

    Raise UnknownRecord for another record, IntegrityError if the commitments are lost.
    """
    with open_evidence(model) as found:
        request = find_request(found.context, request_name)
        certificate = found.find(request.request_id)
        hashes = found.hook.tables.commitments(request.request_id)
        envelope = found.log.statement(certificate.sha256)
        statement = verify_envelope(envelope, found.keys.public, certificate.sequence)
        stated = statement["predicate"]["commitments"]
        if tree_over(hashes) != stated:
            raise IntegrityError(
                "the commitments of this certificate are lost, and with them its receipts",
                where=str(found.hook.tables.path),
                expected=f"{stated['number']} with the root {stated['root']}",
                got=f"{len(hashes)}",
                next_step="restore this file from a newer backup",
            )
        settings = found.context.settings
        id_digest = settings.assigner.id_digest(record_id)
        salt = salt_of(settings.chain.keyed, request.request_id, id_digest)
        committed = commitment(salt, record_id).hex()
        if committed not in hashes:
            raise UnknownRecord(
                "the certificate is not about this record",
                where=request.request_id,
                next_step="`sisa where ID` says by which request a record was deleted",
            )
        proof = found.log.proof(certificate.sequence)
    index = hashes.index(committed)
    path = inclusion_path([leaf_hash(bytes.fromhex(each)) for each in hashes], index)
    file = {
        "type": RECEIPT_FILE,
        "id": record_id,
        "salt": salt.hex(),
        "index": index,
        "path": [each.hex() for each in path],
        "certificate": certificate.sha256,
        "proof": proof.decode(),
    }
    return canonical(file) + b"\n"


def inclusion_path(leaf_hashes: Sequence[bytes], index: int) -> list[bytes]:
    """Return the path that shows the leaf at `index`: siblings, from the leaf to the root."""
    path: list[bytes] = []
    level = leaf_hashes
    while len(level) > 1:
        path += level[index ^ 1 : (index ^ 1) + 1]  # the last of an odd number has no sibling
        level, index = parents(level), index >> 1
    return path
