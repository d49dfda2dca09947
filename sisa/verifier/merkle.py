"""Merkle trees of RFC 6962, section 2.1: hashes, roots, and proofs of inclusion and consistency.

>>> leaves = [leaf_hash(entry) for entry in (b"a", b"b", b"c")]
>>> verify_inclusion(leaves[2], 2, 3, [node_hash(*leaves[:2])], root(leaves))
>>> verify_consistency(2, 3, [leaves[2]], root(leaves[:2]), root(leaves))
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from sisa.verifier.envelope import Refused

EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of an entry as a leaf."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node over its two children."""
    return sha256(b"\x01" + left + right).digest()


def root(level: Sequence[bytes]) -> bytes:
    """Return the root of the tree over some leaves, or over complete subtrees and a last smaller one."""
    while len(level) > 1:
        level = parents(level)
    return level[0] if level else EMPTY_ROOT


def parents(level: Sequence[bytes]) -> list[bytes]:
    """Return the nodes above those of a level; the last of an odd number stays as it is."""
    pairs = (level[at : at + 2] for at in range(0, len(level), 2))
    return [node_hash(*pair) if len(pair) == 2 else pair[0] for pair in pairs]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Raise Refused unless the leaf is at `index` of the tree with this size and root."""
    if not 0 <= index < size:
        raise _refused(f"an index from 0 to {size - 1}", f"{index}")
    if (found := _climb(index, size - 1, [leaf, *path])[1]) != root:
        raise _refused(f"the root {root.hex()}", found.hex())


def verify_consistency(
    size1: int, size2: int, path: Sequence[bytes], root1: bytes, root2: bytes
) -> None:
    """Raise Refused unless the tree of `size2` leaves continues the tree of `size1` leaves."""
    if not path and (size1, root1) in ((0, EMPTY_ROOT), (size2, root2)):
        return
    if not 0 < size1 < size2:
        raise _refused(f"from 1 to {size2 - 1} leaves; none, or as many, with their root", f"{size1}")
    at, last = size1 - 1, size2 - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    found = _climb(at, last, [*path] if at else [root1, *path])
    if found != (root1, root2):
        raise _refused(f"the roots {root1.hex()} and {root2.hex()}", " and ".join(map(bytes.hex, found)))


def _climb(at: int, last: int, hashes: list[bytes]) -> tuple[bytes, bytes]:
    """Return the roots over nodes 0 to `at` and 0 to `last`, by the hash of node `at` and its path."""
    if not hashes or any(len(each) != len(EMPTY_ROOT) for each in hashes):
        raise _refused("hashes of 32 bytes", "another length, or none")
    before = whole = hashes.pop(0)
    while last and hashes:
        sibling = hashes.pop(0)
        if at & 1 or at == last:
            before, whole = node_hash(sibling, before), node_hash(sibling, whole)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            whole = node_hash(whole, sibling)
        at, last = at >> 1, last >> 1
    if last or hashes:
        raise _refused("a path from a leaf to the root", "a shorter or a longer one")
    return before, whole


def _refused(expected: str, got: str) -> Refused:
    what = "a proof of the transparency log does not hold"
    return Refused(what, expected, got, next_step="keep the files: they are evidence")
