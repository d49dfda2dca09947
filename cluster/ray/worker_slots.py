"""Count the worker slots of the nodes that may train; a task takes a slot and gives it back.

A task goes to the node with the most free slots, so that nodes fill evenly, and avoids the node where
it last failed if another has one. A node that is lost loses its slots, including those in use.

>>> slots = WorkerSlots()
>>> slots.join("a", 1); slots.join("b", 2)
>>> slots.take(), slots.take(avoid="b"), slots.take(), slots.take()
('b', 'a', 'b', None)
>>> slots.leave("b"); slots.give_back("a"); slots.give_back("b"); slots.total, slots.take(avoid="a")
(1, 'a')
"""

from __future__ import annotations

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
