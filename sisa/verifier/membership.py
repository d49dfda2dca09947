"""Verify that a record is in the served model, or that it is not: a sorted Merkle tree.

The tree is a binary trie over labels of 32 bytes: the output of a verifiable random function (`vrf.py`)
for the record's id. A leaf stands at the shortest prefix that no other label shares. With SHA-256:

    empty = H(2)                          an absent child, and the root of a tree without leaves
    leaf  = H(0 || label || H(value))     value: canonical JSON, {"shard":3,"since":"2026-11-02"}
    inner = H(1 || left || right)         left: the next bit of the label is 0

From the root, the bits of a label lead to one place alone. There the tree has the label's own leaf, or
else an empty child or another leaf: then the label is not in the tree, whatever else it holds.

>>> label, value = bytes(32), b'{"shard":3,"since":"2026-11-02"}'
>>> root = leaf(label, sha256(value).digest())
>>> verify_present(root, label, value, [])
>>> verify_absent(root, b"1" * 32, [], (label, sha256(value).digest()))
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from sisa.verifier.envelope import Refused

LABEL_BYTES, LABEL_BITS = 32, 256
EMPTY_TREE = sha256(b"\x02").digest()

Neighbour = tuple[bytes, bytes]  # the label of another leaf, and the hash of its value


def leaf(label: bytes, value_hash: bytes) -> bytes:
    """Return the hash of a leaf."""
    return sha256(b"\x00" + label + value_hash).digest()


def inner(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return sha256(b"\x01" + left + right).digest()


def bit(label: bytes, depth: int) -> int:
    """Return a bit of a label: 0 leads to the left child of a node at this depth, 1 to the right."""
    return label[depth // 8] >> (7 - depth % 8) & 1


def verify_present(root: bytes, label: bytes, value: bytes, siblings: Sequence[bytes]) -> None:
    """Raise Refused unless the tree holds this label with this value. Siblings: from the root down."""
    _verify(root, label, leaf(label, sha256(value).digest()), siblings)


def verify_absent(
    root: bytes, label: bytes, siblings: Sequence[bytes], neighbour: Neighbour | None
) -> None:
    """Raise Refused unless the label's place in the tree is empty, or is that of another label."""
    if neighbour is None:
        _verify(root, label, EMPTY_TREE, siblings)
        return
    other, value_hash = neighbour
    if other == label or len(value_hash) != LABEL_BYTES:
        raise _refused("a neighbour that is the label itself")
    _verify(root, label, leaf(other, value_hash), siblings)


def fold(label: bytes, node: bytes, siblings: Sequence[bytes]) -> bytes:
    """Return the root above a node, to which the bits of a label lead past these siblings."""
    for depth in reversed(range(len(siblings))):
        pair = (node, siblings[depth])
        node = inner(*(reversed(pair) if bit(label, depth) else pair))
    return node


def _verify(root: bytes, label: bytes, node: bytes, siblings: Sequence[bytes]) -> None:
    if len(label) != LABEL_BYTES or len(siblings) > LABEL_BITS or any(len(s) != 32 for s in siblings):
        raise _refused("a label or a path of the wrong size")
    if fold(label, node, siblings) != root:
        raise _refused("a path to another root")


def _refused(got: str) -> Refused:
    return Refused(
        "the membership proof does not hold", expected="a path to the certified root", got=got
    )
