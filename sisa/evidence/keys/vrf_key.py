"""Compute and prove the labels of records: ECVRF-EDWARDS25519-SHA512-TAI of RFC 9381.

`sisa/verifier/vrf.py` verifies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha512

from nacl.bindings import (
    crypto_core_ed25519_scalar_add,
    crypto_core_ed25519_scalar_mul,
    crypto_core_ed25519_scalar_reduce,
    crypto_scalarmult_ed25519_base_noclamp,
    crypto_scalarmult_ed25519_noclamp,
)

from sisa.verifier.vrf import challenge_of, encode_to_curve, output

EIGHT = (8).to_bytes(32, "little")


@dataclass(frozen=True)
class VrfKey:
    """The secret key of the labels: 32 random bytes, expanded as Ed25519 does (RFC 8032, 5.1.5).

    How long a call takes depends on the input, which the owner of the key knows anyway, and not on the
    key.

    >>> from sisa.verifier.vrf import verify_output
    >>> key = VrfKey(bytes(32))
    >>> verify_output(key.public, b"p001-q1", key.prove(b"p001-q1")) == key.output(b"p001-q1")
    True
    """

    secret: bytes

    @cached_property
    def _expanded(self) -> tuple[bytes, bytes]:
        """Return the secret scalar, and the half that nonces are made from."""
        expanded = sha512(self.secret).digest()
        scalar = bytes([expanded[0] & 248, *expanded[1:31], expanded[31] & 127 | 64])
        return crypto_core_ed25519_scalar_reduce(scalar + bytes(32)), expanded[32:]

    @cached_property
    def _times_cofactor(self) -> bytes:
        return crypto_core_ed25519_scalar_mul(EIGHT, self._expanded[0])

    @cached_property
    def public(self) -> bytes:
        """Return the public key."""
        return crypto_scalarmult_ed25519_base_noclamp(self._expanded[0])

    def output(self, alpha: bytes) -> bytes:
        """Return the output for an input, 64 bytes, without a proof."""
        point = encode_to_curve(self.public, alpha)
        return output(crypto_scalarmult_ed25519_noclamp(self._times_cofactor, point))

    def prove(self, alpha: bytes) -> bytes:
        """Return the proof of the output for an input (RFC 9381, section 5.1)."""
        scalar, nonces = self._expanded
        point = encode_to_curve(self.public, alpha)
        gamma = crypto_scalarmult_ed25519_noclamp(scalar, point)
        nonce = crypto_core_ed25519_scalar_reduce(sha512(nonces + point).digest())
        u = crypto_scalarmult_ed25519_base_noclamp(nonce)
        v = crypto_scalarmult_ed25519_noclamp(nonce, point)
        challenge = challenge_of(self.public, point, gamma, u, v)
        product = crypto_core_ed25519_scalar_mul(challenge + bytes(16), scalar)
        return gamma + challenge + crypto_core_ed25519_scalar_add(nonce, product)
