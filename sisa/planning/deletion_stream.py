"""Replay a stream of deletions by counts, and compare what it retrains with the closed forms.

    sizes       records of each slice of each shard, drawn as the hash (and bands) spread them
    deletions   distinct records, one by one or in batches; a batch costs the union of suffixes once
    groups      shares of the records, and how likely a record of each is to be deleted
    cost        record-epochs, counted a stage at a time as `cost.py` counts them

Shards are independent, so only the order within a shard matters, and the k-th run of every shard is
counted at once: 1,000,000 deletions over 10,000 shards take a hundred steps, not a million. A seed
decides all draws.

The closed forms assume equal shards. Hashed shards differ in size, and a record is more likely in a
large one: a request costs (1 - 1/S) points more on average. Only order 0 is counted. Every stage is
assumed to be held; `layout_advice.py` prices other orders and a checkpoint budget.

>>> round(points_one_by_one(num_records=1000, num_shards=10, num_deletions=2), 2)
197.9
>>> even = Stream(Layout(10, 3), "cumulative")
>>> round(even.one_share, 3), round(even.batch_share(1e9), 3)
(0.778, 1.0)

Source: SISA, Bourtoule et al. 2021, section V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sisa.planning.layout import Layout
from sisa.planning.plan import Schedule, passes

MAX_EXACT = 10**9  # most records from which deletions can be drawn at once
Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


def points_one_by_one(num_records: int, num_shards: int, num_deletions: float) -> float:
    """Return the expected points (one record, presented once) that K sequential requests retrain.

    The shards have no slices: (N/S + 1/(2S) - 1) K - K^2 / (2S) of N records in S shards.
    """
    n, s, k = num_records, num_shards, num_deletions
    return (n / s + 1 / (2 * s) - 1) * k - k * k / (2 * s)


@dataclass(frozen=True, slots=True)
class Group:
    """A share of the records, and the risk that each of them carries."""

    share: float
    risk: float


@dataclass(frozen=True)
class Stream:
    """A layout, its training, and its groups of records."""

    layout: Layout
    schedule: Schedule = "cumulative"
    num_epochs: int = 3
    groups: tuple[Group, ...] = (Group(1.0, 1.0),)  # all records are equally likely to be deleted

    @cached_property
    def _spread(self) -> Shares:
        """Return the share of all records by group and slice, [groups, slices]."""
        spread = np.zeros((len(self.groups), self.layout.num_slices))
        for number, group in enumerate(self.groups):
            allowed = self.layout.slices(group.risk)
            spread[number, list(allowed)] = group.share / len(allowed)
        return spread / float(spread.sum())

    @cached_property
    def held(self) -> Shares:
        """Return the share of all records in each slice."""
        found: Shares = self._spread.sum(axis=0)
        return found

    @cached_property
    def hits(self) -> Shares:
        """Return the share of the deletions that hit each slice."""
        likely = self._spread * np.array([[group.risk] for group in self.groups])
        found: Shares = likely.sum(axis=0) / likely.sum()
        return found

    def path(self, order: Sequence[int]) -> tuple[Shares, Shares]:
        """Return the costs of an order's stages and the shares of the deletions that hit their slices.

        Costs are in passes over all records of a shard.
        """
        over, under = passes(self.schedule, self.num_epochs, self.layout.num_slices)
        held, hits = self.held[list(order)], self.hits[list(order)]
        seen = np.cumsum(held) if self.schedule == "cumulative" else held
        return np.where(held > 0, seen, 0) * over / under, hits

    @cached_property
    def _from_each_slice(self) -> Shares:
        """Return the cost of training from each slice on, in passes over all records of a shard."""
        return np.cumsum(self.path(range(self.layout.num_slices))[0][::-1])[::-1]

    @property
    def epochs(self) -> float:
        """Return the passes over all records in one training; `num_epochs` if slices are equal."""
        return float(self._from_each_slice[0])

    @property
    def one_share(self) -> float:
        """Return the expected cost of one deletion, as a share of training its whole shard."""
        return float(self._from_each_slice @ self.hits) / self.epochs

    def first_hits(self, num_deletions: float) -> Shares:
        """Return the chance of each slice to be the earliest that a batch hits (mean of arrivals)."""
        missed: Shares = np.exp(-num_deletions * np.concatenate([[0.0], np.cumsum(self.hits)]))
        return missed[:-1] - missed[1:]

    def batch_share(self, num_deletions: float) -> float:
        """Return the expected cost of a batch of deletions from one shard, as a share of training it."""
        return float(self._from_each_slice @ self.first_hits(num_deletions)) / self.epochs

    def expected(self, num_records: int, num_deletions: int, batch: int = 1) -> float:
        """Return the record-epochs of a stream by closed forms.

        Batches of several deletions are assumed to spread over shards as Poisson arrivals do.
        """
        shards = self.layout.num_shards
        if min(batch, num_deletions) <= 1:
            points = points_one_by_one(num_records, shards, num_deletions)
            return points * self.epochs * self.one_share
        batch = min(batch, num_deletions)
        left = num_records - num_deletions / 2 - batch / 2  # average after a batch
        return num_deletions / batch * left * self.epochs * self.batch_share(batch / shards)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Outcome of a stream, and the expectation of the closed forms."""

    num_records: int
    num_deletions: int
    num_runs: int  # of single shards
    record_epochs: int
    full_record_epochs: int
    expected_record_epochs: float


def replay_stream(
    stream: Stream, num_records: int, num_deletions: int, *, batch: int = 1, seed: int = 0
) -> Replayed:
    """Draw a model's slices and delete from them; `batch` deletions are carried out together.

    Raise ValueError for more deletions than the groups with a risk have records.
    """
    draw, layout = np.random.default_rng(seed), stream.layout
    shares = np.tile(stream.held, layout.num_shards) / layout.num_shards
    flat = draw.multinomial(num_records, shares).astype(np.int64)
    gone = _drawn(draw, flat, stream, num_deletions)
    where = draw.permutation(np.repeat(np.arange(len(flat)), gone))
    sizes = flat.reshape(layout.num_shards, layout.num_slices)
    full, cost = int(_stage_costs(sizes, stream).sum()), 0
    shard, slice_ = np.divmod(where, layout.num_slices)
    number = np.arange(len(where)) // batch
    runs = np.stack([shard, number, slice_], axis=1)[np.lexsort((slice_, number, shard))]
    for shards, first, (rows, slices) in _steps(runs):  # one run of each of some shards
        np.subtract.at(sizes, (rows, slices), 1)
        costs = _stage_costs(sizes[shards], stream)
        cost += int(costs[np.arange(layout.num_slices) >= first[:, None]].sum())
    num_runs = len(np.unique(runs[:, :2], axis=0))
    expected = stream.expected(num_records, num_deletions, batch)
    return Replayed(num_records, num_deletions, num_runs, cost, full, expected)


def _drawn(draw: np.random.Generator, flat: Counts, stream: Stream, num_deletions: int) -> Counts:
    """Return how many records of each cell are deleted; never more than it holds."""
    if len(stream.groups) == 1 and int(flat.sum()) < MAX_EXACT:
        even: Counts = draw.multivariate_hypergeometric(flat, num_deletions, method="marginals")
        return even
    gone = np.zeros_like(flat)
    likely = np.divide(stream.hits, stream.held, out=np.zeros_like(stream.held), where=stream.held > 0)
    weights = np.tile(likely, stream.layout.num_shards)
    while (missing := num_deletions - int(gone.sum())) > 0:
        chances = weights * (flat - gone)
        if not chances.any():
            raise ValueError("more deletions than records with a risk")
        gone = np.minimum(flat, gone + draw.multinomial(missing, chances / chances.sum()))
    return gone


def _stage_costs(sizes: Counts, stream: Stream) -> Counts:
    """Return the record-epochs of each stage, [shards, slices]; an empty slice has none."""
    over, under = passes(stream.schedule, stream.num_epochs, stream.layout.num_slices)
    seen = np.cumsum(sizes, axis=1) if stream.schedule == "cumulative" else sizes
    costs: Counts = np.where(sizes > 0, -(-over * seen // under), 0)
    return costs


def _steps(runs: Counts) -> Iterator[tuple[Counts, Counts, Counts]]:
    """Yield the shards with a k-th run, its first slices, and its shards and slices, for k = 0, 1, ...

    `runs` are sorted rows of (shard, batch, slice), one for each deletion.
    """
    if not len(runs):
        return
    new_shard = np.diff(runs[:, 0], prepend=-1) != 0
    new_run = new_shard | (np.diff(runs[:, 1], prepend=-1) != 0)
    number = np.cumsum(new_run)
    step = number - np.maximum.accumulate(np.where(new_shard, number, 0))
    order = np.argsort(step, kind="stable")
    bounds = np.searchsorted(step[order], np.arange(step.max() + 2))
    for start, end in pairwise(bounds):
        here = order[start:end]
        first = here[new_run[here]]
        yield runs[first, 0], runs[first, 2], runs[here][:, [0, 2]].T
