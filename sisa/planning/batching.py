"""Decide when to carry requests out: now, or together with later ones.

Costs are expected record-epochs. Arrivals are assumed to be as frequent as in the past and spread evenly
over the records. Of several deletions in one shard the one in the earliest slice decides the cost, since
a batch costs the union of suffixes once. Waiting never passes a due date: requests due within the margin
run now. A saving below `WORTH_WAITING` of the cost does not justify keeping a person's data longer.

>>> shard = ShardCosts(pending=30.0, suffixes=((30.0, 0.5), (10.0, 0.5)))
>>> price([shard], arrivals=0.0)
(30.0, 30.0)
>>> now, waiting = price([shard], arrivals=2.0)
>>> now > waiting
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

MARGIN_DAYS = 3  # a run, its repetition after a fault, and a weekend
WORTH_WAITING = 0.1

Choice = Literal["run now", "wait", "nothing to do"]


@dataclass(frozen=True, slots=True)
class ShardCosts:
    """Costs of one shard: of its waiting requests, and of deleting one record of each slice."""

    pending: float
    suffixes: tuple[tuple[float, float], ...]  # (cost, share of all records), first slice first


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The choice and its reason; costs in expected record-epochs."""

    requests: tuple[str, ...]
    choice: Choice
    why: str
    run_by: str | None  # the day on which waiting ends
    expected_arrivals: float
    cost_now: float
    cost_waiting: float


def price(shards: Sequence[ShardCosts], arrivals: float) -> tuple[float, float]:
    """Return the expected costs of running what waits now, and of running it with later arrivals.

    The first cost includes that of the arrivals.
    """
    now = waiting = 0.0
    for shard in shards:
        now += shard.pending
        missed, before = 1.0, 0.0  # chance that the arrivals hit none of the slices so far; their share
        for cost, share in shard.suffixes:
            before += share
            still = max(0.0, 1.0 - before) ** arrivals
            now += cost * (missed - still)
            waiting += max(shard.pending, cost) * (missed - still)
            missed = still
        waiting += shard.pending * missed
    return now, waiting


def choose(
    requests: Sequence[tuple[str, int]],
    shards: Sequence[ShardCosts],
    arrivals_per_day: float,
    day: str,
) -> RunPlan:
    """Decide for (request id, days left) pairs, the most urgent first, on an ISO date."""
    names = tuple(name for name, _ in requests)
    if not requests:
        return RunPlan((), "nothing to do", "no approved request waits", None, 0.0, 0.0, 0.0)
    days_left = min(left for _, left in requests)
    patience = days_left - MARGIN_DAYS
    arrivals = arrivals_per_day * max(0, patience)
    now, waiting = price(shards, arrivals)
    run_by = (date.fromisoformat(day) + timedelta(days=max(0, patience))).isoformat()
    saving = (now - waiting) / now if now else 0.0
    choice: Choice = "run now"
    why = f"waiting would save {100 * saving:.0f}% of the expected cost"
    if patience <= 0:
        due = f"due within {MARGIN_DAYS} days" if days_left >= 0 else "overdue"
        why = f"a request is {due}"
    elif saving >= WORTH_WAITING:
        choice = "wait"
        why = f"waiting until {run_by} saves {100 * saving:.0f}% of the expected cost"
    return RunPlan(names, choice, why, run_by, arrivals, now, waiting)
