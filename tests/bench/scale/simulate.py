"""A training on many workers in simulated time: its end, the cost of deaths, and lost tasks.

    task      a chain of stages, as record-epochs; a stored stage is never trained again
    worker    trains one task at a time, dies at random, and is replaced after a while
    outcome   the time of each task's end, busy and lost time, deaths

The simulation counts: it has no record, no clock and no Ray, and the same seed gives the same outcome.
Tasks are handed out by the rule of a real cluster (`cluster/ray/scheduling.py`), in the given order
(longest first there, too: `chains.order_chains`). A worker's life is exponential, so that an attempt
needs one draw. Idle workers do not die. The driver's own time (`fleet.py` measures it), networks and
slow nodes are not covered.

>>> calm = Fleet(num_workers=2, record_epochs_per_s=10.0, start_s=0.0)
>>> ran = simulate([[100, 100], [100], [100]], calm, seed=1)
>>> ran.finished_s, ran.makespan_s, ran.utilisation
((20.0, 10.0, 20.0), 20.0, 1.0)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from cluster.ray.scheduling import TaskQueue


@dataclass(frozen=True, slots=True)
class Fleet:
    """Equal workers. Times are in seconds; `mean_life_s` is infinite if none dies."""

    num_workers: int
    record_epochs_per_s: float
    start_s: float = 10.0  # of a task: a process, its libraries, the base
    mean_life_s: float = math.inf
    replace_s: float = 60.0  # until a dead worker's place is filled
    max_retries: int = 3


@dataclass(frozen=True, slots=True)
class Ran:
    """The outcome of a training. `finished_s` is infinite for a task that was given up."""

    finished_s: tuple[float, ...]
    makespan_s: float
    busy_s: float  # trained and kept
    lost_s: float  # trained and lost, and starts
    num_deaths: int
    num_workers: int

    @property
    def given_up(self) -> tuple[int, ...]:
        return tuple(task for task, end in enumerate(self.finished_s) if end == math.inf)

    @property
    def utilisation(self) -> float:
        """Return the share of all workers' time that was trained and kept."""
        return self.busy_s / (self.makespan_s * self.num_workers) if self.makespan_s else 1.0


@dataclass(slots=True)
class _Run:
    fleet: Fleet
    ends: list[list[float]]  # of each task, the seconds of training up to the end of each stage
    random: np.random.Generator
    hand_out: TaskQueue
    now: float = 0.0
    alive: int = 0
    done: list[int] = field(default_factory=list)  # stages that are stored
    finished: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    lost_s: float = 0.0
    num_deaths: int = 0
    queue: list[tuple[float, int, int, int, bool]] = field(default_factory=list)
    num_events: int = 0

    def push(self, at: float, task: int, done: int, died: bool) -> None:
        self.num_events += 1
        heapq.heappush(self.queue, (at, self.num_events, task, done, died))

    def fill(self) -> None:
        """Start tasks while workers are free."""
        while (task := self.hand_out.next_task(self.alive)) is not None:
            self.attempt(task)

    def attempt(self, task: int) -> None:
        fleet, ends, before = self.fleet, self.ends[task], self.stored_s(task)
        life = math.inf
        if fleet.mean_life_s < math.inf:
            life = self.random.exponential(fleet.mean_life_s)
        whole = fleet.start_s + (ends[-1] if ends else 0.0) - before
        if life >= whole:
            self.lost_s += fleet.start_s
            self.busy_s += whole - fleet.start_s
            self.push(self.now + whole, task, len(ends), False)
            return
        reached = before + max(0.0, life - fleet.start_s)
        done = self.done[task] + sum(each <= reached for each in ends[self.done[task] :])
        kept = (ends[done - 1] if done else 0.0) - before
        self.busy_s += kept
        self.lost_s += life - kept
        self.push(self.now + life, task, done, True)

    def stored_s(self, task: int) -> float:
        return self.ends[task][self.done[task] - 1] if self.done[task] else 0.0

    def step(self) -> None:
        self.now, _, task, done, died = heapq.heappop(self.queue)
        if task < 0:
            self.alive += 1  # a place is filled again
        elif not died:
            self.hand_out.finished(task)
            self.done[task], self.finished[task] = done, self.now
        else:
            self.died(task, done)
        self.fill()

    def died(self, task: int, done: int) -> None:
        self.num_deaths += 1
        self.alive -= 1
        self.push(self.now + self.fleet.replace_s, -1, 0, False)
        if done > self.done[task]:
            self.hand_out.progressed(task)
        self.done[task] = done
        if not self.hand_out.died(task):
            self.hand_out.finished(task)  # given up: on a real cluster, the run ends with its error


def simulate(tasks: Sequence[Sequence[int]], fleet: Fleet, seed: int) -> Ran:
    """Train tasks, each the record-epochs of its stages, in the order in which they are handed out."""
    rate = fleet.record_epochs_per_s
    run = _Run(
        fleet,
        [list(accumulate(stage / rate for stage in task)) for task in tasks],
        np.random.default_rng(seed),
        TaskQueue(len(tasks), fleet.max_retries),
        alive=fleet.num_workers,
        done=[0] * len(tasks),
        finished=[math.inf] * len(tasks),
    )
    run.fill()
    while not run.hand_out.over:
        run.step()
    makespan = max((end for end in run.finished if end < math.inf), default=0.0)
    return Ran(tuple(run.finished), makespan, run.busy_s, run.lost_s, run.num_deaths, fleet.num_workers)
