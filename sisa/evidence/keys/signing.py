"""Sign envelopes, and read key files of the owner or of another party."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_public_key,
)

from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.verifier.envelope import ECDSA_P256, ED25519, PAYLOAD_TYPE, STATEMENT_TYPE, StatementKey, pae

MAX_KEY_FILE_BYTES = 1 << 20
SignBytes = Callable[[bytes], bytes]  # returns the signature of a message


def read_private_key(key_file: Path) -> Ed25519PrivateKey:
    """Return the private key of another party. Raise InvalidInput unless it is Ed25519 in PEM."""
    try:
        private = load_pem_private_key(key_file.read_bytes(), None)
    except OSError as error:
        got = error.strerror or type(error).__name__
    except (ValueError, TypeError, UnsupportedAlgorithm):
        got = "no private key in PEM, or one with a password"
    else:
        if isinstance(private, Ed25519PrivateKey):
            return private
        got = "a key of another kind"
    raise InvalidInput(
        "the signing key can't be used",
        where=str(key_file),
        expected="an Ed25519 private key in PEM",
        got=got,
        next_step=f"make one: openssl genpkey -algorithm ed25519 -out {key_file}",
    )


def sign_as(unsigned: Mapping[str, Any], private: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """Return a statement's envelope under the key of another party, and its public key in PEM."""
    public = private.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return signed_statement(unsigned, statement_key(public, ED25519), private.sign), pem


def read_public_key(path: Path) -> StatementKey:
    """Return a public key from a file in PEM or in OpenSSH's form. Raise InvalidInput."""
    try:
        data = path.read_bytes()[:MAX_KEY_FILE_BYTES]
    except OSError as error:
        raise InvalidInput(
            "the public key can't be read", where=str(path), got=str(error.strerror)
        ) from None
    for load in (load_pem_public_key, load_ssh_public_key):
        with suppress(ValueError, UnsupportedAlgorithm):
            key: Any = load(data)
            ed25519, curve = isinstance(key, Ed25519PublicKey), getattr(key, "curve", None)
            if ed25519 or getattr(curve, "name", "") == "secp256r1":
                return statement_key(key, ED25519 if ed25519 else ECDSA_P256)
    raise InvalidInput(
        "this public key can't sign certificates",
        where=str(path),
        expected="Ed25519 or ECDSA on P-256, in PEM or as OpenSSH writes it",
    )


def statement_key(public: Any, scheme: str) -> StatementKey:
    """Return a public key as one that signs statements from the beginning of the log on."""
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return StatementKey(hashlib.sha256(der).hexdigest(), scheme, der)


def signed_statement(unsigned: Mapping[str, Any], key: StatementKey, sign: SignBytes) -> bytes:
    payload = rfc8785.dumps({"_type": STATEMENT_TYPE, **unsigned})
    return signed_envelope(PAYLOAD_TYPE, payload, key, sign)


def signed_envelope(payload_type: str, payload: bytes, key: StatementKey, sign: SignBytes) -> bytes:
    """Return a DSSE envelope, whose signature was checked."""
    message = pae(payload_type, payload)
    if not key.verifies(signature := sign(message), message):
        raise EnvironmentFault(
            "the signer signed with another key than the model's",
            expected=f"keyid {key.keyid}",
            next_step="name the signer of that key by `signing.signer` in the run file, or replace the "
            "key by `sisa keys rotate`",
        )
    signatures = [{"keyid": key.keyid, "sig": b64encode(signature).decode()}]
    envelope = {"payload": b64encode(payload).decode(), "payloadType": payload_type}
    return rfc8785.dumps({**envelope, "signatures": signatures})
