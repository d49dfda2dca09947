"""Which task starts next, and which starts again: the one rule of whoever hands tasks to workers.

Rules: pure, no clock, no worker: whoever has workers asks `next_task` and tells what became of what
it started. Tasks, known by their number, start in their order while workers are free. One that must be
carried out again comes first, for others may have finished and it is the oldest. A task whose worker
died starts again at most `max_retries` times *in a row*: whatever it stores in between (a finished
stage) begins the count anew, for on many machines every long task meets a death now and then, and only
one that gets nowhere is hopeless.

Tasks are carried out by `cluster/ray/ray_tasks.py`, and in simulated time by `tests/bench/simulate.py`;
their order is from `serial.order_chains`.

>>> hand_out = TaskQueue(num_tasks=2, max_retries=1)
>>> hand_out.next_task(num_workers=1), hand_out.next_task(num_workers=1)
(0, None)
>>> hand_out.died(0), hand_out.next_task(1), hand_out.died(0)
(True, 0, False)
"""

from __future__ import annotations

from collections import Counter, deque


class TaskQueue:
    """What waits and what runs, by the tasks' numbers."""

    def __init__(self, num_tasks: int = 0, max_retries: int = 0) -> None:
        self._waiting = deque(range(num_tasks))
        self._running: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._max_retries = max_retries

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def over(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self._running

    def arrived(self, task: int) -> None:
        """One more task, last in line."""
        self._waiting.append(task)

    def next_task(self, num_workers: int) -> int | None:
        """The task to start now, which runs from then on; None while all workers are busy."""
        if not self._waiting or len(self._running) >= num_workers:
            return None
        task = self._waiting.popleft()
        self._running.add(task)
        return task

    def finished(self, task: int) -> None:
        """It is done."""
        self._running.remove(task)

    def again(self, task: int) -> None:
        """It could not begin: it starts again, first in line, and no death is counted."""
        self._running.remove(task)
        self._waiting.appendleft(task)

    def progressed(self, task: int) -> None:
        """It stored something that a new start goes on from."""
        self._deaths.pop(task, None)

    def died(self, task: int) -> bool:
        """Its worker died: whether it starts again."""
        self._deaths[task] += 1
        if self._deaths[task] > self._max_retries:
            return False
        self.again(task)
        return True

    def deaths(self, task: int) -> int:
        """How often in a row its worker died."""
        return self._deaths[task]
