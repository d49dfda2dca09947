"""Read signed statements: strict JSON, DSSE envelopes, and the file of public keys.

An envelope (Dead Simple Signing Envelope 1.0.2) is canonical JSON here, so that it has one form:
`{"payload": BASE64, "payloadType": T, "signatures": [{"keyid", "sig"}]}`. Evidence is an in-toto
Statement v1. The file of public keys is an envelope, too, signed by its last key:

    {"type": "deletion-ready-model/keys/v1", "model": 32 HEX DIGITS, "log": VKEY, "vrf": 64 HEX DIGITS,
     "certificates": [{"keyid", "scheme", "public", "since", "until"}, ...], "exports": PUBLIC}

`public` is a SubjectPublicKeyInfo (DER, base64), and `keyid` its sha256. A key signs entries of the log
from `since` on and before `until`; the last key has no `until`. The signature shows that nobody altered
the file, not whose it is: get the last keyid from the model's owner.

>>> pae("http://example.com/HelloWorld", b"hello world")
b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
>>> strict_json(b'{"a": 1, "b": [true, 0.5]}', "the example")
{'a': 1, 'b': [True, 0.5]}
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

STATEMENT_TYPE, PAYLOAD_TYPE = "https://in-toto.io/Statement/v1", "application/vnd.in-toto+json"
KEYS_TYPE = "deletion-ready-model/keys/v1"
KEYS_PAYLOAD_TYPE = "application/vnd.deletion-ready-model.keys+json"
ED25519, ECDSA_P256 = "ed25519", "ecdsa-sha2-nistp256"  # as securesystemslib calls them
MODEL, SHA256_HEX = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")
_NAMED = {"name": str, "digest": {"sha256": SHA256_HEX}}
STATEMENT_FORM = {"_type": STATEMENT_TYPE, "subject": [_NAMED], "predicateType": str, "predicate": dict}
_KEY = {"keyid": str, "scheme": str, "public": str, "since": int, "until": int | None}
_KEYS = {"type": KEYS_TYPE, "model": MODEL, "certificates": [_KEY], "log": str, "vrf": SHA256_HEX}
_KEYS |= {"exports": str}
MAX_BYTES, MAX_DEPTH, MAX_SIGNATURES, MAX_NUMBER = 1 << 25, 32, 16, 1 << 53


@dataclass(eq=False)
class Refused(ValueError):
    """Evidence that does not show what it should; the only exception that this package raises."""

    what: str
    expected: str = ""
    got: str = ""
    where: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        facts = [f"{name.replace('_', ' ')}: {fact}" for name, fact in vars(self).items() if fact]
        return "\n  ".join([self.what, *facts[1:]])


def strict_json(data: bytes, what: str) -> Any:
    """Return JSON that has one meaning: no doubled members, no huge numbers, text and depth bounded."""
    if len(data) > MAX_BYTES:
        raise Refused(f"{what} is too large", f"at most {MAX_BYTES} bytes", f"{len(data)}")
    numbers: Any = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _number)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once, **numbers)
        _check_depth(value, MAX_DEPTH)
        canonical(value)  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        got = str(error) if type(error) is ValueError else type(error).__name__
        raise Refused(f"{what} is not strict JSON", got=got) from None
    return value


def canonical(value: Any) -> bytes:
    """Return the one form of a JSON value without fractions (RFC 8785)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


class Among(dict[str, Any]):
    """The form of an object that has these members, and may have others."""


def check_form(value: Any, what: str, form: Any, where: str = "") -> Any:
    """Return a value of a form. Raise Refused.

    A form is a type, a pattern, the text itself, `[form]` of every item of a list, or an object's
    members with their forms: exactly these, or these `Among` others.
    """
    if isinstance(form, dict):
        right, expected = isinstance(value, dict) and value.keys() >= form.keys(), ", ".join(form)
        right = right and (isinstance(form, Among) or len(value) == len(form))
    elif isinstance(form, list):
        right, expected = isinstance(value, list), "a list"
    elif isinstance(form, re.Pattern):
        right, expected = isinstance(value, str) and bool(form.fullmatch(value)), form.pattern
    elif isinstance(form, str):
        right, expected = value == form, form
    else:  # JSON's true is no number
        right = isinstance(value, form) and isinstance(value, bool) == (form is bool)
        expected = getattr(form, "__name__", str(form))
    if not right:
        raise Refused(f"{what} has another form or version", expected, where=where)
    for name, each in form.items() if isinstance(form, dict) else ():
        check_form(value[name], what, each, name)
    for each in value if isinstance(form, list) else ():
        check_form(each, what, form[0], where)
    return value


def parse_canonical(data: bytes, what: str, form: Any, end: bytes = b"") -> dict[str, Any]:
    """Return the members of a JSON object of a form, in its one way to be written, before `end`."""
    found: dict[str, Any] = check_form(strict_json(data, what), what, form)
    if canonical(found) + end != data:
        raise Refused(f"{what} is not in canonical form", next_step="get it as it was published")
    return found


def base64_bytes(text: str, what: str) -> bytes:
    """Return the bytes that padded base64 encodes, if it is the one form that does."""
    with suppress(ValueError):
        data = b64decode(text, validate=True)
        if b64encode(data).decode() == text:
            return data
    raise Refused(f"{what} is not base64")


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class StatementKey:
    """A key that signs statements, and the entries of the log for which it holds."""

    keyid: str
    scheme: str
    public: bytes  # SubjectPublicKeyInfo, DER
    since: int = 0
    until: int | None = None

    def holds(self, index: int | None) -> bool:
        """Return whether the key may sign entry `index`; only the last key may sign outside the log."""
        end = MAX_NUMBER if self.until is None else self.until
        return self.until is None if index is None else self.since <= index < end

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether the key signed a message."""
        key: Any = load_der_public_key(self.public)
        with suppress(InvalidSignature):
            key.verify(signature, message, *([ECDSA(SHA256())] if self.scheme == ECDSA_P256 else []))
            return True
        return False


@dataclass(frozen=True)
class PublicKeys:
    """The public keys of evidence; `statement_keys` (`certificates` in the file) are oldest first."""

    model: str
    statement_keys: tuple[StatementKey, ...]
    log: str  # a vkey (C2SP signed note)
    vrf: bytes
    exports: bytes = b""  # of `model.sig` in exports: SubjectPublicKeyInfo (DER) of ECDSA on P-256

    @property
    def present(self) -> StatementKey:
        """Return the key that signs statements now; it has no end yet."""
        return self.statement_keys[-1]


def verify_envelope(data: bytes, keys: PublicKeys, index: int | None = None) -> dict[str, Any]:
    """Return the statement in an envelope, signed by a key that holds for entry `index` of the log.

    Without an index, the statement is in no log, and the present key must have signed it.
    """
    value, message, made = _opened(data, "the envelope", PAYLOAD_TYPE)
    signed = _signers("the envelope", keys.statement_keys, message, made)
    if not any(key.holds(index) for key in signed):
        what = "its key did not hold then" if signed else "none of the public keys signed it"
        expected = " or ".join(f"one for entries from {key.since} to {key.until}" for key in signed)
        got = "no proof from the log" if index is None else f"entry {index}"
        raise Refused(what, expected, got, "the envelope", "get the public keys of its model and time")
    statement: dict[str, Any] = check_form(value, "the statement", STATEMENT_FORM)
    return statement


def parse_keys(data: bytes) -> PublicKeys:
    """Return the keys in a file of public keys, which the last of them signed."""
    value, message, made = _opened(data, "the file of public keys", KEYS_PAYLOAD_TYPE)
    keys = public_keys(value)
    if not _signers("the file of public keys", [keys.present], message, made):
        raise Refused("the file of public keys is not signed by its last key")
    return keys


def _opened(data: bytes, what: str, kind: str) -> tuple[Any, bytes, dict[str, bytes]]:
    """Return an envelope's payload, the bytes that are signed, and unverified signatures by keyid."""
    form = {"payload": str, "payloadType": kind, "signatures": [{"keyid": str, "sig": str}]}
    envelope = parse_canonical(data, what, form)
    made = [(each["keyid"], base64_bytes(each["sig"], "a signature")) for each in envelope["signatures"]]
    if not 0 < len(signatures := dict(made)) == len(made) <= MAX_SIGNATURES:
        raise Refused(f"{what} needs 1 to {MAX_SIGNATURES} signatures, each by another key")
    payload = base64_bytes(envelope["payload"], "the payload")
    return strict_json(payload, f"the payload of {what}"), pae(kind, payload), signatures


def _signers(
    what: str, keys: Sequence[StatementKey], message: bytes, made: dict[str, bytes]
) -> list[StatementKey]:
    """Return the keys that signed. Raise Refused if a signature of one of them is wrong."""
    signed = [key for key in keys if key.keyid in made]
    if not all(key.verifies(made[key.keyid], message) for key in signed):
        raise Refused(f"a signature of {what} is wrong")
    return signed


def public_keys(value: Any) -> PublicKeys:
    """Return the keys in the payload of a file of public keys, whoever signed it."""
    body = check_form(value, "the file of public keys", _KEYS)
    keys = tuple(_statement_key(each) for each in body["certificates"])
    bounds: list[Any] = [0, *(each for key in keys for each in (key.since, key.until))]
    ordered = bounds.pop() is None and None not in bounds and bounds == sorted(bounds)
    if not ordered or len({key.keyid for key in keys}) < len(keys):
        raise Refused("the public keys do not follow each other", "the last one without end")
    exports = base64_bytes(body["exports"], "the key of exports")
    return PublicKeys(body["model"], keys, body["log"], bytes.fromhex(body["vrf"]), exports)


def _statement_key(body: dict[str, Any]) -> StatementKey:
    key = StatementKey(**{**body, "public": base64_bytes(body["public"], "a public key")})
    scheme = ""
    with suppress(ValueError, UnsupportedAlgorithm):
        loaded: Any = load_der_public_key(key.public)
        is_p256 = getattr(getattr(loaded, "curve", None), "name", "") == "secp256r1"
        scheme = ED25519 if isinstance(loaded, Ed25519PublicKey) else ECDSA_P256 * is_p256
    if (key.scheme, key.keyid) != (scheme, hashlib.sha256(key.public).hexdigest()):
        raise Refused("a public key is not of its scheme and keyid", scheme or "a known scheme")
    return key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a member twice")
    return found


def _number(text: str) -> float:
    if not abs(number := float(text)) < MAX_NUMBER:  # NaN is not less than anything
        raise ValueError("a number out of range")
    return int(text) if text.lstrip("-").isdigit() else number


def _check_depth(value: Any, depth: int) -> None:
    if not depth:
        raise ValueError("nested too deeply")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(each, depth - 1)
