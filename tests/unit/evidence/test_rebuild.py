"""What a second party compares, and how it trains apart; real rebuilds are in `tests/integration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from sisa.config.config import RunConfig, differences
from sisa.core.errors import InvalidInput
from sisa.evidence.keys.signing import read_private_key
from sisa.evidence.rebuild import Rebuild, RebuiltShard, apart, certified_heads
from sisa.verifier.certificate import EXACT, Certificate
from sisa.verifier.envelope import Refused
from sisa.verifier.note import Checkpoint

A, B = "a" * 64, "b" * 64
FACTS = {
    "sequence": 1,
    "issued_at": "2026-11-02T12:00:00.000+00:00",
    "membership": {"before": A, "after": B, "num_records": 3},
    "request": {"id": "req-1", "times": {"received": "", "committed": ""}},
    "commitments": {"root": A, "number": 1},
}
SERVED = [{"shard": shard, "sha256": A, "key": B, "fingerprint": A, "depth": 1} for shard in (0, 2)]


def certificate(served: list[dict[str, Any]], *touched: int, **facts: Any) -> Certificate:
    predicate = FACTS | {"served": served, "touched": [{"shard": each} for each in touched]} | facts
    statement = {"predicateType": EXACT, "predicate": predicate}
    return Certificate(statement, A, 1, Checkpoint("", 2, bytes(32)))


@pytest.mark.parametrize(
    ("rebuilt", "key", "same_numerics", "verdict"),
    [
        (A, B, True, "equal"),
        (B, B, True, "differs"),
        (A, B, False, "same procedure, other bits"),  # equality is not claimed, even of equal bytes
        (A, A, True, "other procedure"),
        (B, A, False, "other procedure"),
    ],
)
def test_verdicts(rebuilt: str, key: str, same_numerics: bool, verdict: str) -> None:
    found = RebuiltShard(0, A, rebuilt, B, key, same_numerics)
    assert found.verdict == verdict
    equal = RebuiltShard(1, A, A, B, B, same_numerics=True)
    assert Rebuild((equal, found), A, 9).verdict == verdict  # the worst one


def test_the_touched_shards_are_rebuilt_unless_others_are_named() -> None:
    assert [each.shard for each in certified_heads(certificate(SERVED, 2, 5))] == [2]
    assert [each.shard for each in certified_heads(certificate(SERVED, 2, 5), [0])] == [0]
    for shards, touched in (([7], [2]), ([], [5]), ([], [])):
        with pytest.raises(InvalidInput, match="names no adapter") as refused:
            certified_heads(certificate(SERVED, *touched), shards)
        assert refused.value.expected == "shards that serve one: 0, 2"


@pytest.mark.parametrize("wrong", [{"key": "b"}, {"shard": "0"}, {"depth": None}, {"more": 1}])
def test_a_certificate_of_another_form_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="the certificate has another form"):
        certified_heads(certificate([SERVED[0] | wrong], 0))


@pytest.mark.parametrize(
    "wrong", ["yesterday", "2026-11-02", "2026-11-02T12:00:00", "2026-02-30T12:00Z"]
)
def test_a_certificate_without_a_time_is_refused(wrong: str) -> None:
    assert certified_heads(certificate(SERVED, 0, issued_at="2026-11-02T12:00:00Z"))
    with pytest.raises(Refused, match="another form"):
        certified_heads(certificate(SERVED, 0, issued_at=wrong))


def test_a_second_party_changes_nothing_that_affects_an_adapter(tmp_path: Path) -> None:
    scratch = {"scratch": {"corpus": [{"path": "corpus.jsonl"}]}}
    given = {
        "datasets": [{"path": "a.jsonl"}],
        "output_dir": "model",
        "base_model": scratch,
        "sequence_len": 64,
    }
    config = RunConfig.model_validate({**given, "encrypt": True, "storage": "/s", "keyring": "/k"})
    changed = apart(config, tmp_path / "key", tmp_path)
    assert changed.base == config.base  # which by default lies beside the operator's model
    effects = {each.key for each in differences(config, changed) if each.effect == "retrain"}
    assert effects == set()
    assert changed.training() == config.training()
    assert (changed.storage, changed.encrypt, changed.keyring) == (None, False, None)


@pytest.mark.parametrize("kind", ["absent", "text", "password", "P-256"])
def test_a_key_that_can_not_sign_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.pem"
    sealed: KeySerializationEncryption = BestAvailableEncryption(b"words")
    private = Ed25519PrivateKey.generate()
    form = PrivateFormat.PKCS8
    if kind == "text":
        path.write_text("no key")
    elif kind == "password":
        path.write_bytes(private.private_bytes(Encoding.PEM, form, sealed))
    elif kind == "P-256":
        other = generate_private_key(SECP256R1())
        path.write_bytes(other.private_bytes(Encoding.PEM, form, NoEncryption()))
    with pytest.raises(InvalidInput) as refused:
        read_private_key(path)
    assert "openssl genpkey" in refused.value.next_step
    path.write_bytes(private.private_bytes(Encoding.PEM, form, NoEncryption()))
    assert read_private_key(path).public_key() == private.public_key()
