"""The verifier of the sorted tree: one place for each label, and no proof for anything else."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest

from sisa.evidence.membership import tree_hash
from sisa.verifier.envelope import Refused
from sisa.verifier.membership import (
    EMPTY_TREE,
    Neighbour,
    bit,
    inner,
    leaf,
    verify_absent,
    verify_present,
)

VALUE = b'{"shard":3,"since":"2026-11-02"}'
VALUE_HASH = sha256(VALUE).digest()
A, B, C = (bytes([first]) + bytes(31) for first in (0b0000_0000, 0b0100_0000, 0b0110_0000))
LEFT = tree_hash([(A, VALUE_HASH), (B, VALUE_HASH), (C, VALUE_HASH)], 1)
ROOT = inner(LEFT, EMPTY_TREE)


def proofs() -> list[tuple[bytes, list[bytes], Neighbour | None]]:
    """Return labels that the tree lacks, with their proofs: an empty place, and a neighbour's."""
    low = inner(leaf(B, VALUE_HASH), leaf(C, VALUE_HASH))
    return [(b"\xff" * 32, [LEFT], None), (b"\x01" * 32, [EMPTY_TREE, low], (A, VALUE_HASH))]


def test_the_shape_is_that_of_the_specification() -> None:
    assert sha256(b"\x02").digest() == EMPTY_TREE
    assert leaf(A, VALUE_HASH) == sha256(b"\x00" + A + VALUE_HASH).digest()
    low = sha256(b"\x01" + leaf(B, VALUE_HASH) + leaf(C, VALUE_HASH)).digest()
    assert inner(inner(leaf(A, VALUE_HASH), low), EMPTY_TREE) == ROOT
    assert [bit(b"\x80\x01", at) for at in (0, 1, 15)] == [1, 0, 1]


def test_what_is_there_verifies_as_present_and_never_as_absent() -> None:
    path = [EMPTY_TREE, leaf(A, VALUE_HASH), leaf(C, VALUE_HASH)]
    verify_present(ROOT, B, VALUE, path)
    for siblings in (path, path[:2], path[:1], []):
        for neighbour in (None, (A, VALUE_HASH), (B, VALUE_HASH), (C, VALUE_HASH)):
            with pytest.raises(Refused):
                verify_absent(ROOT, B, siblings, neighbour)


@pytest.mark.parametrize("proof", proofs())
def test_what_is_not_there_verifies_as_absent_and_never_as_present(
    proof: tuple[bytes, list[bytes], Neighbour | None],
) -> None:
    label, path, neighbour = proof
    verify_absent(ROOT, label, path, neighbour)
    for siblings in (path, path[:1], [], [*path, EMPTY_TREE]):
        with pytest.raises(Refused):
            verify_present(ROOT, label, VALUE, siblings)


def test_no_change_of_a_proof_is_accepted() -> None:
    draw = random.Random(3)
    path = [EMPTY_TREE, leaf(A, VALUE_HASH), leaf(C, VALUE_HASH)]

    def broken(data: bytes) -> bytes:
        at = draw.randrange(len(data))
        return draw.choice(
            [data[:at], data + b"\x00", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]]
        )

    for _ in range(200):
        at = draw.randrange(3)
        for siblings in ([*path[:at], broken(path[at]), *path[at + 1 :]], path[:at], path * 90):
            with pytest.raises(Refused):
                verify_present(ROOT, B, VALUE, siblings)
        for args in ((broken(ROOT), B, VALUE), (ROOT, broken(B), VALUE), (ROOT, B, broken(VALUE))):
            with pytest.raises(Refused):
                verify_present(*args, path)
        for label, siblings, neighbour in proofs():
            other = neighbour and draw.choice([(broken(A), VALUE_HASH), (A, broken(VALUE_HASH))])
            for root, hidden in ((broken(ROOT), neighbour), (ROOT, other or (label, VALUE_HASH))):
                with pytest.raises(Refused):
                    verify_absent(root, label, siblings, hidden)
