"""Certificates, receipts and chains against an operator written here, from the formats alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

import pytest

from sisa.evidence.open_evidence import inclusion_path
from sisa.verifier import merkle
from sisa.verifier.certificate import (
    EXACT,
    REBUILD,
    STATE,
    URN,
    commitment,
    verify_certificate,
    verify_chain,
    verify_receipt,
)
from sisa.verifier.envelope import Refused
from tests.fakes.operator import MODEL, OTHER_MODEL, Operator, canonical, check_mutations

IDS = ("ada-1", "ada-2", "ada-3")
SALTS = [sha256(each.encode()).digest() for each in IDS]


COMMITMENTS = [commitment(salt, each) for salt, each in zip(SALTS, IDS, strict=True)]


def receipt_of(found: Operator, index: int, number: int) -> bytes:
    leaves = [merkle.leaf_hash(each) for each in COMMITMENTS]
    file = {
        "type": "deletion-ready-model/receipt/v1",
        "id": IDS[number],
        "salt": SALTS[number].hex(),
        "index": number,
        "path": [each.hex() for each in inclusion_path(leaves, number)],
        "certificate": sha_of(found, index),
        "proof": found.proof(index),
    }
    return canonical(file) + b"\n"


def operator(model: str = MODEL, seed: int = 1) -> Operator:
    """Return an operator whose log holds a state, a certificate, a foreign rebuild and a state."""
    found = Operator(model, seed)
    first = found.state("", "", "11" * 32)
    root = merkle.root([merkle.leaf_hash(each) for each in COMMITMENTS]).hex()
    tree = {"root": root, "number": len(IDS)}
    second = found.state(first, "11" * 32, "22" * 32, EXACT, commitments=tree)
    found.files["statements/" + sha256(b"theirs").hexdigest() + ".json"] = b"theirs"
    found.entries.append(canonical({"predicateType": REBUILD, "sha256": sha256(b"theirs").hexdigest()}))
    found.state(second, "22" * 32, "33" * 32)
    return found


def chain(found: Operator) -> list[str]:
    statements = verify_chain(found.entries, found.files.__getitem__, found.keys)
    return [each["predicateType"] for _, each in statements]


def test_a_certificate_verifies_with_the_keys_alone_and_its_receipts_with_it() -> None:
    found = operator()
    certificate = verify_certificate(found.certificate(1), found.keys)
    assert (certificate.kind, certificate.index) == (EXACT, 1)
    assert certificate.checkpoint.size == 4
    for number, record_id in enumerate(IDS):
        receipt = receipt_of(found, 1, number)
        assert verify_receipt(receipt, certificate, found.keys) == record_id


def test_a_chain_verifies_over_what_another_party_signed() -> None:
    assert chain(operator()) == [STATE, EXACT, STATE]


@pytest.mark.parametrize("index", [0, 3])
def test_only_certificates_are_certificates(index: int) -> None:
    found = operator()
    with pytest.raises(Refused, match="not a certificate"):
        verify_certificate(found.certificate(index), found.keys)


def test_an_unknown_version_is_named() -> None:
    found = Operator()
    found.log(f"{URN}exact-deletion:v2", {})
    with pytest.raises(Refused, match="not a certificate") as error:
        verify_certificate(found.certificate(0), found.keys)
    assert EXACT in error.value.expected
    assert error.value.got == f"{URN}exact-deletion:v2"


def sha_of(found: Operator, index: int) -> str:
    return str(json.loads(found.entries[index])["sha256"])


def change_a_file(found: Operator) -> None:
    name = f"statements/{sha_of(found, 1)}.json"
    found.files[name] = found.files[name].replace(b"a", b"b")


ELSEWHERE = canonical({"predicateType": STATE, "sha256": "../../etc/passwd"})
ATTACKS: dict[str, Callable[[Operator], object]] = {
    "drop an entry": lambda found: found.entries.pop(1),
    "swap two": lambda found: found.entries.insert(0, found.entries.pop(1)),
    "double one": lambda found: found.entries.append(found.entries[-1]),
    "leave records out": lambda found: found.state(sha_of(found, 3), "22" * 32, "44" * 32),
    "skip a statement": lambda found: found.state(sha_of(found, 1), "33" * 32, "44" * 32),
    "change a file": change_a_file,
    "name another file": lambda found: found.entries.__setitem__(0, ELSEWHERE),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_changed_chain_is_refused(attack: Callable[[Operator], object]) -> None:
    found = operator()
    attack(found)
    with pytest.raises(Refused):
        chain(found)


def test_several_requests_of_one_batch_share_their_roots() -> None:
    found = operator()
    found.state(sha_of(found, 3), "22" * 32, "33" * 32, EXACT)
    assert chain(found) == [STATE, EXACT, STATE, EXACT]


def test_evidence_of_another_model_is_refused() -> None:
    mine, other = operator(), operator(OTHER_MODEL, seed=2)
    same_keys = operator(OTHER_MODEL)  # another model of the same operator
    certificate = verify_certificate(mine.certificate(1), mine.keys)
    for found in (other, same_keys):
        with pytest.raises(Refused):
            verify_certificate(found.certificate(1), mine.keys)
        with pytest.raises(Refused):
            verify_receipt(receipt_of(found, 1, 0), certificate, mine.keys)
        with pytest.raises(Refused):
            list(verify_chain(found.entries, found.files.__getitem__, mine.keys))


def test_no_mutation_of_a_certificate_is_accepted() -> None:
    found, others = operator(), [operator(OTHER_MODEL).certificate(1), operator().certificate(0)]
    others += [operator(seed=3).certificate(1)]
    check_mutations(found.certificate(1), others, lambda data: verify_certificate(data, found.keys))


def test_no_mutation_of_a_receipt_is_accepted() -> None:
    found = operator()
    certificate = verify_certificate(found.certificate(1), found.keys)
    others = [receipt_of(found, 1, 1), receipt_of(operator(OTHER_MODEL), 1, 0), receipt_of(found, 0, 0)]

    def verify(data: bytes) -> None:
        assert verify_receipt(data, certificate, found.keys) == IDS[0]

    check_mutations(receipt_of(found, 1, 0), others, verify)
