"""Decide which task of a cluster starts next, and which starts again after its worker died.

Tasks, known by their number, start in their order while workers are free. A task that must be carried
out again comes first, since it is the oldest. A task whose worker died starts again at most
`max_retries` times *in a row*. Whatever it stores in between (a finished stage) resets the count: on
many machines every long task meets a death now and then, and only one without progress is hopeless.

>>> queue = TaskQueue(num_tasks=2, max_retries=1)
>>> queue.next_task(num_workers=1), queue.next_task(num_workers=1)
(0, None)
>>> queue.died(0), queue.next_task(1), queue.died(0)
(True, 0, False)
"""

from __future__ import annotations

from collections import Counter, deque


class TaskQueue:
    """Waiting and running tasks, by number; without a clock or workers of its own."""

    def __init__(self, num_tasks: int, max_retries: int) -> None:
        self._waiting = deque(range(num_tasks))
        self._running: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._max_retries = max_retries

    @property
    def over(self) -> bool:
        return not self._waiting and not self._running

    def next_task(self, num_workers: int) -> int | None:
        """Start and return the next task; None while all workers are busy or nothing waits."""
        if not self._waiting or len(self._running) >= num_workers:
            return None
        task = self._waiting.popleft()
        self._running.add(task)
        return task

    def finished(self, task: int) -> None:
        self._running.remove(task)

    def again(self, task: int) -> None:
        """Put a task that could not begin first in the queue; this counts as no death."""
        self._running.remove(task)
        self._waiting.appendleft(task)

    def progressed(self, task: int) -> None:
        """Reset the deaths of a task, because it stored something that a restart continues from."""
        self._deaths.pop(task, None)

    def died(self, task: int) -> bool:
        """Count a death of the task's worker, and return whether the task starts again."""
        self._deaths[task] += 1
        if self._deaths[task] > self._max_retries:
            return False
        self.again(task)
        return True

    def deaths(self, task: int) -> int:
        """Return how often in a row the task's worker died."""
        return self._deaths[task]
