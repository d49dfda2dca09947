"""Places of nodes: given evenly, not where a task failed last, gone with the node; who may train."""

from __future__ import annotations

import pytest

from cluster.ray.proofs import Proof, refusal
from cluster.ray.worker_slots import Placement, WorkerSlots


def two() -> WorkerSlots:
    slots = WorkerSlots()
    slots.join("a", 2)
    slots.join("b", 1)
    return slots


def test_nodes_fill_evenly_and_no_further() -> None:
    slots = two()
    assert sorted(str(slots.take()) for _ in range(4)) == ["None", "a", "a", "b"]
    slots.give_back("b")
    assert slots.take() == "b"


def test_a_node_is_avoided_while_another_has_a_place() -> None:
    slots = two()
    assert slots.take(avoid="a") == "b"
    assert slots.take(avoid="a") == "a"


def test_a_lost_node_has_no_places() -> None:
    slots = two()
    assert slots.take() == "a"
    slots.leave("a")
    slots.give_back("a")  # what ran there ends later
    assert slots.total == 1
    assert "a" not in slots
    assert [slots.take(), slots.take()] == ["b", None]


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
