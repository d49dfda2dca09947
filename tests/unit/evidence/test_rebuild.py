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
from sisa.verifier.envelope import Refused

A, B = "a" * 64, "b" * 64
SERVED = [{"shard": shard, "sha256": A, "key": B, "fingerprint": A, "depth": 1} for shard in (0, 2)]


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
    predicate = {"served": SERVED, "touched": [{"shard": 2}, {"shard": 5}]}
    assert [each.shard for each in certified_heads(predicate)] == [2]
    assert [each.shard for each in certified_heads(predicate, [0])] == [0]
    for shards, touched in (([7], [{"shard": 2}]), ([], [{"shard": 5}]), ([], [])):
        with pytest.raises(InvalidInput, match="names no adapter") as refused:
            certified_heads({"served": SERVED, "touched": touched}, shards)
        assert refused.value.expected == "shards that serve one: 0, 2"


@pytest.mark.parametrize("wrong", [{"key": "b"}, {"shard": "0"}, {"depth": None}, {"more": 1}])
def test_a_certificate_of_another_form_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        certified_heads({"served": [SERVED[0] | wrong], "touched": [{"shard": 0}]})


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
