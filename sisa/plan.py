"""(remaining slices, held checkpoints, config) -> what to serve, what to train, what to retire.

    target  = per shard, the last of the jobs of the records that remain
    tainted = held checkpoints that a removed record touched
    head    = target if held, else the deepest clean one held, else the base (None)
    train   = the path from the target's deepest held ancestor to the target
    retired = clean, but neither on the target's path nor heading

Rules: pure; the planner is not told what happened, it sees what remains and what is held, one shard
at a time. An empty slice is no stage. A shard keeps the fingerprint that it was trained under while
its target is held; a shard that must train again takes the present one, whole. A checkpoint was
touched by every record of its slices 0..s that was in the ledger at its sequence number, whatever
the schedule: a sequential stage starts from its parent's weights.

`schedule: cumulative` (Bourtoule et al. 2021, section V): stage r of R (from 1) makes
2 E / (R + 1) passes over slices 1..r, so that equal slices cost E epochs in total. `sequential`
makes E passes over slice r alone. Of appended slices (past R) stage r makes 2 E / (r + 1) passes over
slices 1..r: as many as if there had always been r, and it depends on nothing that comes after.

Not covered: prices (`cost.py`); several orders per shard.

>>> passes("cumulative", num_epochs=6, num_slices=3), passes("sequential", 6, 3)
((3, 1), (6, 1))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, Protocol

from sisa.domain import (
    ANY_SHARD,
    Export,
    Head,
    HeldCheckpoint,
    SliceJob,
    SliceState,
    record_epochs,
)

Schedule = Literal["cumulative", "sequential"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all jobs of a model share: the part of the config that reaches the bits."""

    num_slices: int
    schedule: Schedule
    num_epochs: int
    training: Mapping[str, Any]
    base: str

    def passes(self, slice_: int) -> tuple[int, int]:
        """Passes of a slice's stage, as an exact fraction."""
        return passes(self.schedule, self.num_epochs, self.num_slices, slice_)


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard as the ledger sees it: its non-empty slices and its clean held checkpoints."""

    shard: int
    slices: tuple[SliceState, ...]
    held: tuple[HeldCheckpoint, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What the reconciliation of one shard comes to: `train` starts from `parent` (None: the base)."""

    shard: int
    path: tuple[SliceJob, ...]
    head: Head
    train: tuple[SliceJob, ...]
    parent: HeldCheckpoint | None
    retired: tuple[str, ...]

    @property
    def record_epochs(self) -> int:
        return sum(record_epochs(job) for job in self.train)


def passes(schedule: Schedule, num_epochs: int, num_slices: int, slice_: int = 0) -> tuple[int, int]:
    """Passes of one stage over its slices, as an exact fraction.

    Of stages past `num_slices` (appended ones) stage r is taken for the last of r: 2 E / (r + 1).
    """
    if schedule == "sequential":
        return num_epochs, 1
    fraction = Fraction(2 * num_epochs, max(num_slices, slice_ + 1) + 1)
    return fraction.numerator, fraction.denominator


def jobs(
    shard: int, slices: Sequence[SliceState], recipe: Recipe, fingerprint: str
) -> tuple[SliceJob, ...]:
    """The stages of a shard, first to last; one for each slice that holds records."""
    path: list[SliceJob] = []
    seen: list[SliceState] = []
    for state in sorted(slices, key=lambda each: each.slice):
        seen.append(state)
        stage = [state] if recipe.schedule == "sequential" else seen
        path.append(
            SliceJob(
                shard=shard,
                slice=state.slice,
                parent=path[-1].key if path else None,
                slices=tuple((each.slice, each.root) for each in stage),
                num_records=sum(each.num_records for each in stage),
                passes=recipe.passes(state.slice),
                training=recipe.training,
                base=recipe.base,
                fingerprint=fingerprint,
            )
        )
    return tuple(path)


class Placed(Protocol):
    """Where a record is and in which commit it came; a row, or any one of many that are only counted."""

    @property
    def shard(self) -> int: ...
    @property
    def slice(self) -> int: ...
    @property
    def seq(self) -> int: ...


def tainted(held: Iterable[HeldCheckpoint], removed: Collection[Placed]) -> tuple[str, ...]:
    """Keys of the checkpoints that any of the removed records touched."""
    return tuple(
        checkpoint.key for checkpoint in held if any(touched(checkpoint, row) for row in removed)
    )


def touched(made: HeldCheckpoint | Export, row: Placed) -> bool:
    """Whether a held record is in the lineage of a checkpoint or an export.

    Of an export from before the records moved, only when it was made is known.
    """
    if made.shard != ANY_SHARD and (row.shard != made.shard or row.slice > made.slice):
        return False
    return row.seq <= made.seq


def marked(exports: Iterable[Export], removed: Mapping[str, Collection[Placed]]) -> list[Export]:
    """The clean exports that a removed record touched, each with the first request that removes one."""
    by: dict[tuple[str, str], str] = {}  # all shards that were exported together go together
    clean = [each for each in exports if each.state == "clean"]
    for export in clean:
        names = [name for name, rows in removed.items() if any(touched(export, row) for row in rows)]
        if names:
            by.setdefault((export.path, export.adapter_sha256), names[0])
    return [
        replace(each, state="tainted", request_id=by[each.path, each.adapter_sha256])
        for each in clean
        if (each.path, each.adapter_sha256) in by
    ]


def plan_shard(view: ShardView, recipe: Recipe, fingerprint: str) -> ShardPlan:
    """Reconcile one shard. `fingerprint` is the present environment's."""
    held = {checkpoint.key: checkpoint for checkpoint in view.held}
    path = _path_to_serve(view, recipe, fingerprint, held)
    target = path[-1].key if path else None
    head = _head(view, recipe, path, held)
    missing = 0
    for position, job in enumerate(path):
        if job.key in held:
            missing = position + 1  # everything up to the deepest held stage is there to build on
    parent = held[path[missing - 1].key] if 0 < missing < len(path) else None
    keep = {job.key for job in path} | {head.key, target}
    retired = tuple(key for key in held if key not in keep)
    return ShardPlan(view.shard, path, head, path[missing:], parent, retired)


def _path_to_serve(
    view: ShardView, recipe: Recipe, fingerprint: str, held: Mapping[str, HeldCheckpoint]
) -> tuple[SliceJob, ...]:
    others = sorted({each.fingerprint for each in view.held} - {fingerprint})
    paths = [jobs(view.shard, view.slices, recipe, each) for each in (fingerprint, *others)]
    for path in paths:
        if path and path[-1].key in held:
            return path
    return paths[0]


def _head(
    view: ShardView,
    recipe: Recipe,
    path: Sequence[SliceJob],
    held: Mapping[str, HeldCheckpoint],
) -> Head:
    if not path:
        return Head(view.shard, None, 0, None)
    target = path[-1].key
    if target in held:
        return Head(view.shard, target, max(recipe.num_slices, path[-1].slice + 1), target)
    on_path = {job.key for job in path}
    deepest = max(
        held.values(),
        key=lambda each: (each.slice, each.key in on_path, each.seq, each.key),
        default=None,
    )
    if deepest is None:
        return Head(view.shard, None, 0, target)
    return Head(view.shard, deepest.key, deepest.slice + 1, target)
