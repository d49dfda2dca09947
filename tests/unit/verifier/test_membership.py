"""The verifier of the sorted tree: one place for each label, and no proof for anything else.

What an operator may try is tried here, too. Not caught by a proof: a tree that lacks a record on which
a shard is trained (whoever trains the shard again, `sisa audit`, finds it), and a wrong date.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest

from sisa.evidence.keys.vrf_key import VrfKey
from sisa.evidence.membership import SCHEMA, Tree, tree_hash
from sisa.evidence.statements import APPROX_REPORT
from sisa.verifier.envelope import Refused
from sisa.verifier.membership import (
    EMPTY_TREE,
    Neighbour,
    bits,
    leaf,
    verify_absent,
    verify_membership,
    verify_present,
)
from sisa.verifier.merkle import node_hash
from tests.fakes.operator import OTHER_MODEL, Operator, canonical, check_mutations

VALUE = b'{"shard":3,"since":"2026-11-02"}'
VALUE_HASH = sha256(VALUE).digest()
A, B, C = (bytes([first]) + bytes(31) for first in (0b0000_0000, 0b0100_0000, 0b0110_0000))
LEFT = tree_hash([(A, VALUE_HASH), (B, VALUE_HASH), (C, VALUE_HASH)], 1)
ROOT = node_hash(LEFT, EMPTY_TREE)


def proofs() -> list[tuple[bytes, list[bytes], Neighbour | None]]:
    """Return labels that the tree lacks, with their proofs: an empty place, and a neighbour's."""
    low = node_hash(leaf(B, VALUE_HASH), leaf(C, VALUE_HASH))
    return [(b"\xff" * 32, [LEFT], None), (b"\x01" * 32, [EMPTY_TREE, low], (A, VALUE_HASH))]


def test_the_shape_is_that_of_the_specification() -> None:
    assert sha256(b"\x02").digest() == EMPTY_TREE
    assert leaf(A, VALUE_HASH) == sha256(b"\x00" + A + VALUE_HASH).digest()
    low = sha256(b"\x01" + leaf(B, VALUE_HASH) + leaf(C, VALUE_HASH)).digest()
    assert node_hash(node_hash(leaf(A, VALUE_HASH), low), EMPTY_TREE) == ROOT
    assert [bits(B)[at] for at in (0, 1, 2)] == ["0", "1", "0"]


def test_what_is_there_verifies_as_present_and_never_as_absent() -> None:
    path = [EMPTY_TREE, leaf(A, VALUE_HASH), leaf(C, VALUE_HASH)]
    verify_present(ROOT, B, VALUE, path)
    for siblings in (path, path[:2], path[:1], []):
        for neighbour in (None, (A, VALUE_HASH), (B, VALUE_HASH), (C, VALUE_HASH)):
            with pytest.raises(Refused):
                verify_absent(ROOT, B, siblings, neighbour)


def test_bytes_do_not_move_between_a_neighbours_label_and_hash() -> None:
    path = [EMPTY_TREE, leaf(A, VALUE_HASH), leaf(C, VALUE_HASH)]
    both = B + VALUE_HASH
    for size in (0, 31, 33, 64):
        with pytest.raises(Refused):
            verify_absent(ROOT, B, path, (both[:size], both[size:]))


@pytest.mark.parametrize("proof", proofs())
def test_what_is_not_there_verifies_as_absent_and_never_as_present(
    proof: tuple[bytes, list[bytes], Neighbour | None],
) -> None:
    label, path, neighbour = proof
    verify_absent(ROOT, label, path, neighbour)
    for siblings in (path, path[:1], [], [*path, EMPTY_TREE], path * 270):
        with pytest.raises(Refused):
            verify_present(ROOT, label, VALUE, siblings)


KEY = VrfKey(b"v" * 32)
PLACE = {"shard": 3, "since": "2026-11-02"}
HELD = {f"r{number}": {**PLACE, "shard": number % 5} for number in range(40)}


@dataclass
class Answering:
    """An operator that answers what is in its model, from a tree of its records."""

    held: dict[str, dict[str, Any]]
    operator: Operator = field(default_factory=lambda: Operator(vrf=KEY.public))

    def __post_init__(self) -> None:
        self.tree = tree_of(self.held)
        self.operator.state("", "", self.tree.root.hex(), issued_at="2026-11-29T12:00:00+00:00")

    def file(self, record_id: str, **changes: Any) -> bytes:
        """Return the answer about an id, with some members replaced."""
        label = label_of(record_id)
        path, end = self.tree.path(label)
        other = end and {"label": end[0].hex(), "value_hash": end[1].hex()}
        file = {
            "type": "deletion-ready-model/membership-proof/v1",
            "id": record_id,
            "vrf": KEY.prove(record_id.encode()).hex(),
            "leaf": self.tree.value(label) or other,
            "path": [each.hex() for each in path],
            "state": self.operator.certificate(0).decode(),
        }
        return canonical({**file, **changes}) + b"\n"

    def members(self, record_id: str) -> dict[str, Any]:
        return dict(json.loads(self.file(record_id)))


def label_of(record_id: str) -> bytes:
    return KEY.output(record_id.encode())[:32]


def tree_of(held: dict[str, dict[str, Any]]) -> Tree:
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    tree = Tree(db)
    tree.replace([], [(label_of(each), b"", at["shard"], 0, at["since"]) for each, at in held.items()])
    return tree


def test_an_answer_verifies_with_the_public_keys_alone() -> None:
    model = Answering(HELD)
    for record_id, present in [*HELD.items(), *((f"x{number}", None) for number in range(20))]:
        found = verify_membership(model.file(record_id), model.operator.keys)
        assert (found.record_id, found.present) == (record_id, present)
        assert found.state.statement["predicate"]["issued_at"].startswith("2026-11-29")


def test_a_held_record_is_not_denied() -> None:
    model = Answering(HELD)
    hidden = Answering({each: at for each, at in HELD.items() if each != "r7"})
    denied = hidden.members("r7")
    path = model.members("r7")["path"]
    label, value_hash = label_of("r7").hex(), sha256(canonical(HELD["r7"])).hexdigest()
    itself = {"label": label, "value_hash": value_hash}
    longer = {"label": label + value_hash[:2], "value_hash": value_hash[2:]}  # hashed, the same bytes
    for changes in (
        *({"leaf": found, "path": path} for found in (None, itself, longer)),
        *({"leaf": None, "path": path[:size]} for size in range(len(path))),
        {name: denied[name] for name in ("leaf", "path")},
        *({name: each[name] for name in ("leaf", "path")} for each in absences(model)),
    ):
        with pytest.raises(Refused):
            verify_membership(model.file("r7", **changes), model.operator.keys)


def absences(model: Answering) -> list[dict[str, Any]]:
    return [model.members(f"x{number}") for number in range(20)]


def test_an_answer_with_a_false_label_is_refused() -> None:
    model, other = Answering(HELD), VrfKey(b"w" * 32)
    absent = model.members("x1")
    for vrf in (absent["vrf"], other.prove(b"r7").hex(), "00" * 80, absent["vrf"][:-2], "zz" * 80):
        changes = {**absent, "id": "r7", "vrf": vrf}
        with pytest.raises(Refused):
            verify_membership(model.file("r7", **changes), model.operator.keys)


def test_another_place_or_date_is_refused() -> None:
    model = Answering(HELD)
    for found in ({**PLACE, "shard": 4}, {**HELD["r7"], "since": "2020-01-01"}, {}, {"shard": 2}):
        with pytest.raises(Refused):
            verify_membership(model.file("r7", leaf=found), model.operator.keys)


def test_an_answer_is_about_the_state_that_it_names() -> None:
    """An old state is not refused: its time and its entry are what the answer says."""
    model = Answering(HELD)
    later = Answering({each: at for each, at in HELD.items() if each != "r7"})
    new = model.operator.state("11" * 32, model.tree.root.hex(), later.tree.root.hex())
    assert new
    old = verify_membership(model.file("r7"), model.operator.keys)
    assert (old.present, old.state.index, old.state.checkpoint.size) == (HELD["r7"], 0, 2)
    state = model.operator.certificate(1).decode()
    with pytest.raises(Refused):  # the path leads to the old root
        verify_membership(model.file("r7", state=state), model.operator.keys)
    assert verify_membership(later.file("r7", state=state), model.operator.keys).present is None


def test_an_answer_about_another_model_or_by_no_state_is_refused() -> None:
    model = Answering(HELD)
    for operator in (Operator(OTHER_MODEL, vrf=KEY.public), Operator(seed=2, vrf=KEY.public)):
        with pytest.raises(Refused):
            verify_membership(Answering(HELD, operator).file("r7"), model.operator.keys)
    model.operator.log(APPROX_REPORT, {"membership": {"after": model.tree.root.hex()}})
    state = model.operator.certificate(1).decode()
    with pytest.raises(Refused, match="no state"):
        verify_membership(model.file("r7", state=state), model.operator.keys)


@pytest.mark.parametrize("record_id", ["r7", "x1"])
def test_no_mutation_of_an_answer_is_accepted(record_id: str) -> None:
    model = Answering(HELD)
    others = [model.file("r8"), model.file("x2"), Answering(HELD, Operator(seed=2)).file("x1")]

    def verify(data: bytes) -> None:
        assert verify_membership(data, model.operator.keys).record_id == record_id

    check_mutations(model.file(record_id), others, verify)
