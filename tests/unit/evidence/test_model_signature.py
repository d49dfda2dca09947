"""`model.sig` of an export: the real `model-signing` verifies it, and no changed byte passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sisa.evidence.keys.model_signature import (
    IGNORED,
    check_signature,
    export_key,
    sign_export,
    sign_files,
)
from sisa.store.exports import SIGNATURE
from sisa.verifier.certificate import EXACT, MIXED, RECTIFICATION
from sisa.verifier.envelope import Refused
from tests.models.mutants import mutants

KEY, STRANGER = (ec.derive_private_key(secret, ec.SECP256R1()) for secret in (7, 8))
FILES = {
    "README.md": b"# v1-shard-00000\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights",
}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
SIGNED = sign_files("shard-00000", DIGESTS, KEY)


def test_an_export_says_what_would_revoke_it_and_the_signature_covers_that() -> None:
    signed = sign_export("deletion-ready-model/0f", KEY, "v1-shard-00000", FILES)
    assert signed.keys() == {*FILES, SIGNATURE}
    card = signed["README.md"].decode()
    assert card.startswith("# v1-shard-00000\n")
    digest = hashlib.sha256(FILES["adapter_model.safetensors"]).hexdigest()
    for each in ("`deletion-ready-model/0f`", EXACT, MIXED, RECTIFICATION, digest, "sisa check-adapter"):
        assert each in card
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in signed.items()}
    check_signature(signed[SIGNATURE], digests, KEY.public_key())
    with pytest.raises(Refused, match="not those that were signed"):
        check_signature(signed[SIGNATURE], DIGESTS, KEY.public_key())


def test_the_card_of_a_merged_model_names_its_weights() -> None:
    files = {"README.md": b"# v1-merged-model\n", "config.json": b"{}", "model.safetensors": b"whole"}
    card = sign_export("deletion-ready-model/0f", KEY, "v1-merged-model", files)["README.md"].decode()
    assert f"`model.safetensors`: `{hashlib.sha256(b'whole').hexdigest()}`" in card


def test_the_key_of_exports_stays_the_same() -> None:
    """It is drawn from the log's seed: another derivation would disown every export."""
    drawn = [export_key(bytes([each]) * 32).private_numbers().private_value for each in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert f"{drawn[0]:064x}" == "78e9c831a109fdefb2ee0c4d37a6bc8fcebcb617becb0327ef1336fbdc0ea7b3"


def test_our_own_check_reads_the_same_file() -> None:
    check_signature(SIGNED, DIGESTS, KEY.public_key())
    ignored = dict.fromkeys((*IGNORED, ".git/HEAD"), "a" * 64)
    check_signature(SIGNED, {**DIGESTS, **ignored}, KEY.public_key())
    assert sign_files("shard-00000", {**DIGESTS, **ignored}, KEY) != SIGNED  # ECDSA draws a number
    check_signature(sign_files("shard-00000", {**DIGESTS, **ignored}, KEY), DIGESTS, KEY.public_key())


@pytest.mark.parametrize(
    ("digests", "got"),
    [
        ({**DIGESTS, "more.bin": "a" * 64}, "more.bin differ"),
        ({**DIGESTS, "README.md": "a" * 64}, "README.md differ"),
        (
            {"README.md": DIGESTS["README.md"]},
            "adapter_config.json, adapter_model.safetensors differ",
        ),
    ],
)
def test_other_files_are_refused_by_name(digests: dict[str, str], got: str) -> None:
    with pytest.raises(Refused, match="not those that were signed") as refused:
        check_signature(SIGNED, digests, KEY.public_key())
    assert refused.value.got == got


def test_other_keys_are_refused_even_under_our_hint() -> None:
    by_stranger, ours = json.loads(sign_files("shard-00000", DIGESTS, STRANGER)), json.loads(SIGNED)
    for forged in (by_stranger, {**by_stranger, "verificationMaterial": ours["verificationMaterial"]}):
        with pytest.raises(Refused, match="malformed, or wrong"):
            check_signature(canonical(forged), DIGESTS, KEY.public_key())
    hint = json.loads(SIGNED) | {"verificationMaterial": by_stranger["verificationMaterial"]}
    with pytest.raises(Refused, match="another key's, or of another form"):
        check_signature(canonical(hint), DIGESTS, KEY.public_key())


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def members_changed() -> Iterator[bytes]:
    """Yield the signature with each member dropped, of another type, or from another signature."""
    edited = {**DIGESTS, "README.md": "a" * 64}
    others = [sign_files("v1", edited, KEY), sign_files("shard-00000", DIGESTS, STRANGER)]
    for where in ((), ("dsseEnvelope",), ("verificationMaterial",), ("dsseEnvelope", "signatures", 0)):
        for name in reduce(getitem, where, json.loads(SIGNED)):
            given = [reduce(getitem, (*where, name), json.loads(each)) for each in others]
            for instead in (None, 7, "x", [], {}, *given):
                value = json.loads(SIGNED)
                reduce(getitem, where, value)[name] = instead
                yield canonical(value)
            value = json.loads(SIGNED)
            del reduce(getitem, where, value)[name]
            yield canonical(value)


def test_no_mutation_of_a_signature_is_accepted() -> None:
    for mutant in mutants(SIGNED, 1_000, seed=19, replays=[*members_changed()]):
        with pytest.raises(Refused):
            check_signature(mutant, DIGESTS, KEY.public_key())
