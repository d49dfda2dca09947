"""Fake an operator of a log, from the formats alone, and change what it hands out."""

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

from sisa.evidence.log.log import checkpoint_text, proof_text
from sisa.evidence.open_evidence import inclusion_path
from sisa.verifier import merkle, note
from sisa.verifier.certificate import STATE
from sisa.verifier.envelope import ED25519, PublicKeys, Refused, StatementKey, pae
from tests.models.mutants import mutants

MODEL, OTHER_MODEL = "0f" * 16, "f0" * 16
NUM_MUTATIONS = 1_000


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class Operator:
    """Sign and log statements, with keys made from a seed."""

    model: str = MODEL
    seed: int = 1
    vrf: bytes = bytes(32)  # the public key of labels
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
        key = StatementKey(sha256(public).hexdigest(), ED25519, public)
        return PublicKeys(self.model, (key,), str(self._vkey), self.vrf)

    @property
    def _vkey(self) -> note.NoteKey:
        raw = self._log_key.public_key().public_bytes_raw()
        return note.NoteKey(f"deletion-ready-model/{self.model}", note.ED25519_TYPE, raw)

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
                "signatures": [{"keyid": self.keys.statement_keys[0].keyid, "sig": signature}],
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
        text = checkpoint_text(note.Checkpoint(self._vkey.name, len(leaves), merkle.root(leaves)))
        made = base64.b64encode(self._vkey.id + self._log_key.sign(text)).decode()
        checkpoint = text + f"\n— {self._vkey.name} {made}\n".encode()
        path = tuple(inclusion_path(leaves, index))
        return proof_text(index, path, checkpoint).decode()

    def certificate(self, index: int) -> bytes:
        entry = self.entries[index].decode()
        envelope = self.files[f"statements/{json.loads(entry)['sha256']}.json"].decode()
        file = {"type": "deletion-ready-model/certificate/v1", "envelope": envelope, "entry": entry}
        return canonical({**file, "proof": self.proof(index)}) + b"\n"


def edited(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Return a JSON file with one part dropped, replayed from another file, or of another type."""
    file, replayed = json.loads(data), json.loads(other)
    name = rng.choice(sorted(file))
    how = rng.randrange(3)
    if how == 0:
        del file[name]
    elif how == 1:
        file[name] = replayed[name] if replayed[name] != file[name] else f"{file[name]}"[:-1]
    else:
        lines = str(file[name]).split("\n")
        rng.shuffle(lines)
        file[name] = rng.choice([None, 7, -1, [], {}, "", True, 1e308, lines, "\n".join(lines), [[[]]]])
    return canonical(file) + b"\n"


def check_mutations(data: bytes, others: list[bytes], verify: Callable[[bytes], object]) -> None:
    """Check that a file is verified, and no mutant of it."""
    verify(data)
    rng, num = random.Random(7), NUM_MUTATIONS // 2
    edits = [edited(data, rng, rng.choice(others)) for _ in range(num)]
    for changed in (*mutants(data, num, seed=7), *edits):
        if changed != data:
            with pytest.raises(Refused):
                verify(changed)
