"""Train shards over patches, and no longer over them.

The ledger's meta names the patches that all shards are trained over. Training over them is exact with
respect to the patched base: the job of every stage names it. Patches with records of the model in their
retain sets can't be trained over, since one deletion would retrain every shard; if such a record comes
later and is deleted, everything that was trained over the patch goes in one commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from sisa.core.errors import ConfigConflict
from sisa.core.patch import Patch, patched_digest
from sisa.core.ports import Change
from sisa.flows.patches import vault_sets
from sisa.flows.wiring.context import Context, commit, view_shard
from sisa.planning.patch_plan import TRAINED_OVER
from sisa.planning.plan import plan_shard


def shards_over(context: Context, stack: Sequence[Patch]) -> None:
    """Commit new targets: every shard over some patches. Heads serve what they did until it is trained.

    Raises ConfigConflict when records of the model are in the retain set of a patch.
    """
    risky = {each.job.retain for each in stack} & vault_sets.deletable(context)
    if risky:
        raise ConfigConflict(
            "records of the model are in a retain set: deleting one would retrain every shard",
            expected="patches whose retain sets hold no record of the model",
            got=f"{len(risky)} retain sets that do",
            next_step="leave the shards as they are, or make the patch with a written retain set",
        )
    base = patched_digest(context.settings.base, [each.adapter_sha256 for each in stack])
    recipe = replace(context.settings.recipe, base=base)
    heads = [
        plan_shard(view_shard(context, head.shard), recipe, context.compute.fingerprint).head
        for head in context.stores.ledger.heads()
    ]
    commit(context, Change(heads=heads, meta={TRAINED_OVER: json.dumps([each.key for each in stack])}))


def shards_off(context: Context) -> None:
    """Drop everything that was trained over patches at once; the shards start from the plain base."""
    bare = [replace(view_shard(context, head.shard), held=()) for head in context.stores.ledger.heads()]
    heads = [
        plan_shard(view, context.settings.recipe, context.compute.fingerprint).head for view in bare
    ]
    dropped = [each.key for each in context.stores.ledger.checkpoints()]
    commit(context, Change(heads=heads, dropped=dropped, meta={TRAINED_OVER: "[]"}))
