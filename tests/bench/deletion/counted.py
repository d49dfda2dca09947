"""A model by its counts: authors placed by the hash, and the plans of the real planner for them.

The hash that places a subject (`Assigner`), the planner (`plan_shard`, `tainted`) and the price of its
plans are real. Records are counted (an author has some number in one slice), and so are checkpoints,
which have a size and no bytes. A test compares the model with the flows over fakes.

    model = CountedModel.trained(Arrangement("SISA", 8, 8, "cumulative"), authors, secret)
    model.without([199]).record_epochs / model.record_epochs

Closed form: shards and slices are drawn independently for each author, so the stage of a prefix of
slices is trained again with probability 1 - prod(1 - H / S) over the deleted authors, where H is the
chance of an author's slice to be in that prefix, and S the number of shards. Its cost is the mean
number of records of the remaining authors in it. The form is exact for a sequential schedule; for a
cumulative one it assumes that no slice is empty.

Source: SISA, Bourtoule et al. 2021, section V; one of many authors gives its 2/3 + 1/(3R).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cluster.cli.plan import ASSUMED_BYTES_PER_RANK
from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import HeldCheckpoint, Part, Record, RecordRow, Risk, SliceState, record_epochs
from sisa.planning.bands import Bands
from sisa.planning.cost import suffix_record_epochs
from sisa.planning.layout import Assigner, Layout
from sisa.planning.orders import chosen_orders
from sisa.planning.plan import Recipe, Schedule, ShardPlan, ShardView, plan_shard, tainted_checkpoints

FINGERPRINT, EPOCHS = "fingerprint", 4
CHECKPOINT_BYTES = 8 * ASSUMED_BYTES_PER_RANK  # SmolLM2-135M at rank 8


@dataclass(frozen=True)
class Author:
    """A subject with some records; the risk places it where there are bands."""

    number: int
    records: int
    risk: Risk = None

    def record(self) -> Record:
        """Return one of the author's records, to be placed."""
        body = (Part("text", "x"),)
        return Record(f"a{self.number}", f"a{self.number:03}", "text", body, deletion_risk=self.risk)


@dataclass(frozen=True)
class Arrangement:
    """The layout and training of a model."""

    name: str
    shards: int
    slices: int
    schedule: Schedule = "sequential"
    bands: Bands | None = None
    orders: int = 1

    @property
    def layout(self) -> Layout:
        return Layout(self.shards, self.slices, self.bands)

    @property
    def recipe(self) -> Recipe:
        others = chosen_orders(self.slices, self.orders, self.bands)[1:]
        return Recipe(self.slices, self.schedule, EPOCHS, {"learning_rate": 0.1}, "base", others)

    def spread(self, author: Author) -> list[float]:
        """Return the chance of each slice to be the author's."""
        allowed = self.layout.slices(author.risk)
        return [1 / len(allowed) if each in allowed else 0.0 for each in range(self.slices)]


def counted_row(shard: int, slice_: int) -> RecordRow:
    """Return the row of a record that is only counted, added by the first commit."""
    return RecordRow("", None, "", "", "text", shard, slice_, 0, 0)


@dataclass(frozen=True)
class CountedShard:
    """A shard's records by slice, and the checkpoints that it holds."""

    shard: int
    sizes: Mapping[int, int]
    versions: Mapping[int, int] = field(default_factory=dict)
    held: tuple[HeldCheckpoint, ...] = ()

    @property
    def view(self) -> ShardView:
        states = tuple(
            SliceState(self.shard, n, digest_of([self.shard, n, self.versions.get(n, 0)]), size)
            for n, size in sorted(self.sizes.items())
            if size
        )
        return ShardView(self.shard, states, self.held)

    def plan(self, recipe: Recipe) -> ShardPlan:
        return plan_shard(self.view, recipe, FINGERPRINT)

    def trained(self, plan: ShardPlan) -> CountedShard:
        """Return the shard with everything that its plan trains, in all orders."""
        rest = (1, FINGERPRINT, "m", "a", CHECKPOINT_BYTES, 1.0)
        made = (
            HeldCheckpoint(job.key, self.shard, job.prefix, *rest, record_epochs(job))
            for job in plan.all_missing
        )
        return replace(self, held=(*self.held, *made))

    def without(self, gone: Mapping[int, int]) -> CountedShard:
        """Return the shard without some records, and without the checkpoints that they touched."""
        sizes = {n: size - gone.get(n, 0) for n, size in self.sizes.items()}
        versions = {n: self.versions.get(n, 0) + (n in gone) for n in self.sizes}
        erased = set(tainted_checkpoints(self.held, [counted_row(self.shard, n) for n in gone]))
        kept = tuple(each for each in self.held if each.key not in erased)
        return CountedShard(self.shard, sizes, versions, kept)


@dataclass(frozen=True)
class Deleted:
    """The result of a deletion.

    It has the record-epochs to train again until everything is as from scratch, those of the other
    orders, and the share of its slices that each affected shard still serves.
    """

    record_epochs: int
    record_epochs_others: int
    depths: tuple[float, ...]
    shards: int

    @property
    def depth(self) -> float:
        """Return the mean over the affected shards."""
        return math.fsum(self.depths) / len(self.depths)

    @property
    def depth_of_all(self) -> float:
        """Return the mean over all shards."""
        return (math.fsum(self.depths) + self.shards - len(self.depths)) / self.shards


@dataclass(frozen=True)
class CountedModel:
    """A trained model."""

    arrangement: Arrangement
    authors: Mapping[int, Author]
    places: Mapping[int, RecordRow]
    shards: Mapping[int, CountedShard]

    @classmethod
    def trained(cls, arrangement: Arrangement, authors: Iterable[Author], secret: bytes) -> CountedModel:
        """Return a model with all authors placed under a secret and all shards trained."""
        assign, by = Assigner(Keyed(secret), arrangement.layout), {each.number: each for each in authors}
        places = {number: counted_row(*assign.place(each.record())) for number, each in by.items()}
        sizes = Counter[tuple[int, int]]()
        for number, place in places.items():
            sizes[place.shard, place.slice] += by[number].records
        shards = {
            shard: CountedShard(shard, {n: sizes[shard, n] for n in range(arrangement.slices)})
            for shard in range(arrangement.shards)
        }
        recipe = arrangement.recipe
        held = {shard: each.trained(each.plan(recipe)) for shard, each in shards.items()}
        return cls(arrangement, by, places, held)

    @cached_property
    def record_epochs(self) -> int:
        """Return the cost of training everything in order 0, which other orders add to."""
        sizes = (each.sizes for each in self.shards.values())
        return sum(suffix_record_epochs(each, self.arrangement.recipe)[0] for each in sizes)

    @cached_property
    def record_epochs_of_all_orders(self) -> int:
        return sum(held.record_epochs for each in self.shards.values() for held in each.held)

    def without(self, gone: Collection[int]) -> Deleted:
        """Delete some authors together from the model as it was trained."""
        by: dict[int, Counter[int]] = {}
        for number in gone:
            place = self.places[number]
            by.setdefault(place.shard, Counter())[place.slice] += self.authors[number].records
        recipe = self.arrangement.recipe
        plans = [self.shards[shard].without(slices).plan(recipe) for shard, slices in by.items()]
        return Deleted(
            sum(plan.record_epochs for plan in plans),
            sum(plan.record_epochs_others for plan in plans),
            tuple(served(plan) for plan in plans),
            self.arrangement.shards,
        )


def served(plan: ShardPlan) -> float:
    """Return the share of its slices that a shard serves before anything is trained again."""
    return 1.0 if plan.head.converged else plan.head.depth / len(plan.path)


def until_base(arrangement: Arrangement, records: int, seed: int) -> int:
    """Return how many deletions of one record each a model takes until every shard serves the base.

    Nothing is trained in between. All cells hold equally many records, and the deleted record is drawn.
    """
    draw, recipe = random.Random(seed), arrangement.recipe
    even = dict.fromkeys(range(arrangement.slices), records)
    fresh = (CountedShard(n, even) for n in range(arrangement.shards))
    shards = [each.trained(each.plan(recipe)) for each in fresh]
    left, deletions = set(range(arrangement.shards)), 0
    while left:
        shard, slice_ = draw.randrange(arrangement.shards), draw.randrange(arrangement.slices)
        deletions += 1
        if shard in left:
            shards[shard] = shards[shard].without({slice_: 1})
            if shards[shard].plan(recipe).head.key is None:
                left.remove(shard)
    return deletions


def expected_share(
    arrangement: Arrangement, authors: Mapping[int, Author], gone: Collection[int]
) -> float:
    """Return the share of order 0 that the deletion of some authors retrains, in closed form.

    >>> many = {n: Author(n, 1) for n in range(10**4)}
    >>> round(expected_share(Arrangement("SISA", 8, 8, "cumulative"), many, [0]), 4)
    0.0885
    """
    path = [tuple(range(end)) for end in range(1, arrangement.slices + 1)]
    lost = [authors[number] for number in gone]
    stays = [each for number, each in authors.items() if number not in set(gone)]
    again = _stages(arrangement, stays, path, lost)
    return math.fsum(again) / math.fsum(_stages(arrangement, authors.values(), path))


def _stages(
    arrangement: Arrangement,
    authors: Iterable[Author],
    prefixes: Sequence[tuple[int, ...]],
    gone: Sequence[Author] | None = None,
) -> list[float]:
    """Return the mean record-epochs of the stage at the end of each prefix, over all shards.

    Given deleted authors, count only the stages that their deletion trains again.
    """
    spreads = [(each.records, arrangement.spread(each)) for each in authors]
    held = [math.fsum(n * spread[s] for n, spread in spreads) for s in range(arrangement.slices)]
    over, under = arrangement.recipe.passes(0)
    found = []
    for prefix in prefixes:
        seen = prefix if arrangement.schedule == "cumulative" else prefix[-1:]
        size = over / under * math.fsum(held[each] for each in seen)
        found.append(size if gone is None else size * _chance(arrangement, prefix, gone))
    return found


def _chance(arrangement: Arrangement, prefix: Sequence[int], gone: Sequence[Author]) -> float:
    """Return the chance of a stage of one shard to be trained again."""
    spared = 1.0
    for author in gone:
        spread = arrangement.spread(author)
        spared *= 1 - math.fsum(spread[each] for each in prefix) / arrangement.shards
    return 1 - spared
