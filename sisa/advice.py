"""Which layout to choose: what deletions, training and storage cost for each, by closed forms.

    Demand   how many records, how many deletions a month, and how likely whose deletion is
    Limits   bytes of checkpoints, hours of a deletion, and the units that they are counted in
    Advice   for each choice of shards and slices: the share of a full training that a month of deletions
             retrains, one by one and together; bytes; hours of training, and until a deletion is trained

Rules: pure; everything in closed form, so that a choice costs microseconds; the forms are those of
`stream.py`. Where there are several groups, each risk is a band of its own (`bands.py`) if there are
slices enough. What is over a limit is not recommended, and says which. A shard should keep
MIN_SHARD_RECORDS: below that an adapter has next to nothing to learn from.

Not covered: quality of answers (`tests/bench/quality.py`); unequal shards; subjects of many records.

>>> demand = Demand(num_records=1000, deletions_per_month=2.0)
>>> best = recommended(advise(demand, Limits(bytes_per_checkpoint=10, max_bytes=1000)))
>>> best.num_shards, best.num_slices, best.stored_bytes
(32, 3, 960)

Source: SISA, Bourtoule et al. 2021, section V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sisa.assign import Layout
from sisa.bands import Bands
from sisa.plan import Schedule
from sisa.stream import Group, Stream

MIN_SHARD_RECORDS = 30
MAX_SHARDS = 10_000
SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model must bear. Without groups all records are as likely to go."""

    num_records: int
    deletions_per_month: float
    schedule: Schedule = "cumulative"
    num_epochs: int = 3
    groups: tuple[Group, ...] = (Group(1.0, 1.0),)


@dataclass(frozen=True, slots=True)
class Limits:
    """What must not be exceeded; a rate of 0 leaves hours unknown."""

    bytes_per_checkpoint: int
    max_bytes: float = math.inf
    max_hours: float = math.inf  # of the mean deletion, on one worker
    record_epochs_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """One choice and what it costs. Shares are of training everything once in equal slices; hours of one
    worker, NaN where no rate was given."""

    num_shards: int
    num_slices: int
    thresholds: tuple[float, ...]  # of the bands; none where they would not help
    one_by_one: float  # a month's deletions, each carried out alone
    together: float  # a month's deletions, carried out as one batch
    stored_bytes: int
    training_hours: float
    hours_to_utility: float  # of one deletion: until its shard is whole again
    over: tuple[str, ...]


def advise(demand: Demand, limits: Limits) -> list[Advice]:
    """Every choice, the cheapest of those within the limits first."""
    found = [
        _advice(demand, limits, num_shards, num_slices)
        for num_shards in _shards(demand.num_records)
        for num_slices in SLICES
    ]
    return sorted(found, key=lambda each: (bool(each.over), each.one_by_one, each.stored_bytes))


def recommended(advised: Sequence[Advice]) -> Advice | None:
    """The cheapest choice within the limits; None where nothing is."""
    return next((each for each in advised if not each.over), None)


def _shards(num_records: int) -> list[int]:
    most = max(1, min(MAX_SHARDS, num_records // MIN_SHARD_RECORDS))
    return [2**n for n in range(most.bit_length())]


def stream_of(demand: Demand, num_shards: int, num_slices: int) -> Stream:
    """The stream of a choice, with a band for each risk where there are slices enough."""
    risks = sorted({group.risk for group in demand.groups})
    bands = Bands(thresholds=tuple(risks[1:])) if 1 < len(risks) <= num_slices else None
    layout = Layout(num_shards, num_slices, bands)
    return Stream(layout, demand.schedule, demand.num_epochs, demand.groups)


def _advice(demand: Demand, limits: Limits, num_shards: int, num_slices: int) -> Advice:
    stream = stream_of(demand, num_shards, num_slices)
    per_shard = demand.deletions_per_month / num_shards
    full = demand.num_records * stream.epochs
    weight = stream.epochs / demand.num_epochs  # large first slices are passed over more often
    rate = limits.record_epochs_per_s * 3600 or math.nan
    stored = num_shards * num_slices * limits.bytes_per_checkpoint
    hours = full / num_shards * stream.one_share / rate
    over = [("bytes", stored > limits.max_bytes), ("hours", hours > limits.max_hours)]
    bands = stream.layout.bands
    return Advice(
        num_shards,
        num_slices,
        bands.thresholds if bands else (),
        weight * per_shard * stream.one_share,
        weight * stream.batch_share(per_shard),
        stored,
        full / rate,
        hours,
        tuple(name for name, is_over in over if is_over),
    )
