"""Sign the files of an export in the format of OpenSSF Model Signing, `model.sig`.

The file is a Sigstore bundle around a DSSE envelope around an in-toto statement that names every other
file with its SHA-256. `model_signing verify key` checks it with the public key alone. `check_signature`
does the same, and accepts only the form that `sign_files` writes. The format's key method knows ECDSA on
NIST curves alone, so exports have a P-256 key of their own.

>>> key = ec.generate_private_key(ec.SECP256R1())
>>> digests = {"adapter_model.safetensors": "ab" * 32, "README.md": "cd" * 32}
>>> signature = sign_files("v1-shard-00000", digests, key)
>>> check_signature(signature, digests, key.public_key())
>>> sorted(strict_json(signature, SIGNATURE))
['dsseEnvelope', 'mediaType', 'verificationMaterial']
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import sha256_hex
from sisa.store.exports import CARD, MODEL_WEIGHTS, SIGNATURE
from sisa.verifier.certificate import CERTIFICATES
from sisa.verifier.envelope import PAYLOAD_TYPE, Refused, base64_bytes, pae, strict_json

PREDICATE = "https://model_signing/signature/v1.0"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IGNORED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")  # not signed; hubs add them
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
REVOKED_BY = """
A deletion that touches this export revokes it, wherever it was copied to. The deletion's certificate is
in the log `{log}`, is of a type among {types}, and lists under `revokes` the SHA-256
of `{weights}`: `{sha256}`.
So does the operator's feed, beside the log: `sisa check-adapter DIRECTORY --feed revocations.json --key
keys.json` says offline whether this must go.

`model.sig` signs the other files (OpenSSF Model Signing). With the key beside the log, `model_signing
verify key DIRECTORY --signature DIRECTORY/model.sig --public_key exports.pem` checks it.
"""
_ECDSA = ec.ECDSA(hashes.SHA256())


def export_key(log_seed: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the key that signs exports, drawn from the log's seed (FIPS 186-5, A.2.1)."""
    drawn = HKDF(hashes.SHA256(), 40, None, b"deletion-ready-model/exports/v1").derive(log_seed)
    return ec.derive_private_key(int.from_bytes(drawn) % (P256_ORDER - 1) + 1, ec.SECP256R1())


def sign_export(
    log: str, key: ec.EllipticCurvePrivateKey, name: str, files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Return the files of an export: its card says what would revoke it, and `model.sig` signs them."""
    (weights,) = {ADAPTER_FILE, MODEL_WEIGHTS} & files.keys()
    types = ", ".join(f"`{each}`" for each in CERTIFICATES)
    sha256 = sha256_hex(files[weights])
    revoked_by = REVOKED_BY.format(log=log, types=types, weights=weights, sha256=sha256)
    signed = {**files, CARD: files[CARD] + revoked_by.encode()}
    digests = {each: sha256_hex(data) for each, data in signed.items()}
    return {**signed, SIGNATURE: sign_files(name, digests, key)}


def sign_files(name: str, digests: Mapping[str, str], key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return `model.sig` of a directory with these files, each with its sha256."""
    payload = _payload(name, _signable(digests))
    return _bundle(payload, key.sign(pae(PAYLOAD_TYPE, payload), _ECDSA), key.public_key())


def check_signature(data: bytes, digests: Mapping[str, str], public: ec.EllipticCurvePublicKey) -> None:
    """Raise Refused unless `data` is the signature of exactly these files by this key."""
    signed, found = signed_files(data, public), _signable(digests)
    if differing := sorted(name for name, _ in signed.items() ^ found.items()):
        got = ", ".join(dict.fromkeys(differing))
        raise Refused("the files are not those that were signed", got=f"{got} differ", where=SIGNATURE)


def signed_files(data: bytes, public: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """Return the sha256 of each signed file by its name. Raise Refused if another key signed."""
    try:
        envelope = strict_json(data, SIGNATURE)["dsseEnvelope"]
        payload = base64_bytes(envelope["payload"], SIGNATURE)
        signature = base64_bytes(envelope["signatures"][0]["sig"], SIGNATURE)
        statement = strict_json(payload, SIGNATURE)
        signed = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
        form = _payload(statement["subject"][0]["name"], signed), _bundle(payload, signature, public)
        public.verify(signature, pae(PAYLOAD_TYPE, payload), _ECDSA)
    except (AttributeError, LookupError, TypeError, ValueError, InvalidSignature) as error:
        got = type(error).__name__
        raise Refused(
            "the export's signature is malformed, or wrong", got=got, where=SIGNATURE
        ) from None
    if form != (payload, data):
        raise Refused("the export's signature is another key's, or of another form", where=SIGNATURE)
    return signed


def signed_weights(files: Mapping[str, str], public: bytes) -> list[str]:
    """Return the paths of those weights (sha256 by path) that a `model.sig` beside them signs.

    Raise Refused if it signs other weights, or if another key than `public` (DER) made it.
    """
    signed = []
    for path, sha256 in files.items():
        beside = Path(path).with_name(SIGNATURE)
        if not beside.is_file():
            continue
        key = load_der_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise Refused("the model's public keys name none of exports", expected="ECDSA on P-256")
        listed = signed_files(beside.read_bytes(), key).get(Path(path).name)
        if listed != sha256:
            what, step = "these weights are not those that were exported", "get the export again"
            raise Refused(what, listed or "no such file", sha256, path, step)
        signed.append(path)
    return signed


def public_pem(public: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as the file that `model_signing verify key --public_key` takes."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _signable(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: each for name, each in digests.items() if name.partition("/")[0] not in IGNORED}


def _payload(name: str, digests: Mapping[str, str]) -> bytes:
    files = [
        {"name": each, "algorithm": "sha256", "digest": digest}
        for each, digest in sorted(digests.items())
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in files)).hexdigest()
    how = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": list(IGNORED),
    }
    statement: Any = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE,
        "predicate": {"serialization": how, "resources": files},
    }
    return rfc8785.dumps(statement)


def _bundle(payload: bytes, signature: bytes, public: ec.EllipticCurvePublicKey) -> bytes:
    envelope: Any = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    hint = hashlib.sha256(public_pem(public)).hexdigest()
    material: Any = {"publicKey": {"hint": hint}, "tlogEntries": []}
    return rfc8785.dumps(
        {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    )
