"""`model.sig` of an export: the real `model-signing` verifies it, and no changed byte passes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sisa.evidence.model_signature import (
    IGNORED,
    check_signature,
    export_key,
    public_pem,
    sign_export,
    sign_files,
)
from sisa.store.exports import SIGNATURE
from sisa.verifier.certificate import EXACT, MIXED, RECTIFICATION
from sisa.verifier.envelope import Refused

KEY, STRANGER = (ec.derive_private_key(secret, ec.SECP256R1()) for secret in (7, 8))
FILES = {
    "README.md": b"# v1-shard-00000\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights",
}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
SIGNED = sign_files("shard-00000", DIGESTS, KEY)


def exported(folder: Path) -> Path:
    """Write a signed export as a hub keeps it, beside files of the hub's own."""
    folder.mkdir()
    for name, data in {**FILES, SIGNATURE: SIGNED, ".gitattributes": b"*.safetensors lfs"}.items():
        (folder / name).write_bytes(data)
    (folder.parent / "exports.pem").write_bytes(public_pem(KEY.public_key()))
    return folder


def test_model_signing_verifies_an_export_and_refuses_a_changed_one(tmp_path: Path) -> None:
    verifying = pytest.importorskip("model_signing").verifying
    folder = exported(tmp_path / "moved-elsewhere")
    client = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "exports.pem")
    client.verify(folder, folder / SIGNATURE)
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'adapter_model\.safetensors'"):
        client.verify(folder, folder / SIGNATURE)
    (folder / SIGNATURE).write_bytes(sign_files("shard-00000", DIGESTS, STRANGER))
    with pytest.raises(ValueError, match="Key mismatch"):
        client.verify(folder, folder / SIGNATURE)


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
    ("digests", "key", "why"),
    [
        ({**DIGESTS, "more.bin": "a" * 64}, KEY, "not those that were signed"),
        ({**DIGESTS, "README.md": "a" * 64}, KEY, "not those that were signed"),
        ({"README.md": DIGESTS["README.md"]}, KEY, "not those that were signed"),
        (DIGESTS, STRANGER, "another key's"),
    ],
)
def test_other_files_and_other_keys_are_refused(
    digests: dict[str, str], key: ec.EllipticCurvePrivateKey, why: str
) -> None:
    with pytest.raises(Refused, match=why):
        check_signature(SIGNED, digests, key.public_key())


def test_a_signature_under_our_hint_by_another_key_is_refused() -> None:
    forged, ours = (json.loads(each) for each in (sign_files("shard-00000", DIGESTS, STRANGER), SIGNED))
    forged["verificationMaterial"] = ours["verificationMaterial"]
    with pytest.raises(Refused, match="the signature is wrong"):
        check_signature(canonical(forged), DIGESTS, KEY.public_key())


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def mutations(number: int) -> Iterator[bytes]:
    """Yield variants of a signature: bits, cuts, doubled parts, members changed, dropped and swapped."""
    drawn = random.Random(19)
    edited = {**DIGESTS, "README.md": "a" * 64}
    others = [sign_files("v1", edited, KEY), sign_files("shard-00000", DIGESTS, STRANGER)]
    for _ in range(number):
        at, to = sorted(drawn.sample(range(len(SIGNED)), 2))
        value, other = json.loads(SIGNED), json.loads(drawn.choice(others))
        where = drawn.choice([(), ("dsseEnvelope",), ("verificationMaterial",)])
        inside, others_part = value, other
        for name in where:
            inside, others_part = inside[name], others_part[name]
        differ = [each for each in sorted(inside) if inside[each] != others_part[each]]
        name = drawn.choice(differ or [""])
        inside[name or "more"] = others_part.get(name, drawn.choice([None, 7, "x", [], {}]))
        dropped = json.loads(SIGNED)
        del dropped["dsseEnvelope"][drawn.choice(sorted(dropped["dsseEnvelope"]))]
        yield drawn.choice(
            [
                SIGNED[:at] + bytes([SIGNED[at] ^ (1 << drawn.randrange(8))]) + SIGNED[at + 1 :],
                SIGNED[:at],
                SIGNED[:at] + SIGNED[to:],
                SIGNED[:to] + SIGNED[at:],
                SIGNED.replace(b":", b": ", 1 + at % 5),
                canonical(value),
                canonical(dropped),
                canonical({**json.loads(SIGNED), drawn.choice(sorted(value)): None}),
            ]
        )


def test_no_mutation_of_a_signature_is_accepted() -> None:
    for mutated in mutations(1000):
        with pytest.raises(Refused):
            check_signature(mutated, DIGESTS, KEY.public_key())
