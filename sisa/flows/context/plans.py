"""Plan the shards of an open model as its ledger describes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from sisa.core.domain import HeldCheckpoint, SliceState
from sisa.flows.context.context import Context
from sisa.planning.plan import ShardPlan, ShardView, plan_shard

FEW_SHARDS = 16  # up to so many are read one by one


def view_shard(
    context: Context, shard: int, replaced: Iterable[SliceState] = (), dropped: Collection[str] = ()
) -> ShardView:
    """Return a shard's slices, some `replaced`, and its checkpoints except the `dropped` ones."""
    slices: dict[int, SliceState] = {file.slice: file for file in context.stores.ledger.slices(shard)}
    slices.update({state.slice: state for state in replaced})
    held = [each for each in context.stores.ledger.checkpoints(shard) if each.key not in dropped]
    return ShardView(shard, tuple(state for _, state in sorted(slices.items())), tuple(held))


def view_shards(context: Context, shards: Sequence[int]) -> list[ShardView]:
    """Return the views of several shards; for many shards, read the whole ledger at once."""
    if len(shards) <= FEW_SHARDS:
        return [view_shard(context, shard) for shard in shards]
    slices: defaultdict[int, list[SliceState]] = defaultdict(list)
    held: defaultdict[int, list[HeldCheckpoint]] = defaultdict(list)
    for file in context.stores.ledger.slices():
        slices[file.shard].append(file)
    for each in context.stores.ledger.checkpoints():
        held[each.shard].append(each)
    return [ShardView(shard, tuple(slices[shard]), tuple(held[shard])) for shard in shards]


def plan_of(context: Context, view: ShardView) -> ShardPlan:
    """Plan a shard under the model's present recipe and fingerprint."""
    return plans_of(context, [view])[0]


def plans_of(context: Context, views: Iterable[ShardView]) -> list[ShardPlan]:
    """Plan shards under the model's present recipe and fingerprint."""
    recipe = context.recipe
    return [plan_shard(view, recipe, context.compute.fingerprint) for view in views]


def retired(context: Context) -> list[str]:
    """Return the checkpoints that no target needs, of converged shards: others may still serve them."""
    converged = [head.shard for head in context.stores.ledger.heads() if head.converged]
    plans = plans_of(context, view_shards(context, converged))
    return [key for plan in plans for key in plan.retired]


def check_sources(context: Context, plans: Sequence[ShardPlan]) -> None:
    """Raise IntegrityError if a file that is needed is damaged, before anything is written.

    With several orders, the checkpoint that becomes the head is checked as well, since no stage of order
    0 may start from it.
    """
    ledger, has_orders = context.stores.ledger, bool(context.recipe.other_orders)
    for plan in plans:
        seen = {slice_ for job in plan.all_missing for slice_, _ in job.slices}
        for file in ledger.slices(plan.shard):
            if file.slice in seen:
                context.stores.records.check(file)
        for index in ledger.indexes(plan.shard) if plan.path else ():
            context.stores.index.check(index)
        needed = {each.parent.key for each in plan.missing if each.parent is not None}
        if has_orders and plan.head.key is not None:
            needed.add(plan.head.key)
        for each in ledger.checkpoints(plan.shard) if needed else ():
            if each.key in needed:
                context.stores.checkpoints.load(each.key, each.manifest_sha256)
