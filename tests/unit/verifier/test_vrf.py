"""The verifiable random function against the RFC's vectors, and against forgeries."""

from __future__ import annotations

import random

import pytest

from sisa.evidence.keys.vrf_key import VrfKey
from sisa.verifier.envelope import Refused
from sisa.verifier.vrf import ORDER, PROOF_BYTES, encode_to_curve, verify_output

# RFC 9381, appendix B.3, examples 16 to 18: secret, public, alpha, point, proof, output.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "91bbed02a99461df1ad4c6564a5f5d829d0b90cfc7903e7a5797bd658abf3318",
        "8657106690b5526245a92b003bb079ccd1a92130477671f6fc01ad16f26f723f26f8a57ccaed74ee"
        "1b190bed1f479d9727d2d0f9b005a6e456a35d4fb0daab1268a1b0db10836d9826a528ca76567805",
        "90cf1df3b703cce59e2a35b925d411164068269d7b2d29f3301c03dd757876ff"
        "66b71dda49d2de59d03450451af026798e8f81cd2e333de5cdf4f3e140fdd8ae",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "5b659fc3d4e9263fd9a4ed1d022d75eaacc20df5e09f9ea937502396598dc551",
        "f3141cd382dc42909d19ec5110469e4feae18300e94f304590abdced48aed5933bf0864a62558b3e"
        "d7f2fea45c92a465301b3bbf5e3e54ddf2d935be3b67926da3ef39226bbc355bdc9850112c8f4b02",
        "eb4440665d3891d668e7e0fcaf587f1b4bd7fbfe99d0eb2211ccec90496310eb"
        "5e33821bc613efb94db5e5b54c70a848a0bef4553a41befc57663b56373a5031",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "bf4339376f5542811de615e3313d2b36f6f53c0acfebb482159711201192576a",
        "9bc0f79119cc5604bf02d23b4caede71393cedfbb191434dd016d30177ccbf8096bb474e53895c36"
        "2d8628ee9f9ea3c0e52c7a5c691b6c18c9979866568add7a2d41b00b05081ed0f58ee5e31b3a970e",
        "645427e5d00c62a23fb703732fa5d892940935942101e456ecca7bb217c61c45"
        "2118fec1219202a0edcf038bb6373241578be7217ba85a2687f7a0310b2df19f",
    ),
]
KEY = VrfKey(b"k" * 32)
# Points of order 1, 2, 4 and 8, and one of order 2 in another encoding.
SMALL = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize("vector", VECTORS)
def test_the_vectors_of_the_rfc_hold(vector: tuple[str, ...]) -> None:
    secret, public, alpha, point, proof, output = map(bytes.fromhex, vector)
    key = VrfKey(secret)
    assert key.public == public
    assert encode_to_curve(public, alpha) == point
    assert key.prove(alpha) == proof
    assert verify_output(public, alpha, proof) == output
    assert key.output(alpha) == output


def test_proofs_hold_for_any_input_and_for_no_other_input_or_key() -> None:
    other = VrfKey(b"o" * 32).public
    for number in range(30):
        alpha = str(number).encode() * number
        proof = KEY.prove(alpha)
        assert verify_output(KEY.public, alpha, proof) == KEY.output(alpha)
        for public, text in ((other, alpha), (KEY.public, alpha + b"\x00")):
            with pytest.raises(Refused):
                verify_output(public, text, proof)


@pytest.mark.parametrize("public", [*map(bytes.fromhex, SMALL), b"", KEY.public[:31], b"\x02" * 33])
def test_a_key_that_could_prove_anything_is_refused(public: bytes) -> None:
    with pytest.raises(Refused, match="no valid point"):
        verify_output(public, b"", KEY.prove(b""))


def test_every_mutation_of_a_proof_is_refused() -> None:
    alpha, draw = b"p001-q1", random.Random(7)
    proof = KEY.prove(alpha)
    s = int.from_bytes(proof[48:], "little")
    forged = [
        proof[:48] + (s + ORDER).to_bytes(32, "little"),
        proof[:48] + bytes(32),
        bytes(PROOF_BYTES),
    ]
    forged += [bytes.fromhex(point) + proof[32:] for point in SMALL]
    forged += [proof[:size] for size in range(0, PROOF_BYTES, 9)] + [proof + b"\x00"]
    forged += [
        proof[:at] + bytes([proof[at] ^ 1 << draw.randrange(8)]) + proof[at + 1 :] for at in range(80)
    ]
    forged += [draw.randbytes(PROOF_BYTES) for _ in range(50)]
    for each in forged:
        with pytest.raises(Refused):
            verify_output(KEY.public, alpha, each)
