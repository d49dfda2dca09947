"""How many places a node has, and who may train; the module's example shows how places are given."""

from __future__ import annotations

import pytest

from cluster.ray.proofs import Proof, refusal
from cluster.ray.worker_slots import Placement


@pytest.mark.parametrize(
    ("placement", "node", "slots"),
    [
        (Placement(1, 0.1), {"CPU": 64, "GPU": 1}, 10),
        (Placement(1, 0.3), {"CPU": 64, "GPU": 2}, 6),
        (Placement(1, 0.7), {"CPU": 64, "GPU": 2}, 2),
        (Placement(1, 2), {"CPU": 64, "GPU": 5}, 2),
        (Placement(4, 0.5), {"CPU": 8, "GPU": 8}, 2),
        (Placement(1, 1), {"CPU": 8}, 0),
        (Placement(2), {"CPU": 9, "memory": 1e9}, 4),
        (Placement(9), {"CPU": 8}, 0),
        (Placement(2), {}, 0),
    ],
)
def test_slots_of_a_node(placement: Placement, node: dict[str, float], slots: int) -> None:
    assert placement.num_slots(node) == slots


@pytest.mark.parametrize(
    ("proof", "why"),
    [
        (Proof("f1", "d1", has_base=False), ""),
        (Proof("f2", "d1", has_base=True), "fingerprint is f2, not f1"),
        (Proof("f1", "d2", has_base=True), "self-test gave d2, and d1"),
    ],
)
def test_who_may_train(proof: Proof, why: str) -> None:
    found = refusal(proof, Proof("f1", "d1", has_base=True), frozenset({"f1"}))
    assert why in found
    assert bool(why) == bool(found)


def test_jobs_of_two_fingerprints_are_trained_nowhere_else() -> None:
    same = Proof("f1", "d1", has_base=True)
    assert "not f0" in refusal(same, same, frozenset({"f0", "f1"}))
