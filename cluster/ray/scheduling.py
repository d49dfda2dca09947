"""Schedule the tasks of a run: which one starts next, on which node, and how often it starts again.

A task goes to the node with the most free slots, so that nodes fill evenly, and avoids the node where
it last failed if another has one. A node that is lost loses its slots, including those in use.

Tasks, known by their number, start in their order while workers are free. A task that must be carried
out again comes first, since it is the oldest. A task whose worker died starts again at most
`max_retries` times *in a row*. Whatever it stores in between (a finished stage) resets the count: on
many machines every long task meets a death now and then, and only one without progress is hopeless.

>>> slots = WorkerSlots()
>>> slots.join("a", 1); slots.join("b", 2)
>>> slots.take(), slots.take(avoid="b"), slots.take(), slots.take()
('b', 'a', 'b', None)
>>> slots.leave("b"); slots.give_back("a"); slots.give_back("b"); slots.total, slots.take(avoid="a")
(1, 'a')
>>> queue = TaskQueue(num_tasks=2, max_retries=1)
>>> queue.next_task(num_workers=1), queue.next_task(num_workers=1)
(0, None)
>>> queue.died(0), queue.next_task(1), queue.died(0)
(True, 0, False)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Placement:
    """State what each task takes of a node: CPUs (also its threads), GPUs (or a share), environment.

    >>> Placement(1, num_gpus=0.5).num_slots({"CPU": 8, "GPU": 2}), Placement(4).num_slots({"CPU": 9})
    (4, 2)
    """

    num_cpus: int
    num_gpus: float = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def num_slots(self, resources: Mapping[str, float]) -> int:
        """Return how many tasks a node can run at once. A share of a GPU is of one GPU."""
        slots, gpus = int(resources.get("CPU", 0)) // self.num_cpus, int(resources.get("GPU", 0))
        if not self.num_gpus:
            return slots
        # 1 // 0.1 is 9 in binary fractions.
        shared = (
            gpus * int(1 / self.num_gpus + 1e-9) if self.num_gpus < 1 else gpus // int(self.num_gpus)
        )
        return min(slots, shared)


class WorkerSlots:
    """Count free slots and slots in use, by node."""

    def __init__(self) -> None:
        self._num: dict[str, int] = {}
        self._free: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self._num.values())

    def __contains__(self, node: str) -> bool:
        return node in self._num

    def join(self, node: str, num_slots: int) -> None:
        self._num[node] = self._free[node] = num_slots

    def leave(self, node: str) -> None:
        self._num.pop(node, None)
        self._free.pop(node, None)

    def take(self, avoid: str | None = None) -> str | None:
        """Take a slot and return its node; return None if no slot is free."""
        free = (node for node, num in self._free.items() if num > 0)
        chosen = max(free, key=lambda node: (node != avoid, self._free[node]), default=None)
        if chosen is not None:
            self._free[chosen] -= 1
        return chosen

    def give_back(self, node: str) -> None:
        """Free a slot of a node; do nothing if the node is lost."""
        if node in self._free:
            self._free[node] += 1


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
