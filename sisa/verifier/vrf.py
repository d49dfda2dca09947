"""Verify outputs of a verifiable random function: ECVRF-EDWARDS25519-SHA512-TAI of RFC 9381.

The owner of a key computes one output for each input and proves it (`sisa/evidence/keys/vrf_key.py`).
Nobody else can compute an output, and the owner can't prove another one. Here, the inputs are ids of
records. The curve is libsodium's. The key and the proof's point must be canonical encodings of points of
the prime-order group, where the RFC accepts more: honest owners make no others.

>>> public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
>>> proof = bytes.fromhex("8657106690b5526245a92b003bb079ccd1a92130477671f6fc01ad16f26f723f26f8a57c"
...     "caed74ee1b190bed1f479d9727d2d0f9b005a6e456a35d4fb0daab1268a1b0db10836d9826a528ca76567805")
>>> verify_output(public, b"", proof).hex()[:16]
'90cf1df3b703cce5'
"""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha512

from nacl.bindings import crypto_core_ed25519_add as add
from nacl.bindings import crypto_core_ed25519_is_valid_point as is_valid_point
from nacl.bindings import crypto_core_ed25519_sub as subtract
from nacl.bindings import crypto_scalarmult_ed25519_base_noclamp as times_base
from nacl.bindings import crypto_scalarmult_ed25519_noclamp as times

from sisa.verifier.envelope import Refused

SUITE, PROOF_BYTES = b"\x03", 80
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the prime-order group
IDENTITY = (1).to_bytes(32, "little")


def verify_output(public: bytes, alpha: bytes, proof: bytes) -> bytes:
    """Return the output for `alpha` (64 bytes) that a proof shows. Raise Refused (section 5.3)."""
    if len(public) != 32 or not is_valid_point(public):  # none, or one of small order (section 5.4.5)
        raise Refused("the public key of labels is no valid point", got=public[:32].hex())
    gamma, challenge, s = proof[:32], proof[32:48], proof[48:]
    if len(proof) != PROOF_BYTES or int.from_bytes(s, "little") >= ORDER or not is_valid_point(gamma):
        raise _refused("bytes that are no proof")
    h, c = encode_to_curve(public, alpha), challenge + bytes(16)
    try:  # libsodium refuses a zero result, which no honest proof has
        u = subtract(times_base(s), times(c, public))
        v = subtract(times(s, h), times(c, gamma))
    except RuntimeError:
        raise _refused("a zero") from None
    if challenge_of(public, h, gamma, u, v) != challenge:
        raise _refused("a proof of something else, or by another key")
    return output(times_cofactor(gamma))


def encode_to_curve(public: bytes, alpha: bytes) -> bytes:
    """Return the point that belongs to an input: try and increment (section 5.4.1.1)."""
    for counter in range(256):
        tried = sha512(SUITE + b"\x01" + public + alpha + bytes([counter, 0])).digest()[:32]
        with suppress(RuntimeError):  # about half of all strings are no point
            if (point := times_cofactor(tried)) != IDENTITY:
                return point
    raise _refused("an input that no point belongs to")


def times_cofactor(point: bytes) -> bytes:
    """Return 8 times a point. Raise RuntimeError for bytes that are no point of the curve."""
    for _ in range(3):
        point = add(point, point)
    return point


def challenge_of(*points: bytes) -> bytes:
    """Return the challenge of the public key and four points (section 5.4.3)."""
    return sha512(SUITE + b"\x02" + b"".join(points) + b"\x00").digest()[:16]


def output(gamma: bytes) -> bytes:
    """Return the output for 8 times the point of a proof (section 5.2)."""
    return sha512(SUITE + b"\x03" + gamma + b"\x00").digest()


def _refused(got: str) -> Refused:
    return Refused("the proof of a label does not hold", "a proof under the public key", got)
