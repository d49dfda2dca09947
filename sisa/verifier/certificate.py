"""Check certificates of deletions, receipts, and the chain of certificates in a whole log.

    {"type": "deletion-ready-model/certificate/v1", "envelope", "entry", "proof"}
    {"type": "deletion-ready-model/receipt/v1", "id", "salt", "index", "path", "certificate", "proof"}

A certificate file holds the signed envelope, the log's entry for it and the proof that the entry is in
the log, each as text, so it verifies with the public keys alone. Files have one form: canonical JSON and
a line break. A signature shows who made a statement, and the log that everybody got the same one;
neither shows that it is true.

>>> commitment(bytes(32), "p001-q1").hex()[:16]
'68db87ca6fee60c2'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sisa.verifier.envelope import (
    SHA256_HEX,
    Among,
    PublicKeys,
    Refused,
    canonical,
    check_form,
    parse_canonical,
    verify_envelope,
)
from sisa.verifier.merkle import leaf_hash, verify_inclusion
from sisa.verifier.note import Checkpoint, verify_proof

URN = "urn:deletion-ready-model:"
EXACT, MIXED = f"{URN}exact-deletion:v1", f"{URN}mixed-deletion:v1"
RECTIFICATION, STATE = f"{URN}rectification:v1", f"{URN}state:v1"
REBUILD, AUDIT, REVOCATIONS = f"{URN}rebuild:v1", f"{URN}audit:v1", f"{URN}revocations:v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
CERTIFICATES = (EXACT, MIXED, RECTIFICATION)
CHAINED = (*CERTIFICATES, STATE)  # statements of what the model holds
CERTIFICATE_FILE, RECEIPT_FILE = "deletion-ready-model/certificate/v1", "deletion-ready-model/receipt/v1"
ENTRY_FORM = {"predicateType": str, "sha256": SHA256_HEX}
_FILE = {"type": CERTIFICATE_FILE, "envelope": str, "entry": str, "proof": str}
_RECEIPT = {"type": RECEIPT_FILE, "id": str, "salt": SHA256_HEX, "index": int, "path": [SHA256_HEX]}
_RECEIPT |= {"certificate": SHA256_HEX, "proof": str}
_LINK = re.compile("(?:[0-9a-f]{64})?")  # nothing, at the beginning
_STATE = {"sequence": int, "previous": _LINK, "membership": Among({"before": _LINK, "after": _LINK})}


@dataclass(frozen=True)
class Certificate:
    """A verified statement: the sha256 of its envelope, its number in the log, the log's checkpoint."""

    statement: dict[str, Any]
    sha256: str
    index: int
    checkpoint: Checkpoint

    @property
    def kind(self) -> str:
        return str(self.statement["predicateType"])


def log_entry(sha256: str, predicate_type: str) -> bytes:
    """Return the log's entry for a statement whose envelope has this sha256."""
    return canonical({"predicateType": predicate_type, "sha256": sha256})


def commitment(salt: bytes, record_id: str) -> bytes:
    """Return what a certificate commits to for a record; without the salt nobody can find the id."""
    return sha256(b"deletion-ready-model/commitment/v1\x00" + salt + record_id.encode()).digest()


def verify_certificate(data: bytes, keys: PublicKeys) -> Certificate:
    """Return what a certificate file states. Raise Refused."""
    found = verify_logged(data, keys)
    if found.kind not in CERTIFICATES:
        raise Refused("this is not a certificate", " or ".join(CERTIFICATES), found.kind[:80])
    return found


def verify_logged(data: bytes, keys: PublicKeys) -> Certificate:
    """Return any statement of the log, from a file in the form of a certificate's. Raise Refused."""
    file = parse_canonical(data, "the certificate", _FILE, b"\n")
    entry, envelope = file["entry"].encode(), file["envelope"].encode()
    index, checkpoint = verify_proof(file["proof"].encode(), entry, keys.log)
    statement = _stated(envelope, entry, keys, index)
    return Certificate(statement, sha256(envelope).hexdigest(), index, checkpoint)


def _stated(envelope: bytes, entry: bytes, keys: PublicKeys, index: int) -> dict[str, Any]:
    """Return the statement of entry `index`, after checking that it names its model and its entry."""
    statement = verify_envelope(envelope, keys, index)
    kind, state = statement["predicateType"], statement["predicate"]
    if log_entry(sha256(envelope).hexdigest(), kind) != entry:
        raise Refused("the log's entry is not that of the statement", where=f"entry {index}")
    if kind in CHAINED:
        check_form(state, "the statement", Among(_STATE | {"model": keys.model}))
        if (number := state["sequence"]) != index:
            raise Refused("a statement is of another entry", f"entry {number}", f"entry {index}")
    return statement


def verify_receipt(data: bytes, certificate: Certificate, keys: PublicKeys) -> str:
    """Return the id of the record that a receipt shows the certificate to be about. Raise Refused."""
    receipt = parse_canonical(data, "the receipt", _RECEIPT, b"\n")
    if (of := receipt["certificate"]) != certificate.sha256:
        step = "verify it with the one it was made for"
        raise Refused("the receipt is of another certificate", certificate.sha256, of, next_step=step)
    entry = log_entry(certificate.sha256, certificate.kind)
    if (index := verify_proof(receipt["proof"].encode(), entry, keys.log)[0]) != certificate.index:
        raise Refused("the receipt is of another entry", f"{certificate.index}", f"{index}")
    tree = certificate.statement["predicate"].get("commitments")
    check_form(tree, "the tree of commitments", {"root": SHA256_HEX, "number": int})
    leaf = leaf_hash(commitment(bytes.fromhex(receipt["salt"]), receipt["id"]))
    path = [bytes.fromhex(each) for each in receipt["path"]]
    verify_inclusion(leaf, receipt["index"], tree["number"], path, bytes.fromhex(tree["root"]))
    return str(receipt["id"])


def verify_chain(
    entries: Iterable[bytes], read: Callable[[str], bytes], keys: PublicKeys
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield sha256 and statement of each entry of a log, after checking the chain up to it.

    `read` returns a file beside the log's by its path. A statement of what the model holds names the one
    before it and begins where that ended, or (of several requests carried out at once) as it did. Of a
    rebuild, which another party signed, the bytes alone are checked.
    """
    previous, ends = "", ("", "")
    for index, entry in enumerate(entries):
        named = parse_canonical(entry, "an entry", ENTRY_FORM)
        envelope = read(f"statements/{named['sha256']}.json")
        if sha256(envelope).hexdigest() != named["sha256"]:
            raise Refused("a statement is not the logged one", where=f"entry {index}")
        if named["predicateType"] == REBUILD:
            continue
        statement = _stated(envelope, entry, keys, index)
        if named["predicateType"] in CHAINED:
            state = statement["predicate"]
            roots = state["membership"]["before"], state["membership"]["after"]
            if state["previous"] != previous or (roots[0] != ends[1] and roots != ends):
                expected = f"after {previous or 'none'}, from the records {ends[1] or 'none'}"
                got = f"after {state['previous'] or 'none'}, from the records {roots[0] or 'none'}"
                what = "the chain is broken: a statement was dropped, replaced or moved"
                raise Refused(what, expected, got, f"entry {index}")
            previous, ends = named["sha256"], roots
        yield named["sha256"], statement
