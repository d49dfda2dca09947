"""Verify that a record is in the served model, or that it is not: a sorted Merkle tree.

The tree is a binary trie over labels of 32 bytes: the first half of the output of a verifiable random
function (`vrf.py`) for the record's id. A leaf is at the shortest prefix that no other label shares.

    empty = sha256(2)                          an absent child, and the root of a tree without leaves
    leaf  = sha256(0 || label || sha256(value))         value: {"shard":3,"since":"2026-11-02"}
    inner = sha256(1 || left || right)         left: the next bit of the label is 0

From a root, the bits of a label lead to one place alone. There the tree has the label's own leaf, or
else an empty child or another leaf: then the label is not in the tree, whatever else it holds. The owner
of the key determines each leaf's shard and date, and signs the same tree for everybody.

>>> label, value = bytes(32), b'{"shard":3,"since":"2026-11-02"}'
>>> root = leaf(label, sha256(value).digest())
>>> verify_present(root, label, value, [])
>>> verify_absent(root, b"1" * 32, [], (label, sha256(value).digest()))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sisa.verifier.certificate import CHAINED, Certificate, verify_logged
from sisa.verifier.envelope import (
    SHA256_HEX,
    PublicKeys,
    Refused,
    canonical,
    check_form,
    parse_canonical,
)
from sisa.verifier.merkle import leaf_hash, node_hash
from sisa.verifier.vrf import verify_output

MEMBERSHIP_FILE = "deletion-ready-model/membership-proof/v1"
LABEL_BYTES, LABEL_BITS = 32, 256
EMPTY_TREE = sha256(b"\x02").digest()
_FILE = {"type": MEMBERSHIP_FILE, "id": str, "vrf": re.compile("[0-9a-f]{160}"), "state": str}
_FILE |= {"leaf": dict | None, "path": [SHA256_HEX]}

Neighbour = tuple[bytes, bytes]  # the label of another leaf, and the hash of its value


@dataclass(frozen=True)
class MembershipProof:
    """What a proof shows of an id: shard and date, or None if it is not in what a statement is about."""

    record_id: str
    present: dict[str, Any] | None
    state: Certificate


def verify_membership(data: bytes, keys: PublicKeys) -> MembershipProof:
    """Return what a membership proof file shows. Raise Refused."""
    file = parse_canonical(data, "the membership proof", _FILE, b"\n")
    state = verify_logged(file["state"].encode(), keys)
    if state.kind not in CHAINED:
        raise Refused("the proof is about no state", " or ".join(CHAINED), state.kind[:80])
    root = bytes.fromhex(state.statement["predicate"]["membership"]["after"])
    label = verify_output(keys.vrf, file["id"].encode(), bytes.fromhex(file["vrf"]))[:LABEL_BYTES]
    found, siblings = file["leaf"], [bytes.fromhex(each) for each in file["path"]]
    if found and "shard" in found:
        place = check_form(found, "a place", {"shard": int, "since": str})
        verify_present(root, label, canonical(place), siblings)
        return MembershipProof(file["id"], place, state)
    if found is not None:
        check_form(found, "a neighbour", {"label": SHA256_HEX, "value_hash": SHA256_HEX})
    neighbour = found and (bytes.fromhex(found["label"]), bytes.fromhex(found["value_hash"]))
    verify_absent(root, label, siblings, neighbour)
    return MembershipProof(file["id"], None, state)


def verify_present(root: bytes, label: bytes, value: bytes, siblings: Sequence[bytes]) -> None:
    """Raise Refused unless the tree holds this label with this value. Siblings: from the root down."""
    _verify(root, label, leaf(label, sha256(value).digest()), siblings)


def verify_absent(root: bytes, label: bytes, siblings: Sequence[bytes], other: Neighbour | None) -> None:
    """Raise Refused unless the label's place in the tree is empty or holds another label."""
    if other is not None and (other[0] == label or [len(each) for each in other] != [LABEL_BYTES] * 2):
        raise Refused("the membership proof does not hold", got="a neighbour that is no other leaf")
    _verify(root, label, EMPTY_TREE if other is None else leaf(*other), siblings)


def leaf(label: bytes, value_hash: bytes) -> bytes:
    """Return the hash of a leaf."""
    return leaf_hash(label + value_hash)


def bits(label: bytes) -> str:
    """Return the bits of a label; from the root down, 0 leads to the left and 1 to the right."""
    return f"{int.from_bytes(label):0{LABEL_BITS}b}"


def fold(label: bytes, node: bytes, siblings: Sequence[bytes]) -> bytes:
    """Return the root above a node, to which the bits of a label lead past these siblings."""
    for sibling, side in reversed(list(zip(siblings, bits(label), strict=False))):
        node = node_hash(node, sibling) if side == "0" else node_hash(sibling, node)
    return node


def _verify(root: bytes, label: bytes, node: bytes, siblings: Sequence[bytes]) -> None:
    if fold(label, node, siblings) != root:
        raise Refused("the membership proof does not hold", "a path to the certified root")
