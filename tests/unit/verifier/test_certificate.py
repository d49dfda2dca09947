"""Certificates, receipts and chains against an operator written here, from the formats alone."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sisa.verifier import merkle, note
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
from sisa.verifier.envelope import ED25519, CertificateKey, PublicKeys, Refused, pae

MODEL, OTHER_MODEL = "0f" * 16, "f0" * 16
NUM_MUTATIONS = 1_000
IDS = ("ada-1", "ada-2", "ada-3")
SALTS = [sha256(each.encode()).digest() for each in IDS]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class Operator:
    """Sign and log statements, with keys made from a seed."""

    model: str = MODEL
    seed: int = 1
    entries: list[bytes] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self._key, self._log_key = (
            Ed25519PrivateKey.from_private_bytes(rng.randbytes(32)) for _ in "ab"
        )

    @property
    def keys(self) -> PublicKeys:
        public = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        key = CertificateKey(sha256(public).hexdigest(), ED25519, public)
        return PublicKeys(self.model, (key,), str(self._vkey), bytes(32))

    @property
    def _vkey(self) -> note.NoteKey:
        raw = self._log_key.public_key().public_bytes_raw()
        return note.NoteKey(f"deletion-ready-model/{self.model}", note.ED25519, raw)

    def log(self, kind: str, predicate: dict[str, Any]) -> str:
        """Sign and log a statement, and return the sha256 of its envelope."""
        subject = [{"name": "shard-00000", "digest": {"sha256": "ab" * 32}}]
        statement = {"_type": "https://in-toto.io/Statement/v1", "subject": subject}
        payload = canonical({**statement, "predicateType": kind, "predicate": predicate})
        kind_of = "application/vnd.in-toto+json"
        signature = base64.b64encode(self._key.sign(pae(kind_of, payload))).decode()
        envelope = canonical(
            {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": kind_of,
                "signatures": [{"keyid": self.keys.certificates[0].keyid, "sig": signature}],
            }
        )
        digest = sha256(envelope).hexdigest()
        self.files[f"statements/{digest}.json"] = envelope
        self.entries.append(canonical({"predicateType": kind, "sha256": digest}))
        return digest

    def state(self, previous: str, before: str, after: str, kind: str = STATE, **more: Any) -> str:
        roots = {"before": before, "after": after, "num_records": 1}
        place = {"model": self.model, "sequence": len(self.entries), "previous": previous}
        return self.log(kind, {**place, "membership": roots, **more})

    def proof(self, index: int) -> str:
        leaves = [merkle.leaf_hash(each) for each in self.entries]
        text = note.Checkpoint(self._vkey.name, len(leaves), merkle.root(leaves)).text()
        made = base64.b64encode(self._vkey.id + self._log_key.sign(text)).decode()
        checkpoint = text + f"\n— {self._vkey.name} {made}\n".encode()
        path = tuple(merkle.inclusion_path(leaves, index))
        return note.TlogProof(index, path, checkpoint).text().decode()

    def certificate(self, index: int) -> bytes:
        entry = self.entries[index].decode()
        envelope = self.files[f"statements/{json.loads(entry)['sha256']}.json"].decode()
        file = {"type": "deletion-ready-model/certificate/v1", "envelope": envelope, "entry": entry}
        return canonical({**file, "proof": self.proof(index)}) + b"\n"

    def receipt(self, index: int, number: int) -> bytes:
        leaves = [merkle.leaf_hash(each) for each in COMMITMENTS]
        file = {
            "type": "deletion-ready-model/receipt/v1",
            "id": IDS[number],
            "salt": SALTS[number].hex(),
            "index": number,
            "path": [each.hex() for each in merkle.inclusion_path(leaves, number)],
            "certificate": json.loads(self.entries[index])["sha256"],
            "proof": self.proof(index),
        }
        return canonical(file) + b"\n"


COMMITMENTS = [commitment(salt, each) for salt, each in zip(SALTS, IDS, strict=True)]


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
    return [kind for _, kind in _kinds(found)]


def _kinds(found: Operator) -> list[tuple[str, str]]:
    told = verify_chain(found.entries, found.files.__getitem__, found.keys)
    return [(sha, statement["predicateType"]) for sha, statement in told]


def test_a_certificate_verifies_with_the_keys_alone_and_its_receipts_with_it() -> None:
    found = operator()
    certificate = verify_certificate(found.certificate(1), found.keys)
    assert (certificate.kind, certificate.index) == (EXACT, 1)
    assert certificate.checkpoint.size == 4
    for number, record_id in enumerate(IDS):
        receipt = found.receipt(1, number)
        assert verify_receipt(receipt, certificate, found.keys) == record_id
        verify_certificate(found.certificate(1), found.keys, receipt)


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


def _drop(found: Operator) -> None:
    del found.entries[1]


def _swap(found: Operator) -> None:
    found.entries[0], found.entries[1] = found.entries[1], found.entries[0]


def _double(found: Operator) -> None:
    found.entries.append(found.entries[-1])


def _leave_out_the_last_records(found: Operator) -> None:
    found.state(json.loads(found.entries[3])["sha256"], "22" * 32, "44" * 32)


def _skip_a_statement(found: Operator) -> None:
    found.state(json.loads(found.entries[1])["sha256"], "33" * 32, "44" * 32)


def _change_a_file(found: Operator) -> None:
    name = f"statements/{json.loads(found.entries[1])['sha256']}.json"
    found.files[name] = found.files[name].replace(b"a", b"b")


def _name_another_file(found: Operator) -> None:
    found.entries[0] = canonical({"predicateType": STATE, "sha256": "../../etc/passwd"})


@pytest.mark.parametrize(
    "attack",
    [
        *(_drop, _swap, _double, _leave_out_the_last_records),
        *(_skip_a_statement, _change_a_file, _name_another_file),
    ],
)
def test_a_changed_chain_is_refused(attack: Callable[[Operator], None]) -> None:
    found = operator()
    attack(found)
    with pytest.raises(Refused):
        chain(found)


def test_several_requests_of_one_batch_share_their_roots() -> None:
    found = operator()
    last = json.loads(found.entries[3])["sha256"]
    found.state(last, "22" * 32, "33" * 32, EXACT)
    assert chain(found) == [STATE, EXACT, STATE, EXACT]


def test_evidence_of_another_model_is_refused() -> None:
    mine, other = operator(), operator(OTHER_MODEL, seed=2)
    same_keys = operator(OTHER_MODEL)  # another model of the same operator
    for found in (other, same_keys):
        with pytest.raises(Refused):
            verify_certificate(found.certificate(1), mine.keys)
        with pytest.raises(Refused):
            verify_certificate(mine.certificate(1), mine.keys, found.receipt(1, 0))
        with pytest.raises(Refused):
            list(verify_chain(found.entries, found.files.__getitem__, mine.keys))


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return a file with one change: bits, truncated, parts dropped, doubled, swapped or replayed."""
    how = rng.randrange(6)
    at = rng.randrange(len(data))
    if how == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 1:
        return data[:at]
    if how == 2:
        end = rng.randrange(at, min(len(data), at + 40)) + 1
        return data[:at] + data[end:] if rng.random() < 0.5 else data[:end] + data[at:end] + data[end:]
    file, other = json.loads(data), json.loads(rng.choice(others))
    name = rng.choice(sorted(file))
    if how == 3:
        del file[name]
    elif how == 4:
        file[name] = other[name] if other[name] != file[name] else f"{file[name]}"[:-1]
    else:
        lines = str(file[name]).split("\n")
        rng.shuffle(lines)
        file[name] = rng.choice([None, 7, -1, [], {}, "", True, 1e308, lines, "\n".join(lines), [[[]]]])
    return canonical(file) + b"\n"


def check_mutations(data: bytes, others: list[bytes], verify: Callable[[bytes], object]) -> None:
    verify(data)
    rng, refused = random.Random(7), 0
    while refused < NUM_MUTATIONS:
        changed = mutated(data, rng, others)
        if changed == data:
            continue
        with pytest.raises(Refused):
            verify(changed)
        refused += 1


def test_no_mutation_of_a_certificate_is_accepted() -> None:
    found, others = operator(), [operator(OTHER_MODEL).certificate(1), operator().certificate(0)]
    others += [operator(seed=3).certificate(1)]
    check_mutations(found.certificate(1), others, lambda data: verify_certificate(data, found.keys))


def test_no_mutation_of_a_receipt_is_accepted() -> None:
    found = operator()
    certificate = verify_certificate(found.certificate(1), found.keys)
    others = [found.receipt(1, 1), operator(OTHER_MODEL).receipt(1, 0), found.receipt(0, 0)]

    def verify(data: bytes) -> None:
        assert verify_receipt(data, certificate, found.keys) == IDS[0]

    check_mutations(found.receipt(1, 0), others, verify)
