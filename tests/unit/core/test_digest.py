"""Digests: one byte string a value, one key a purpose, and no way to run parts together."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import Keyed, canonical_json, digest_of, file_sha256, sha256_hex

SECRET = b"s" * 32
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(st.characters(codec="utf-8"), max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abé", max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)
names = st.text(st.characters(codec="utf-8"), max_size=8)


@given(values)
def test_canonical_json_reads_back(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(names, st.integers(), max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict[str, int], order: Any) -> None:
    items = list(value.items())
    order.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


@given(values, values)
def test_equal_bytes_only_for_equal_values(one: Any, other: Any) -> None:
    if canonical_json(one) == canonical_json(other):
        assert one == other


def test_canonical_bytes_are_pinned() -> None:
    value = {"b": [1, 2.5, None, True], "a": "é\n"}
    assert canonical_json(value) == '{"a":"é\\n","b":[1,2.5,null,true]}'.encode()
    assert digest_of(value) == hashlib.sha256(canonical_json(value)).hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan], {"a": math.inf}])
def test_numbers_without_a_json_form_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 300_000)
    assert file_sha256(path) == sha256_hex(b"x" * 300_000)
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "none")


def test_a_keyed_digest_is_hmac_under_a_derived_key() -> None:
    """Pinned by another computation: ledgers at rest are read with it for years."""
    key = hmac.new(SECRET, b"sisa/id", hashlib.sha256).digest()
    body = (3).to_bytes(8, "big") + b"r-1" + (2).to_bytes(8, "big") + "é".encode()
    assert Keyed(SECRET).digest("id", "r-1", "é") == hmac.new(key, body, hashlib.sha256).hexdigest()


@given(st.lists(names, max_size=3), st.lists(names, max_size=3))
def test_parts_do_not_run_together(one: list[str], other: list[str]) -> None:
    keyed = Keyed(SECRET)
    assert (keyed.digest("id", *one) == keyed.digest("id", *other)) == (one == other)


def test_purposes_and_secrets_are_apart() -> None:
    found = {
        Keyed(secret).digest(purpose, "r1")
        for secret in (SECRET, b"t" * 32)
        for purpose in ("id", "subject", "record", "shard", "slice")
    }
    assert len(found) == 10


def test_asking_does_not_change_the_answer() -> None:
    """The derived keys are kept between calls: a used one must not remember its parts."""
    keyed = Keyed(SECRET)
    first = keyed.digest("id", "a")
    keyed.digest("id", "b", "c")
    assert keyed.digest("id", "a") == first == Keyed(SECRET).digest("id", "a")


@given(st.integers(1, 1000), names)
def test_numbers_stay_below_their_bound(bound: int, name: str) -> None:
    assert 0 <= Keyed(SECRET).number("shard", bound, name) < bound


def test_the_name_of_a_secret_does_not_hold_it() -> None:
    keyed = Keyed(SECRET)
    assert keyed.name == Keyed(SECRET).name != Keyed(b"t" * 32).name
    assert SECRET.hex() not in keyed.name
    assert "ssss" not in repr(keyed)


@pytest.mark.parametrize("secret", [b"", b"s" * 31, b"s" * 33])
def test_a_secret_of_another_length_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="expected 32"):
        Keyed(secret)
