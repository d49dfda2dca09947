"""Plan what to serve, train and retire, from remaining slices, held checkpoints and the config.

    target  = per shard, the last of the jobs of the records that remain, in order 0
    tainted = held checkpoints that a removed record touched
    head    = target if held, else the deepest clean one held, of whatever order, else the base (None)
    train   = the path from the target's deepest held ancestor to the target
    others  = the same of every other order
    retired = clean, but neither on any order's path nor heading; or over the shard's budget of bytes

The planner does not know what happened. It sees what remains and what is held, one shard at a time. An
empty slice has no stage. A shard keeps the fingerprint that it was trained under while its target is
held; a shard that must train again takes the present one, whole. A checkpoint was touched by every
record of its prefix's slices that was in the ledger at its sequence number, whatever the schedule: a
sequential stage starts from its parent's weights.

Orders (`orders.py`) share the checkpoints of their common prefixes: no key depends on the order. The
other orders end one stage short of all slices, since whatever taints order 0's target would taint that
stage, too. They are trained only under the present fingerprint.

`schedule: cumulative` (Bourtoule et al. 2021, section V): stage r of R (from 1) makes 2 E / (R + 1)
passes over slices 1..r, so that equal slices cost E epochs in total. `sequential` makes E passes over
slice r alone. For appended slices (past R), stage r makes 2 E / (r + 1) passes over slices 1..r,
independent of later slices. In another order, r is the highest number among the stage's slices.

>>> passes("cumulative", num_epochs=6, num_slices=3), passes("sequential", 6, 3)
((3, 1), (6, 1))
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from sisa.core.domain import (
    ANY_SHARD,
    Export,
    Head,
    HeldCheckpoint,
    RecordRow,
    SliceJob,
    SliceState,
    record_epochs,
)
from sisa.planning.checkpoint_budget import best_kept, split_budget
from sisa.planning.orders import Order, arranged

Schedule = Literal["cumulative", "sequential"]
LAYERWISE = "layerwise"  # in a job's training: the number of blocks of layers; stage n trains block n


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all jobs of a model share: what affects their bits, and the orders besides order 0."""

    num_slices: int
    schedule: Schedule
    num_epochs: int
    training: Mapping[str, Any]
    base: str
    other_orders: tuple[Order, ...] = ()
    shard_budget: int | None = None  # bytes of checkpoints that a whole shard keeps; None: all of them
    risks: tuple[float, ...] = ()  # of each slice of a generation; empty: all alike

    def passes(self, slice_: int) -> tuple[int, int]:
        """Return the passes of a slice's stage, as an exact fraction."""
        return passes(self.schedule, self.num_epochs, self.num_slices, slice_)


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard as the ledger sees it: its non-empty slices and its clean held checkpoints."""

    shard: int
    slices: tuple[SliceState, ...]
    held: tuple[HeldCheckpoint, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """Stages that an order lacks once the orders before it are complete, and their held parent.

    The parent is None for the base, and for a stage that another order lacks.
    """

    train: tuple[SliceJob, ...]
    parent: HeldCheckpoint | None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Reconciliation of one shard: the stages of every order and what it lacks, order 0's first."""

    shard: int
    paths: tuple[tuple[SliceJob, ...], ...]
    head: Head
    missing: tuple[Missing, ...]
    retired: tuple[str, ...]

    @property
    def path(self) -> tuple[SliceJob, ...]:
        """Return the stages up to the target."""
        return self.paths[0]

    @property
    def stages(self) -> dict[str, SliceJob]:
        """Return the stages of all orders, by key."""
        return {job.key: job for path in self.paths for job in path}

    @property
    def train(self) -> tuple[SliceJob, ...]:
        """Return what order 0 lacks."""
        return self.missing[0].train

    @property
    def all_missing(self) -> tuple[SliceJob, ...]:
        """Return what all orders lack, order 0's stages first."""
        return tuple(job for each in self.missing for job in each.train)

    @property
    def record_epochs(self) -> int:
        return sum(record_epochs(job) for job in self.train)

    @property
    def record_epochs_others(self) -> int:
        """Return the record-epochs of what the other orders lack."""
        return sum(map(record_epochs, self.all_missing)) - self.record_epochs


def passes(schedule: Schedule, num_epochs: int, num_slices: int, slice_: int = 0) -> tuple[int, int]:
    """Return the passes of one stage over its slices, as an exact fraction.

    Stage r past `num_slices` (appended) counts as the last of r stages: 2 E / (r + 1).
    """
    if schedule == "sequential":
        return num_epochs, 1
    fraction = Fraction(2 * num_epochs, max(num_slices, slice_ + 1) + 1)
    return fraction.numerator, fraction.denominator


def jobs(
    shard: int, slices: Sequence[SliceState], recipe: Recipe, fingerprint: str, order: Order = ()
) -> tuple[SliceJob, ...]:
    """Return the stages of a shard in an order, one for each slice that holds records.

    The default is order 0.
    """
    path: list[SliceJob] = []
    seen: list[SliceState] = []
    states = {state.slice: state for state in slices}
    for state in map(states.__getitem__, arranged(states, order)):
        seen.append(state)
        stage = [state] if recipe.schedule == "sequential" else seen
        path.append(
            SliceJob(
                shard=shard,
                slice=state.slice,
                parent=path[-1].key if path else None,
                slices=tuple((each.slice, each.root) for each in stage),
                num_records=sum(each.num_records for each in stage),
                passes=recipe.passes(max(each.slice for each in seen)),
                training=recipe.training,
                base=recipe.base,
                fingerprint=fingerprint,
                before=path[-1].prefix if path else (),
            )
        )
    return tuple(path)


def all_paths(
    shard: int, slices: Sequence[SliceState], recipe: Recipe, fingerprint: str
) -> tuple[tuple[SliceJob, ...], ...]:
    """Return the stages of every order; orders other than order 0 end one short of all slices."""
    others = (jobs(shard, slices, recipe, fingerprint, order)[:-1] for order in recipe.other_orders)
    return (jobs(shard, slices, recipe, fingerprint), *others)


def reached(path: Sequence[SliceJob], held: Container[str]) -> int:
    """Return how many stages of a path need no training: all up to the deepest held one."""
    return max((number for number, job in enumerate(path, start=1) if job.key in held), default=0)


def tainted_checkpoints(
    held: Iterable[HeldCheckpoint], removed: Collection[RecordRow]
) -> tuple[str, ...]:
    """Return the keys of the checkpoints that any of the removed records touched."""
    return tuple(each.key for each in held if any(touched(each, row) for row in removed))


def touched(made: HeldCheckpoint | Export, row: RecordRow) -> bool:
    """Return whether a held record is in the lineage of a checkpoint or an export.

    For an export that is older than the present partition, only its time is compared.
    """
    if made.shard != ANY_SHARD and (row.shard != made.shard or row.slice not in made.prefix):
        return False
    return row.seq <= made.seq


def held_back(
    heads: Iterable[Head], held: Iterable[HeldCheckpoint], restricted: Collection[RecordRow]
) -> list[Head]:
    """Return what shards serve while the processing of some records is restricted.

    A head that saw one of them gives way to the deepest held checkpoint of its shard that saw none, of
    whatever order, or to nothing. What is planned and trained does not depend on it.

    >>> head = Head(0, None, 0, "t")
    >>> held_back([head], [], []) == [head]
    True
    """
    made: dict[int, dict[str, HeldCheckpoint]] = {}
    for each in held:
        made.setdefault(each.shard, {})[each.key] = each
    found = []
    for head in heads:
        here = made.get(head.shard, {})
        gone = {key for key, each in here.items() if any(touched(each, row) for row in restricted)}
        if head.key in gone:
            left = [each for key, each in here.items() if key not in gone]
            best = max(left, key=lambda each: (len(each.prefix), each.seq, each.key), default=None)
            depth = len(best.prefix) if best else 0
            head = replace(head, key=best.key if best else None, depth=depth)
        found.append(head)
    return found


def tainted_exports(
    exports: Iterable[Export], removed: Mapping[str, Collection[RecordRow]]
) -> list[Export]:
    """Return the clean exports that a removed record touched, tainted by the first such request."""
    by: dict[tuple[str, str], str] = {}
    clean = [each for each in exports if not each.stale]
    for export in clean:
        names = [name for name, rows in removed.items() if any(touched(export, row) for row in rows)]
        if names:
            by.setdefault(export.directory, names[0])
    return [
        replace(each, state="tainted", request_id=by[each.directory])
        for each in clean
        if each.directory in by
    ]


def plan_shard(view: ShardView, recipe: Recipe, fingerprint: str) -> ShardPlan:
    """Reconcile one shard. `fingerprint` is the present environment's."""
    held = {checkpoint.key: checkpoint for checkpoint in view.held}
    chosen = _fingerprint_to_serve(view, recipe, fingerprint, held)
    paths = all_paths(view.shard, view.slices, recipe, chosen)
    head = _head(view.shard, paths[0], held)
    missing: list[Missing] = []
    known = set(held)
    for path in paths if chosen == fingerprint else paths[:1]:
        done = reached(path, known)
        parent = held.get(path[done - 1].key) if 0 < done < len(path) else None
        missing.append(Missing(path[done:], parent))
        known.update(job.key for job in path[done:])
    keep = {job.key for path in paths for job in path} | {head.key}
    if not any(each.train for each in missing):
        keep -= _over_budget(view, recipe, paths, held)
    retired = tuple(key for key in held if key not in keep)
    return ShardPlan(view.shard, paths, head, tuple(missing), retired)


def _over_budget(
    view: ShardView,
    recipe: Recipe,
    paths: Sequence[Sequence[SliceJob]],
    held: Mapping[str, HeldCheckpoint],
) -> set[str]:
    """Return the held stages to drop so that the rest fits: those that spare the least training.

    The last stage of every order stays, whatever its size.
    """
    if recipe.shard_budget is None:
        return set()
    last = {path[-1].key for path in paths if path}
    others = {job.key for path in paths for job in path if job.key in held} - last
    needed = sum(held[key].num_bytes for key in others)
    left = recipe.shard_budget - sum(held[key].num_bytes for key in last if key in held)
    if left >= needed or not others:
        return set()
    most = max(0, left // max(held[key].num_bytes for key in others))
    risks = recipe.risks or (1.0,) * recipe.num_slices
    weights = {
        each.slice: each.num_records * risks[each.slice % recipe.num_slices] for each in view.slices
    }
    choices = [
        best_kept(
            [record_epochs(job) for job in path],
            [weights[job.slice] for job in path],
            [n for n, job in enumerate(path) if job.key in others],
            most,
        )
        for path in paths
    ]
    chosen = zip(paths, split_budget(choices, most)[-1], strict=True)
    return others - {path[n].key for path, kept in chosen for n in kept.stages}


def gaps(plan: ShardPlan, held: Container[str]) -> list[SliceJob]:
    """Return stages that are not held and precede a held one on the path of any order."""
    before = (job for path in plan.paths for job in path[: reached(path, held)])
    return list({job.key: job for job in before if job.key not in held}.values())


def _fingerprint_to_serve(
    view: ShardView, recipe: Recipe, fingerprint: str, held: Container[str]
) -> str:
    """Return the fingerprint under which the shard's target is held, else the present one."""
    others = sorted({each.fingerprint for each in view.held} - {fingerprint})
    if not others:
        return fingerprint
    for each in (fingerprint, *others):
        path = jobs(view.shard, view.slices, recipe, each)
        if path and path[-1].key in held:
            return each
    return fingerprint


def _head(shard: int, path: Sequence[SliceJob], held: Mapping[str, HeldCheckpoint]) -> Head:
    if not path or not held:
        return Head(shard, None, 0, path[-1].key if path else None)
    target = path[-1].key
    if target in held:
        return Head(shard, target, len(path), target)
    on_path = {job.key for job in path}
    deepest = max(
        held.values(), key=lambda each: (len(each.prefix), each.key in on_path, each.seq, each.key)
    )
    return Head(shard, deepest.key, len(deepest.prefix), target)


def serving_depth(heads: Iterable[Head], views: Iterable[ShardView]) -> float:
    """Return the mean share of their slices that shards with records serve; 1 without such shards."""
    whole = {view.shard: len(view.slices) for view in views if view.slices}
    shares = [min(1.0, each.depth / whole[each.shard]) for each in heads if each.shard in whole]
    return sum(shares) / len(shares) if shares else 1.0
