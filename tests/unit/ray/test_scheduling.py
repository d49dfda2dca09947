"""How many slots a node has, who may train, and the next task: in order, again after a death, and not
for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ray.proofs import Proof, refusal
from cluster.ray.scheduling import Placement, TaskQueue


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


def started(hand_out: TaskQueue, num_workers: int) -> list[int]:
    return list(iter(lambda: hand_out.next_task(num_workers), None))


def test_tasks_start_in_order_and_what_must_start_again_comes_first() -> None:
    hand_out = TaskQueue(num_tasks=4, max_retries=1)
    assert started(hand_out, 2) == [0, 1]
    assert hand_out.died(1)
    assert started(hand_out, 2) == [1]
    hand_out.again(0)
    assert started(hand_out, 2) == [0]
    hand_out.finished(0)
    assert started(hand_out, 2) == [2]
    assert started(hand_out, 3) == [3]


def test_deaths_in_a_row_are_counted_and_a_stored_result_resets_the_count() -> None:
    hand_out = TaskQueue(num_tasks=2, max_retries=2)
    for _ in range(10):  # as often as it likes, as long as it gets on
        for deaths in (1, 2):
            started(hand_out, 2)
            assert hand_out.died(1)
            assert hand_out.deaths(1) == deaths
        hand_out.progressed(1)
    for allowed in (True, True, False):
        started(hand_out, 2)
        assert hand_out.died(1) is allowed
    assert hand_out.deaths(0) == 0


def test_a_task_that_was_not_ready_has_not_died() -> None:
    hand_out = TaskQueue(num_tasks=1, max_retries=0)
    for _ in range(5):
        assert started(hand_out, 1) == [0]
        hand_out.again(0)
    started(hand_out, 1)
    assert not hand_out.died(0)


@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 3), st.data())
def test_every_task_is_done_once_whatever_dies(
    num_tasks: int, num_workers: int, max_retries: int, data: st.DataObject
) -> None:
    hand_out = TaskQueue(num_tasks, max_retries)
    running: list[int] = []
    done: list[int] = []
    while not hand_out.over:
        running += started(hand_out, num_workers)
        assert len(running) == min(num_workers, num_tasks - len(done)) > 0
        task = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if hand_out.deaths(task) < max_retries and data.draw(st.booleans()):
            assert hand_out.died(task)
        else:
            hand_out.finished(task)
            done.append(task)
    assert sorted(done) == list(range(num_tasks))
