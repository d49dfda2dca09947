"""What a deletion does to patches: a record in a retain set has touched the patch, and goes.

    its commit drops the patch, and those upon it, and wants them again without the record
    when the deletion is done, they are made again

Rules: a deletion never fails for a patch's sake: one that can't be made again stays dropped, and that
is said. Until it is made again the base is served without it. Where shards were trained over a dropped
patch, everything trained over it goes in a commit before the deletion's own.

Not covered: which patches are touched, and how they are wanted again (`patch_plan.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from sisa.core.domain import Export, RecordRow
from sisa.core.errors import SisaError
from sisa.core.events import Notice
from sisa.core.ports import Change
from sisa.flows.patches import vault_sets
from sisa.flows.patches.patched_shards import shards_off
from sisa.flows.patches.patching import make_wanted
from sisa.flows.patches.vault_sets import Put
from sisa.flows.wiring.world import World, commit, trained_over
from sisa.planning.patch_plan import Rederived, lineage, rederive, wanted


@dataclass(frozen=True)
class Touched:
    """A deletion's part in patches, for its commit."""

    rederived: Rederived = field(default_factory=Rederived)
    put: Put = field(default_factory=Put)
    exports: tuple[Export, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rederived.changed)


def touched_by(world: World, removed: Mapping[str, RecordRow], request_id: str) -> tuple[World, Touched]:
    """What removing rows (by keyed id) does to patches, and the world to go on with. New retain sets are
    written; where shards were trained over a touched patch, all of that is given up now."""
    patches = world.ledger.patches()
    instead, put = vault_sets.without_removed(world, removed)
    touched = {each.key for each in lineage(patches, instead)}
    if not touched:
        return world, Touched()
    held = vault_sets.held_sets(world) - {old for old, new in instead.items() if old == new}
    held |= {each.name for each in put.sets}
    found = rederive(patches, instead, held, world.fingerprint, world.now(), request_id)
    if not touched.isdisjoint(trained_over(world.ledger)):
        world = shards_off(world)
    stale = tuple(
        replace(each, state="tainted", request_id=request_id)
        for each in world.ledger.exports()
        if not each.stale and not touched.isdisjoint(each.patches)
    )
    return world, Touched(found, put.only({each.job.retain for each in found.fresh}), stale)


def give_up(world: World, damaged: Collection[str]) -> World:
    """Go on without patches and sets of texts (by key or name) whose files are damaged: a set counts as
    erased, and a patch is wanted again where its texts are held. Returns the world to go on with."""
    sets = [each for each in world.ledger.vault() if each.name in damaged and each.held]
    lost = {each.name for each in sets}
    held = vault_sets.held_sets(world) - lost
    patches = world.ledger.patches()
    unmade = {each.key for each in wanted(patches) if not lost.isdisjoint(each.job.sets)}
    found = rederive(patches, {}, held, world.fingerprint, world.now(), "", unmade.union(damaged))
    if found.dropped & set(trained_over(world.ledger)):
        world = shards_off(world)
    gone = [replace(each, held=False) for each in sets]
    commit(world, Change(patches=[*found.changed, *found.fresh], vault=gone))
    vault_sets.erase_unneeded(world)
    return world


def make_again(world: World, touched: Touched) -> None:
    """Make the patches that a deletion dropped again; a failure is told, and leaves them wanted."""
    if not touched:
        return
    lost = len(touched.rederived.changed) - len(touched.rederived.fresh)
    if lost:
        world.report(Notice(f"{lost} patches are dropped for good: the texts that they forgot are gone"))
    if touched.rederived.fresh:
        world.report(Notice("making the patches again without the deleted records"))
        try:
            make_wanted(world)
        except SisaError as error:
            world.report(
                Notice(
                    f"the patches could not be made again ({type(error).__name__}): `sisa approx "
                    "unlearn` goes on with them; until then the base is served without them"
                )
            )
    else:
        vault_sets.erase_unneeded(world)
