"""Count the places of the nodes that may train: one worker each, given to tasks and taken back.

Pure, no clock, no Ray. A task goes to the node with the most free places, so that nodes fill
evenly, and not to the one where it failed last, if another has a place. A node that is gone has no
places; what was given on it is forgotten with it.

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
    """What each task takes of a node: CPUs, which are also its threads, GPUs or a share of one,
    environment variables.

    >>> Placement(1, gpus=0.5).num_places({"CPU": 8, "GPU": 2}), Placement(4).num_places({"CPU": 9})
    (4, 2)
    """

    cpus: int
    gpus: float = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def num_places(self, resources: Mapping[str, float]) -> int:
        """For how many tasks at once a node's resources suffice. A share is of one GPU."""
        places, gpus = int(resources.get("CPU", 0)) // self.cpus, int(resources.get("GPU", 0))
        if not self.gpus:
            return places
        # Binary fractions: 1 // 0.1 is 9.
        shared = gpus * int(1 / self.gpus + 1e-9) if self.gpus < 1 else gpus // int(self.gpus)
        return min(places, shared)


class WorkerSlots:
    """Free and given places, by node."""

    def __init__(self) -> None:
        self._num: dict[str, int] = {}
        self._given: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self._num.values())

    def __contains__(self, node: str) -> bool:
        return node in self._num

    def join(self, node: str, num_places: int) -> None:
        self._num[node], self._given[node] = num_places, 0

    def leave(self, node: str) -> None:
        self._num.pop(node, None)
        self._given.pop(node, None)

    def take(self, avoid: str | None = None) -> str | None:
        """Return the node whose place is given; None while none is free."""
        free = {node: num - self._given[node] for node, num in self._num.items()}
        open_nodes = [node for node, num in free.items() if num > 0]
        if not open_nodes:
            return None
        chosen = max(open_nodes, key=lambda node: (node != avoid, free[node]))
        self._given[chosen] += 1
        return chosen

    def give_back(self, node: str) -> None:
        if node in self._given:
            self._given[node] -= 1
