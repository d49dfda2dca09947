"""The next task: in order, one per worker, again after a death, and not for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sisa.planning.task_queue import TaskQueue


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
