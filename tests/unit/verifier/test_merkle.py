"""Test trees of RFC 6962 against vectors published elsewhere, and their laws.

Leaves, roots, nodes and proofs are those of Certificate Transparency, as transparency-dev/merkle has
them (`testonly/constants.go`, `proof/verify_test.go`, `rfc6962/rfc6962_test.go`). The digest of all
subtrees of up to 130 leaves is that of draft-ietf-plants-merkle-tree-certs, appendix "Subtree Test
Vectors".
"""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.evidence.open_evidence import inclusion_path
from sisa.verifier import merkle
from sisa.verifier.envelope import Refused

LEAVES = [
    bytes.fromhex(each)
    for each in (
        *("", "00", "10", "2021", "3031", "40414243", "5051525354555657"),
        "606162636465666768696a6b6c6d6e6f",
    )
]
HASHES = [merkle.leaf_hash(each) for each in LEAVES]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
NODE_2_3 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
NODE_4_5 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
NODE_6_7 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
NODE_4_7 = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
LEAF_0, NODE_0_1, NODE_0_3 = ROOTS[1], ROOTS[2], ROOTS[4]
LEAF_1 = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
LEAF_4 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
LEAF_6 = "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f"

INCLUSION = [  # index, size, path
    (0, 1, []),
    (0, 8, [LEAF_1, NODE_2_3, NODE_4_7]),
    (5, 8, [LEAF_4, NODE_6_7, NODE_0_3]),
    (2, 3, [NODE_0_1]),
    (1, 5, [LEAF_0, NODE_2_3, LEAF_4]),
]
CONSISTENCY = [  # sizes, path
    (1, 1, []),
    (1, 8, [LEAF_1, NODE_2_3, NODE_4_7]),
    (6, 8, [NODE_4_5, NODE_6_7, NODE_0_3]),
    (2, 5, [NODE_2_3, LEAF_4]),
    (6, 7, [NODE_4_5, LEAF_6, NODE_0_3]),
]
SOME = bytes.fromhex("abacaba000000000000000000000000000000000000000000060061e00123456")


def unhexed(path: list[str]) -> list[bytes]:
    return [bytes.fromhex(each) for each in path]


def root_of(size: int) -> bytes:
    return bytes.fromhex(ROOTS[size])


def test_hashes() -> None:
    assert merkle.leaf_hash(b"L123456").hex() == (
        "395aa064aa4c29f7010acfe3f25db9485bbd4b91897b6ad7ad547639252b4d56"
    )
    assert merkle.node_hash(b"N123", b"N456").hex() == (
        "aa217fe888e47007fa15edab33c2b492a722cb106c64667fc2b044444de66bbb"
    )
    assert [merkle.root(HASHES[:size]).hex() for size in range(9)] == ROOTS


@pytest.mark.parametrize(("index", "size", "hexed"), INCLUSION)
def test_published_proofs_of_inclusion(index: int, size: int, hexed: list[str]) -> None:
    path, leaf = unhexed(hexed), HASHES[index]
    assert inclusion_path(HASHES[:size], index) == path
    merkle.verify_inclusion(leaf, index, size, path, root_of(size))
    wrong = [
        *((leaf, each, size, path, root_of(size)) for each in (index - 1, index + 1, index ^ 2)),
        *((leaf, index, each, path, root_of(size)) for each in (size * 2, size // 2, 0, -1)),
        *((each, index, size, path, root_of(size)) for each in (b"WrongLeaf", b"", SOME)),
        *((leaf, index, size, path, each) for each in (merkle.EMPTY_ROOT, SOME, b"")),
        *((leaf, index, size, each, root_of(size)) for each in damaged(path, root_of(size))),
    ]
    for each in wrong:
        with pytest.raises(Refused):
            merkle.verify_inclusion(*each)


@pytest.mark.parametrize(("size1", "size2", "hexed"), CONSISTENCY)
def test_published_proofs_of_consistency(size1: int, size2: int, hexed: list[str]) -> None:
    path, root1, root2 = unhexed(hexed), root_of(size1), root_of(size2)
    merkle.verify_consistency(size1, size2, path, root1, root2)
    if size1 == size2:
        return
    wrong = [
        *((each, size2, path, root1, root2) for each in (size1 - 1, size1 + 1, size1 ^ 2)),
        *((size1, each, path, root1, root2) for each in (size2 * 2, size2 // 2)),
        *((size1, size2, path, *each) for each in ((SOME, root2), (root1, SOME), (root2, root1))),
        *((size1, size2, each, root1, root2) for each in (*damaged(path, root1), [])),
    ]
    for each in wrong:
        with pytest.raises(Refused):
            merkle.verify_consistency(*each)


def damaged(path: list[bytes], root: bytes) -> list[list[bytes]]:
    """Return what transparency-dev/merkle calls corrupt proofs."""
    flipped = [
        [*path[:at], bytes([each[0] ^ 8, *each[1:]]), *path[at + 1 :]] for at, each in enumerate(path)
    ]
    longer = [[*path, b""], [*path, root], [b"", *path], [root, *path]]
    return [*flipped, *longer, *([path[:1] + path, path[:-1], path[1:]] if path else [])]


def test_trees_of_the_same_or_no_size() -> None:
    merkle.verify_consistency(0, 0, [], merkle.EMPTY_ROOT, merkle.EMPTY_ROOT)
    merkle.verify_consistency(0, 8, [], merkle.EMPTY_ROOT, root_of(8))
    merkle.verify_consistency(8, 8, [], root_of(8), root_of(8))
    for wrong in (
        (0, 8, [], SOME, root_of(8)),  # stricter than transparency-dev: no leaves have one root
        (0, 8, [SOME], merkle.EMPTY_ROOT, root_of(8)),
        (8, 8, [], root_of(8), SOME),
        (8, 8, [SOME], root_of(8), root_of(8)),
        (2, 1, [], root_of(2), root_of(1)),
        (-1, 1, [], root_of(1), root_of(1)),
    ):
        with pytest.raises(Refused):
            merkle.verify_consistency(*wrong)


def subtree_path(hashes: list[bytes], size1: int) -> list[bytes]:
    """Return PROOF of RFC 6962, section 2.1.2, word for word."""

    def subproof(size: int, leaves: list[bytes], whole: bool) -> list[bytes]:
        if size == len(leaves):
            return [] if whole else [merkle.root(leaves)]
        middle = 1 << (len(leaves) - 1).bit_length() - 1
        if size <= middle:
            return [*subproof(size, leaves[:middle], whole), merkle.root(leaves[middle:])]
        return [*subproof(size - middle, leaves[middle:], False), merkle.root(leaves[:middle])]

    return subproof(size1, hashes, True)


@given(st.integers(0, 70), st.data())
def test_what_is_proved_verifies_and_nothing_else(size: int, data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(str(each).encode()) for each in range(size)]
    root, size1 = merkle.root(hashes), data.draw(st.integers(0, size))
    path = subtree_path(hashes, size1) if size1 else []
    merkle.verify_consistency(size1, size, path, merkle.root(hashes[:size1]), root)
    if not size:
        return
    index = data.draw(st.integers(0, size - 1))
    found = inclusion_path(hashes, index)
    merkle.verify_inclusion(hashes[index], index, size, found, root)
    other = data.draw(st.integers(0, size - 1).filter(lambda each: each != index)) if size > 1 else 1
    with pytest.raises(Refused):
        merkle.verify_inclusion(hashes[index], other, size, found, root)


def test_all_trees_of_up_to_130_leaves() -> None:
    """Roots of all subtrees, rolled up as in the draft."""
    hashes = [merkle.leaf_hash(bytes([each])) for each in range(130)]
    rolled = sha256()
    for end in range(1, 131):
        for start in range(end):
            if start % (1 << (end - start - 1).bit_length()) == 0:  # a valid subtree
                rolled.update(f"[{start}, {end}) {merkle.root(hashes[start:end]).hex()}\n".encode())
    assert rolled.hexdigest() == "94a95384a8c69acea9b50d035a58285b3a777cb7a724005faa5e1f1e1190007f"
