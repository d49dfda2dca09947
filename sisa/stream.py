"""A stream of deletions replayed by counts: what it retrains, and what the closed forms say it does.

    sizes       records of each slice of each shard, drawn as the hash spreads them
    deletions   distinct records, all with equal chance, one after another or in batches; a batch costs
                the union of suffixes once
    cost        record-epochs, counted as `plan.py` and `cost.py` count them, a stage at a time

Rules: pure, a seed decides. Shards do not see each other, so that what matters is the order within a
shard, and the k-th run of every shard is counted at once: 1,000,000 deletions over 10,000 shards are a
hundred steps, not a million.

Closed forms (SISA, Bourtoule et al. 2021, section V, with N records, S shards, R slices):

    points_one_by_one   (N/S + 1/(2S) - 1) K - K^2 / (2S)       of K requests, sharding alone
    points_at_once      N (1 - (1 - 1/S)^K) - K                 of K requests together
    slicing_share       2/3 + 1/(3R) of a shard's cost (cumulative), (R + 1) / (2R) (sequential)

The forms take shards to be equal. Hashed ones are not, and a record is likelier to lie in a large one: a
request costs (1 - 1/S) points more on the mean.

Not covered: time and workers (`simulate.py`); records of unequal risk, and the bands that use it.

>>> round(points_one_by_one(num_records=1000, num_shards=10, num_deletions=2), 2)
197.9
>>> slicing_share(3, "cumulative"), slicing_share(3, "sequential")
(0.7777777777777777, 0.6666666666666666)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sisa.plan import Schedule, passes

Counts = NDArray[np.int64]


def points_one_by_one(num_records: int, num_shards: int, num_deletions: int) -> float:
    """Expected points (records, each once) that K sequential requests retrain, without slices."""
    n, s, k = num_records, num_shards, num_deletions
    return (n / s + 1 / (2 * s) - 1) * k - k * k / (2 * s)


def points_at_once(num_records: int, num_shards: int, num_deletions: int) -> float:
    """Expected points that K requests carried out together retrain, without slices."""
    spared = (1 - 1 / num_shards) ** num_deletions
    return float(num_records * (1 - spared) - num_deletions)


def slicing_share(num_slices: int, schedule: Schedule) -> float:
    """Expected cost of one deletion, as a share of training its whole shard of equal slices."""
    r = num_slices
    return 2 / 3 + 1 / (3 * r) if schedule == "cumulative" else (r + 1) / (2 * r)


def batch_share(num_slices: int, schedule: Schedule, num_deletions: float) -> float:
    """Expected cost of deleting several records of one shard at once, as a share of training it: that
    of the suffix from the earliest slice hit. A fractional number is a mean of Poisson arrivals.

    >>> batch_share(4, "cumulative", 0.0), batch_share(1, "cumulative", 1e9)
    (0.0, 1.0)
    """
    weights = np.arange(1, num_slices + 1) if schedule == "cumulative" else np.ones(num_slices)
    suffix = np.cumsum(weights[::-1])[::-1] / weights.sum()
    missed = np.exp(-num_deletions * np.arange(num_slices + 1) / num_slices)  # no slice before r is hit
    return float(suffix @ (missed[:-1] - missed[1:]))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a stream came to, beside what the closed forms expect of it."""

    num_records: int
    num_deletions: int
    num_runs: int  # of single shards
    record_epochs: int
    full_record_epochs: int
    expected_record_epochs: float

    @property
    def share_per_run(self) -> float:
        """Mean cost of a run of one shard, as a share of training everything."""
        return self.record_epochs / max(1, self.num_runs) / self.full_record_epochs


@dataclass(frozen=True, slots=True)
class Layouted:
    """A layout, and how its stages are trained."""

    num_shards: int
    num_slices: int
    schedule: Schedule = "cumulative"
    num_epochs: int = 3


def stage_costs(sizes: Counts, layout: Layouted) -> Counts:
    """Record-epochs of each stage, [shards, slices]; an empty slice is no stage."""
    over, under = passes(layout.schedule, layout.num_epochs, layout.num_slices)
    seen = np.cumsum(sizes, axis=1) if layout.schedule == "cumulative" else sizes
    costs: Counts = np.where(sizes > 0, -(-over * seen // under), 0)
    return costs


def replay(
    layout: Layouted, num_records: int, num_deletions: int, *, batch: int = 1, seed: int = 0
) -> Replayed:
    """Draw a model's slices and delete from them; `batch` deletions are carried out together."""
    draw = np.random.default_rng(seed)
    cells = layout.num_shards * layout.num_slices
    sizes = draw.multinomial(num_records, np.full(cells, 1 / cells)).astype(np.int64)
    gone = draw.multivariate_hypergeometric(sizes, num_deletions, method="marginals")
    sizes = sizes.reshape(layout.num_shards, layout.num_slices)
    full = int(stage_costs(sizes, layout).sum())
    where = draw.permutation(np.repeat(np.arange(cells), gone))
    runs = _runs(where, batch, layout.num_slices)
    cost = sum(_run(sizes, layout, *each) for each in _steps(runs))
    num_runs = len(np.unique(runs[:, :2], axis=0))
    expected = expected_record_epochs(layout, num_records, num_deletions, batch)
    return Replayed(num_records, num_deletions, num_runs, cost, full, expected)


def expected_record_epochs(
    layout: Layouted, num_records: int, num_deletions: int, batch: int = 1
) -> float:
    """By closed forms; batches of several are taken to spread over shards as Poisson arrivals do."""
    if batch == 1:
        share = slicing_share(layout.num_slices, layout.schedule) * layout.num_epochs
        return points_one_by_one(num_records, layout.num_shards, num_deletions) * share
    left = num_records - num_deletions / 2 - batch / 2  # on the mean, after a batch
    share = batch_share(layout.num_slices, layout.schedule, batch / layout.num_shards)
    return num_deletions / batch * left * layout.num_epochs * share


def _runs(where: Counts, batch: int, num_slices: int) -> Counts:
    """[deletions, (shard, batch, slice)], shard by shard, batch by batch, the earliest slice first."""
    rows = np.stack([where // num_slices, np.arange(len(where)) // batch, where % num_slices], axis=1)
    ordered: Counts = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    return ordered


def _steps(runs: Counts) -> list[tuple[Counts, Counts, Counts]]:
    """For k = 0, 1, ...: the shards that have a k-th run, its first slices, and (shard, slice) of its
    deletions."""
    if not len(runs):
        return []
    new_shard = np.diff(runs[:, 0], prepend=-1) != 0
    new_run = new_shard | (np.diff(runs[:, 1], prepend=-1) != 0)
    number = np.cumsum(new_run)
    of_shard = np.maximum.accumulate(np.where(new_shard, number, 0))
    step = number - of_shard
    order = np.argsort(step, kind="stable")
    bounds = np.searchsorted(step[order], np.arange(step.max() + 2))
    found = []
    for start, end in pairwise(bounds):
        here = order[start:end]
        first = here[new_run[here]]
        found.append((runs[first, 0], runs[first, 2], runs[here][:, [0, 2]]))
    return found


def _run(sizes: Counts, layout: Layouted, shards: Counts, first: Counts, gone: Counts) -> int:
    """Carry out one run of each of some shards: take the records out, and price the suffixes."""
    np.subtract.at(sizes, (gone[:, 0], gone[:, 1]), 1)
    costs = stage_costs(sizes[shards], layout)
    return int(costs[np.arange(layout.num_slices) >= first[:, None]].sum())
