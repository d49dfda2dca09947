"""Count the places of the nodes that may train: each takes one worker, and is taken and given back.

A task goes to the node with the most free places, so that nodes fill evenly, and avoids the node where
it last failed if another has a place. A node that is lost loses its places, including those in use.

>>> places = WorkerSlots()
>>> places.join("a", 1); places.join("b", 2)
>>> places.take(), places.take(avoid="b"), places.take(), places.take()
('b', 'a', 'b', None)
>>> places.leave("b"); places.give_back("a"); places.give_back("b"); places.total, places.take(avoid="a")
(1, 'a')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Placement:
    """State what each task takes of a node: CPUs (also its threads), GPUs (or a share), environment.

    >>> Placement(1, gpus=0.5).num_places({"CPU": 8, "GPU": 2}), Placement(4).num_places({"CPU": 9})
    (4, 2)
    """

    cpus: int
    gpus: float = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def num_places(self, resources: Mapping[str, float]) -> int:
        """Return how many tasks a node can run at once. A share of a GPU is of one GPU."""
        places, gpus = int(resources.get("CPU", 0)) // self.cpus, int(resources.get("GPU", 0))
        if not self.gpus:
            return places
        # 1 // 0.1 is 9 in binary fractions.
        shared = gpus * int(1 / self.gpus + 1e-9) if self.gpus < 1 else gpus // int(self.gpus)
        return min(places, shared)


class WorkerSlots:
    """Count free places and places in use, by node."""

    def __init__(self) -> None:
        self._num: dict[str, int] = {}
        self._free: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self._num.values())

    def __contains__(self, node: str) -> bool:
        return node in self._num

    def join(self, node: str, num_places: int) -> None:
        self._num[node] = self._free[node] = num_places

    def leave(self, node: str) -> None:
        self._num.pop(node, None)
        self._free.pop(node, None)

    def take(self, avoid: str | None = None) -> str | None:
        """Take a place and return its node; return None if no place is free."""
        free = (node for node, num in self._free.items() if num > 0)
        chosen = max(free, key=lambda node: (node != avoid, self._free[node]), default=None)
        if chosen is not None:
            self._free[chosen] -= 1
        return chosen

    def give_back(self, node: str) -> None:
        """Free a place of a node; do nothing if the node is lost."""
        if node in self._free:
            self._free[node] += 1
