"""Envelopes and files of public keys: the standard's vector, what is refused, mutations of each."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.verifier.envelope import (
    ECDSA_P256,
    ED25519,
    KEYS_PAYLOAD_TYPE,
    KEYS_TYPE,
    MAX_BYTES,
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    STATEMENT_TYPE,
    Among,
    PublicKeys,
    Refused,
    StatementKey,
    base64_bytes,
    canonical,
    check_form,
    pae,
    parse_keys,
    strict_json,
    verify_envelope,
)
from tests.models.mutants import mutants

Private = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
NUM_MUTATIONS = 1_000
MODEL, VKEY, VRF = "0f" * 16, "deletion-ready-model/0f+00000000+AAAA", bytes(range(32))
OLD, NEW, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(3))
EXPORTS = b"a key of exports"
P256 = ec.derive_private_key(7, ec.SECP256R1())
STATEMENT = {
    "_type": STATEMENT_TYPE,
    "subject": [{"name": "shard-00000", "digest": {"sha256": "ab" * 32}}],
    "predicateType": "urn:example:v1",
    "predicate": {"model": MODEL, "sequence": 3, "share": 0.25, "names": ["ä", "\n"]},
}


def public(private: Private, since: int = 0, until: int | None = None) -> StatementKey:
    der = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    scheme = ED25519 if isinstance(private, Ed25519PrivateKey) else ECDSA_P256
    return StatementKey(hashlib.sha256(der).hexdigest(), scheme, der, since, until)


def signature(private: Private, message: bytes) -> dict[str, str]:
    if isinstance(private, Ed25519PrivateKey):
        made = private.sign(message)
    else:
        made = private.sign(message, ec.ECDSA(SHA256()))
    return {"keyid": public(private).keyid, "sig": b64encode(made).decode()}


def envelope(
    payload: Any = STATEMENT, *signers: Private, payload_type: str = PAYLOAD_TYPE, **other: Any
) -> bytes:
    data = payload if isinstance(payload, bytes) else canonical(payload)
    made = [signature(each, pae(payload_type, data)) for each in signers or [NEW]]
    whole = {"payload": b64encode(data).decode(), "payloadType": payload_type, "signatures": made}
    return canonical(whole | other)


def body(*keys: StatementKey, **other: Any) -> dict[str, Any]:
    listed = [asdict(key) | {"public": b64encode(key.public).decode()} for key in keys]
    whole = {"type": KEYS_TYPE, "model": MODEL, "certificates": listed, "log": VKEY, "vrf": VRF.hex()}
    whole["exports"] = b64encode(EXPORTS).decode()
    return whole | other


def keys_file(content: dict[str, Any], *signers: Private) -> bytes:
    return envelope(content, *signers, payload_type=KEYS_PAYLOAD_TYPE)


KEYS = PublicKeys(MODEL, (public(OLD, 0, 4), public(NEW, 4)), VKEY, VRF, EXPORTS)


@cache
def good_keys_file() -> bytes:
    return keys_file(body(*KEYS.statement_keys), NEW)


def refused(check: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        check()
    assert caught.value.what
    return caught.value


def test_the_standards_own_envelope_verifies() -> None:
    """The vector of the DSSE protocol, whose signature is r and s side by side."""
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    made = b64decode(
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    )
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    sig = encode_dss_signature(int.from_bytes(made[:32]), int.from_bytes(made[32:]))
    found = StatementKey(hashlib.sha256(der).hexdigest(), ECDSA_P256, der)
    assert found.verifies(sig, pae("http://example.com/HelloWorld", b"hello world"))
    assert not found.verifies(sig, pae("http://example.com/HelloWorld", b"hello worle"))


def test_both_schemes_sign_statements() -> None:
    keys = replace(KEYS, statement_keys=(public(P256),))
    assert verify_envelope(envelope(), KEYS) == STATEMENT
    assert verify_envelope(envelope(STATEMENT, P256), keys) == STATEMENT


def test_a_file_of_public_keys_gives_what_was_written() -> None:
    assert parse_keys(good_keys_file()) == KEYS
    mixed = body(public(P256, 0, 9), public(NEW, 9))
    assert parse_keys(keys_file(mixed, NEW)).statement_keys[0].scheme == ECDSA_P256


@pytest.mark.parametrize(
    ("signer", "index", "holds"),
    [
        *((OLD, 0, True), (OLD, 3, True), (OLD, 4, False), (OLD, None, False)),
        *((NEW, 3, False), (NEW, 4, True), (NEW, 10**9, True), (NEW, None, True)),
    ],
)
def test_a_key_signs_the_entries_of_its_time(signer: Private, index: int | None, holds: bool) -> None:
    if holds:
        assert verify_envelope(envelope(STATEMENT, signer), KEYS, index) == STATEMENT
        return
    error = refused(lambda: verify_envelope(envelope(STATEMENT, signer), KEYS, index))
    assert "did not hold" in error.what
    assert error.expected
    assert error.got


def test_signatures_of_unknown_keys_are_ignored() -> None:
    assert verify_envelope(envelope(STATEMENT, OTHER, NEW, P256), KEYS) == STATEMENT


def test_an_envelope_of_another_owner_is_refused() -> None:
    error = refused(lambda: verify_envelope(envelope(STATEMENT, OTHER), KEYS))
    assert "none of the public keys" in error.what
    assert error.next_step


def with_signatures(*made: dict[str, str]) -> bytes:
    return canonical({**json.loads(envelope()), "signatures": list(made)})


def test_a_false_signature_is_refused_beside_a_true_one() -> None:
    true, other = signature(NEW, pae(PAYLOAD_TYPE, canonical(STATEMENT))), signature(OLD, b"other")
    assert "wrong" in refused(lambda: verify_envelope(with_signatures(true, other), KEYS)).what
    as_old = {**true, "keyid": public(OLD).keyid}
    assert "wrong" in refused(lambda: verify_envelope(with_signatures(as_old), KEYS)).what


@pytest.mark.parametrize(
    "made",
    [
        *([], [signature(NEW, pae(PAYLOAD_TYPE, canonical(STATEMENT)))] * 2),
        [{"keyid": f"{n}", "sig": ""} for n in range(MAX_SIGNATURES + 1)],
        *([{"sig": ""}], [{"keyid": "", "sig": "", "more": ""}], [{"keyid": "", "sig": "A"}], [3]),
    ],
)
def test_lists_of_signatures_that_are_refused(made: list[Any]) -> None:
    refused(lambda: verify_envelope(with_signatures(*made), KEYS))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{}", b"null", b"[]", b"\xff", b'{"payload": 1}'),
        envelope()[:-1],
        envelope() + b"\n",
        json.dumps(json.loads(envelope())).encode(),  # with blanks
        b'{"payload":"",' + envelope()[1:],  # a member twice
        envelope(more=1),
        envelope(payload="e30"),  # without padding
        envelope(payloadType="application/json"),
        envelope(payload_type="application/vnd.in-toto+json; charset=utf-8"),
        envelope(b"not JSON"),
        envelope(b'{"_type":1,"_type":1}'),
        envelope([]),
        envelope({**STATEMENT, "_type": "https://in-toto.io/Statement/v0.1"}),
        envelope({**STATEMENT, "_type": "https://in-toto.io/Statement/v2"}),
        envelope({**STATEMENT, "predicate": []}),
        envelope({**STATEMENT, "subject": {}}),
        envelope({**STATEMENT, "subject": [{"name": "a", "digest": {"sha256": "AB" * 32}}]}),
        envelope({**STATEMENT, "subject": [{"name": "a", "digest": {"md5": "ab" * 16}}]}),
        envelope({**STATEMENT, "more": 1}),
        good_keys_file(),
    ],
)
def test_envelopes_that_are_refused(data: bytes) -> None:
    refused(lambda: verify_envelope(data, KEYS))


NO_INDEX: list[Any] = [None, True, 0.0, "0", 1 << 60]
CURVE = ec.derive_private_key(7, ec.SECP256K1())


@pytest.mark.parametrize(
    "content",
    [
        *(body(), body(public(OLD))),  # none, and one that did not sign
        body(public(NEW), type="deletion-ready-model/keys/v2"),
        body(public(NEW), model="0f"),
        body(public(NEW), vrf="0f"),
        body(public(NEW), log=None),
        body(public(NEW), more=1),
        body(public(NEW), certificates={}),
        body(public(NEW, 0, 9)),  # no present key
        body(public(OLD), public(NEW)),  # two present keys
        body(public(OLD, 0, 5), public(NEW, 4)),  # at the same time
        body(public(OLD, 5, 4), public(NEW, 6)),
        body(public(OLD, -1, 4), public(NEW, 6)),
        body(public(NEW, 0, 4), public(NEW, 4)),
        body(replace(public(NEW), keyid=public(OLD).keyid)),
        body(replace(public(NEW), scheme=ECDSA_P256)),
        body(replace(public(NEW), scheme="rsassa-pss-sha256")),
        body(replace(public(CURVE), scheme=ECDSA_P256), public(NEW)),
        body(replace(public(NEW), public=public(NEW).public[:-1])),
        body(replace(public(NEW), public=b"")),
        *(body(replace(public(NEW), **{"since": each})) for each in NO_INDEX),
    ],
)
def test_files_of_public_keys_that_are_refused(content: dict[str, Any]) -> None:
    refused(lambda: parse_keys(keys_file(content, NEW)))


def test_only_the_last_key_signs_the_file() -> None:
    content = body(*KEYS.statement_keys)
    assert parse_keys(keys_file(content, OLD, NEW)) == KEYS
    refused(lambda: parse_keys(keys_file(content, OLD)))
    refused(lambda: parse_keys(envelope(content)))  # as a statement


@pytest.mark.parametrize(
    "data",
    [
        *(b"NaN", b"-Infinity", b"1e999", b"1" * 5_000, b"9007199254740993", b"-1e300", b'"\\ud800"'),
        *(b"[" * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40, b"\xef\xbb\xbf1", b'"\xff"', b"1 2", b""),
        *(b'{"a":1,"\\u0061":2}', b"[01]", b"'a'", b"True", b" " * (MAX_BYTES + 1)),
    ],
)
def test_json_that_is_refused(data: bytes) -> None:
    error = refused(lambda: strict_json(data, "the example"))
    assert error.what.startswith("the example ")
    assert error.got


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**52), 2**52) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(JSON)
def test_canonical_json_is_read_as_it_was_written(value: Any) -> None:
    try:
        data = canonical(value)
    except UnicodeEncodeError:
        return  # half of a surrogate pair as a name
    assert strict_json(data, "the example") == value


@given(st.binary(max_size=40))
def test_base64_has_one_form(data: bytes) -> None:
    text = b64encode(data).decode()
    assert base64_bytes(text, "the example") == data
    for other in (text + "\n", text.rstrip("=") + " ", "A" + text):
        refused(partial(base64_bytes, other, "the example"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1, bool), ("a", int), (1.0, int), (None, str), ("b", "a"), (3, "3")],
)
def test_members_of_other_types_are_refused(value: Any, kind: Any) -> None:
    for whole, form in (({"x": value}, {"x": kind}), ({"x": [value]}, {"x": [kind]})):
        error = refused(partial(check_form, whole, "the example", form))
        assert (error.where, bool(error.expected)) == ("x", True)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"x": None}, {"x": int | None}),
        ({"x": [], "y": True}, {"x": [int], "y": bool}),
        ({"x": [{"y": 1}, {"y": 2, "z": 3}]}, {"x": [Among({"y": int})]}),
    ],
)
def test_forms_are_met_at_every_depth_and_without_unknown_members(value: Any, form: Any) -> None:
    assert check_form(value, "the example", form) == value
    others: list[Any] = [value | {"more": 1}, {}, [value], None]
    for other in others:
        refused(partial(check_form, other, "the example", form))
    assert check_form(value | {"more": 1}, "the example", Among(form))
    refused(lambda: check_form({"x": [{"z": 3}]}, "the example", {"x": [Among({"y": int})]}))
    refused(lambda: check_form({"x": [{"y": 1, "z": 3}]}, "the example", {"x": [{"y": int}]}))


def check_mutations(
    data: bytes, replays: Sequence[bytes], check: Callable[[bytes], object], seed: int
) -> None:
    """Expect that every mutation is refused, and by nothing but Refused."""
    accepted = []
    for each in mutants(data, NUM_MUTATIONS, seed=seed, replays=replays):
        try:
            check(each)
        except Refused:
            continue
        accepted.append(each)
    assert accepted == []


def inside(data: bytes, seed: int) -> list[bytes]:
    """Return envelopes whose payload was mutated under the old signature."""
    whole = json.loads(data)
    payloads = mutants(b64decode(whole["payload"]), NUM_MUTATIONS // 4, seed=seed)
    return [canonical({**whole, "payload": b64encode(each).decode()}) for each in payloads]


def test_no_mutation_of_an_envelope_is_accepted() -> None:
    data = envelope()
    others = [*inside(data, 1), envelope(STATEMENT, OTHER), envelope(STATEMENT, OLD), good_keys_file()]
    check_mutations(data, others, lambda each: verify_envelope(each, KEYS), seed=2)


def test_no_mutation_of_a_file_of_public_keys_is_accepted() -> None:
    data = good_keys_file()
    others = [*inside(data, 3), envelope(), keys_file(body(*KEYS.statement_keys), OLD)]
    check_mutations(data, others, parse_keys, seed=4)
