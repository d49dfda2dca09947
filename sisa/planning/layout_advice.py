"""Advise on a layout: what deletions, training and storage cost for each choice, by closed forms.

The forms are those of `deletion_stream.py` and `checkpoint_budget.py`. With several groups, each risk is
a band of its own if there are enough slices. If not all checkpoints fit, those that spare the most
training are kept. A choice over a limit is not recommended, and names the limit. Orders cost training
and increase what is served meanwhile, so they are recommended only to meet `min_depth`. A shard should
have MIN_SHARD_RECORDS records, since an adapter learns next to nothing from fewer; a slice needs at
least one. Shards are assumed to be of equal size and subjects to have one record each. Quality of
answers is measured, not modelled (`tests/bench/answering/quality.py`).

>>> demand = Demand(num_records=1000, deletions_per_month=2.0)
>>> best = recommended(advise(demand, LayoutLimits(bytes_per_checkpoint=10, max_bytes=1000)))
>>> best.num_shards, best.num_slices, best.num_orders, best.num_kept, best.stored_bytes
(32, 4, 1, 3, 960)
>>> served = recommended(advise(demand, LayoutLimits(bytes_per_checkpoint=10, min_depth=0.7)))
>>> served.num_orders, round(served.serving_depth, 2)
(2, 0.71)

Source: SISA, Bourtoule et al. 2021, section V; orders: S3T, Chowdhury et al., ICLR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from sisa.planning.bands import Bands
from sisa.planning.checkpoint_budget import KeptStages, best_kept, expected, split_budget
from sisa.planning.deletion_stream import Group, Stream
from sisa.planning.layout import Layout
from sisa.planning.orders import Order, chosen_orders
from sisa.planning.plan import Schedule

MIN_SHARD_RECORDS = 30
MAX_SHARDS = 10_000
CANDIDATE_SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
ORDERS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Demand:
    """Requirements of a model; by default all records are equally likely to be deleted."""

    num_records: int
    deletions_per_month: float
    schedule: Schedule = "cumulative"
    num_epochs: int = 3
    groups: tuple[Group, ...] = (Group(1.0, 1.0),)


@dataclass(frozen=True, slots=True)
class LayoutLimits:
    """Upper limits, the least depth to serve, and the units; a rate of 0 leaves hours unknown."""

    bytes_per_checkpoint: int
    max_bytes: float = math.inf
    max_hours: float = math.inf  # of the mean deletion, on one worker
    record_epochs_per_s: float = 0.0
    min_depth: float = 0.0  # least share of its slices that a shard serves right after a deletion


@dataclass(frozen=True, slots=True)
class Advice:
    """One choice and its costs, as shares of training everything once, in order 0 and equal slices."""

    num_shards: int
    num_slices: int
    num_orders: int
    thresholds: tuple[float, ...]  # of the bands; empty without bands
    num_kept: int  # checkpoints of a shard
    kept: tuple[tuple[int, ...], ...]  # kept stages of each order, from 0, the last one included
    one_by_one: float  # a month's deletions, each carried out alone: order 0
    together: float  # a month's deletions, carried out as one batch: order 0
    others_one_by_one: float  # what the other orders retrain in addition
    serving_depth: float  # share of its slices that a shard serves right after a deletion
    stored_bytes: int
    training: float  # in all orders, once
    training_hours: float  # of one worker, as all hours; NaN without a rate
    record_epochs_to_utility: float  # of one deletion, until its shard is whole again
    hours_to_utility: float
    over: tuple[str, ...]


def advise(demand: Demand, limits: LayoutLimits) -> list[Advice]:
    """Return every choice, the cheapest of those within the limits first."""
    most = max(1, min(MAX_SHARDS, demand.num_records // MIN_SHARD_RECORDS))
    found = []
    for num_slices, num_orders in product(CANDIDATE_SLICES, ORDERS):
        if num_orders > num_slices:
            continue
        paths = _Paths(stream_of(demand, 1, num_slices), num_orders)
        for num_shards in (2**n for n in range(most.bit_length())):
            if num_shards * num_slices <= demand.num_records:
                found.append(_advice(demand, limits, num_shards, paths))
    return sorted(
        found,
        key=lambda e: (bool(e.over), e.one_by_one + e.others_one_by_one, e.stored_bytes, e.num_orders),
    )


def recommended(advised: Sequence[Advice]) -> Advice | None:
    """Return the cheapest choice within the limits, or None."""
    return next((each for each in advised if not each.over), None)


def stream_of(demand: Demand, num_shards: int, num_slices: int) -> Stream:
    """Return the stream of a choice, with a band for each risk if there are enough slices."""
    risks = sorted({group.risk for group in demand.groups})
    bands = Bands(thresholds=tuple(risks[1:])) if 1 < len(risks) <= num_slices else None
    layout = Layout(num_shards, num_slices, bands)
    return Stream(layout, demand.schedule, demand.num_epochs, demand.groups)


class _Paths:
    """The orders of a choice: costs of their stages, and how often each is hit."""

    def __init__(self, stream: Stream, num_orders: int) -> None:
        layout = stream.layout
        self.stream = stream
        self.orders: tuple[Order, ...] = chosen_orders(layout.num_slices, num_orders, layout.bands)
        others = (stream.path(order) for order in self.orders[1:])
        # The others end one stage short of all slices, as in `plan.py`.
        self.paths = [stream.path(self.orders[0]), *((c[:-1], h[:-1]) for c, h in others)]

    @cached_property
    def _splits(self) -> list[tuple[KeptStages, ...]]:
        return split_budget([best_kept(*path) for path in self.paths], self.num_spare)

    @property
    def num_spare(self) -> int:
        """Return the number of stages that need not be kept: all but the last of each order."""
        return sum(len(costs) - 1 for costs, _ in self.paths)

    def kept(self, num_extra: float) -> tuple[tuple[int, ...], ...]:
        """Return the kept stages of each order when `num_extra` fit in addition to the last ones."""
        if num_extra >= self.num_spare:
            return tuple(tuple(range(len(costs) - 1)) for costs, _ in self.paths)
        return tuple(each.stages for each in self._splits[max(0, int(num_extra))])

    def depth(self, kept: Sequence[Sequence[int]]) -> float:
        """Return the share of its slices that a shard serves after one deletion from it.

        It serves the deepest kept stage of any order before the deletion's slice.
        """
        served = 0.0
        for slice_, hit in enumerate(self.stream.hits):
            before = [order.index(slice_) for order in self.orders]
            depths = (n + 1 for each, at in zip(kept, before, strict=True) for n in each if n < at)
            served += float(hit) * max(depths, default=0)
        return served / self.stream.layout.num_slices


def _advice(demand: Demand, limits: LayoutLimits, num_shards: int, paths: _Paths) -> Advice:
    stream = paths.stream
    per_shard = demand.deletions_per_month / num_shards
    full = demand.num_records * stream.epochs
    weight = stream.epochs / demand.num_epochs  # large first slices take more passes
    rate = limits.record_epochs_per_s * 3600 or math.nan
    fitting = limits.max_bytes / (num_shards * limits.bytes_per_checkpoint)
    num_extra = max(0.0, fitting - len(paths.paths))
    kept = paths.kept(num_extra)
    with_last = tuple((*k, len(c) - 1) for k, (c, _) in zip(kept, paths.paths, strict=True))
    num_kept, depth = sum(map(len, with_last)), paths.depth(with_last)
    # What a deletion retrains of each order, and a training of all orders, in trainings of order 0.
    first, *others = (
        expected(*path, each) / stream.epochs for path, each in zip(paths.paths, kept, strict=True)
    )
    training = sum(float(costs.sum()) for costs, _ in paths.paths) / stream.epochs
    batch = expected(paths.paths[0][0], stream.first_hits(per_shard), kept[0]) / stream.epochs
    stored = num_shards * num_kept * limits.bytes_per_checkpoint
    again = full / num_shards * first
    over = {
        "bytes": stored > limits.max_bytes,
        "hours": again / rate > limits.max_hours,
        "depth": depth < limits.min_depth,
    }
    bands = stream.layout.bands
    return Advice(
        num_shards=num_shards,
        num_slices=stream.layout.num_slices,
        num_orders=len(paths.orders),
        thresholds=bands.thresholds if bands else (),
        num_kept=num_kept,
        kept=with_last,
        one_by_one=weight * per_shard * first,
        together=weight * batch,
        others_one_by_one=weight * per_shard * sum(others),
        serving_depth=depth,
        stored_bytes=stored,
        training=weight * training,
        training_hours=full * training / rate,
        record_epochs_to_utility=again,
        hours_to_utility=again / rate,
        over=tuple(name for name, is_over in over.items() if is_over),
    )
