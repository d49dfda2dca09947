"""Keep patches in step with deletions, as a hook.

    copies    name the retain sets that hold a removed record, and the patches made with them
    commit    put the texts that a request removes into the vault, if somebody consented; drop a patch
              whose retain set held a removed record, with the patches above it, and want it again
              without that record
    reconcile erase texts that no patch needs
    finish    make the dropped patches again

A deletion never fails because a patch can't be made again: the patch stays dropped, and a notice reports
it. Until it is made again, the base is served without it. If shards were trained over a dropped patch,
everything trained over it is dropped in a separate commit before the deletion's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sisa.core.domain import RecordRow
from sisa.core.errors import SisaError
from sisa.core.events import Notice
from sisa.core.hooks import Contribution, Copies, Removal
from sisa.core.patches import Patch, wanted, without_shards
from sisa.core.ports import Change
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context, trained_over
from sisa.flows.patches import vault_sets
from sisa.flows.patches.patching import make_wanted, shards_off
from sisa.planning.patch_plan import Rederived, patches_from, rederive
from sisa.store.areas import PATCHES, VAULT


class PatchesHook:
    """Keep patches, and the vault of their texts, in step with deletions."""

    def copies(self, context: Context, rows: Sequence[RecordRow]) -> Sequence[Copies]:
        """Return the retain sets that hold records, and the patches that were made with them."""
        ledger, stores = context.stores.ledger, context.stores
        with_rows = ledger.sets_with([row.id_digest for row in rows])
        named = {name for names in with_rows.values() for name in names}
        sets = {each.name for each in ledger.vault() if each.role == "retain" and each.name in named}
        if not sets:  # as in most models
            return ()
        patches = {each.key for each in patches_from(ledger.patches(), sets)}
        return (
            Copies("retain set", VAULT, sets & stores.vault.held()),
            Copies("patch", PATCHES, patches & stores.patches.held()),
        )

    def contribute(self, context: Context, removal: Removal) -> Contribution:
        """Return the changed patches and the sets to keep; drop shards trained over a changed patch.

        Write new retain sets, and the removed texts of requests with consent, to the vault.
        """
        ledger, rows = context.stores.ledger, removal.rows
        consented = any(each.consent for each in removal.requests)
        if not (consented or ledger.patches() or ledger.vault()):  # as in most models
            return Contribution()
        request_id = removal.requests[0].request_id if removal.requests else ""
        instead, written = vault_sets.without_removed(context, rows)
        touched = {each.key for each in patches_from(ledger.patches(), instead)}
        held = vault_sets.held_sets(context) - {old for old, new in instead.items() if old == new}
        held |= {each.name for each in written.sets}
        numerics, now = context.compute.fingerprint, context.now()
        found = rederive(ledger.patches(), instead, held, numerics, now, request_id)
        kept = written.only({each.job.retain for each in found.fresh})
        kept += vault_sets.put_removed(context, removal)
        if not touched.isdisjoint(trained_over(ledger)):
            shards_off(context)
        stale = [
            replace(each, state="tainted", request_id=request_id)
            for each in ledger.exports()
            if not each.stale and not touched.isdisjoint(each.patches)
        ]
        change = Change(
            exports=stale,
            patches=_changed(context, found, {row.shard for row in rows.values()}),
            vault=kept.sets,
            vaulted=kept.pairs,
        )
        return Contribution(change, kept.by_request(), partial(_make_again, context, found))

    def reconcile(self, context: Context) -> None:
        """Erase the texts that no patch needs."""
        if context.stores.ledger.patches() or context.stores.ledger.vault():
            vault_sets.erase_unneeded(context)

    def complete(self, context: Context) -> None:
        """Do nothing: patches follow in `finish`."""

    def export(self, context: Context, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the files as they are: the patches are in the adapter already."""
        del context, name
        return files


def _changed(context: Context, found: Rederived, shards: Collection[int]) -> list[Patch]:
    """Return the patches that a deletion changes: dropped, wanted again, or with a shorter report."""
    known = {each.key: each for each in context.stores.ledger.patches()}
    rederived = {each.key: each for each in (*found.changed, *found.fresh)}
    after = {key: without_shards(each, shards) for key, each in {**known, **rederived}.items()}
    return [each for key, each in after.items() if each != known.get(key)]


def _make_again(context: Context, found: Rederived) -> None:
    """Make the dropped patches again; report a failure, which leaves them wanted."""
    if not found.changed:
        return
    if lost := len(found.changed) - len(found.fresh):
        what = "dropped for good: the texts that they forgot are erased"
        context.report(Notice(f"{lost} patches are {what}"))
    if not found.fresh:
        vault_sets.erase_unneeded(context)
        return
    context.report(Notice("making the patches again without the deleted records"))
    try:
        make_wanted(context)
    except SisaError as error:
        what = f"the patches could not be made again ({type(error).__name__})"
        then = "`sisa approx unlearn` tries again; until then the base is served without them"
        context.report(Notice(f"{what}: {then}"))


def give_up(context: Context, damaged: Collection[str]) -> None:
    """Give up patches and sets of texts (by key or name) whose files are damaged.

    A damaged set counts as erased; a patch is wanted again if its texts are held.
    """
    ledger = context.stores.ledger
    sets = [each for each in ledger.vault() if each.name in damaged and each.held]
    lost = {each.name for each in sets}
    held, patches = vault_sets.held_sets(context) - lost, ledger.patches()
    unmade = {each.key for each in wanted(patches) if not lost.isdisjoint(each.job.sets)}
    numerics, now = context.compute.fingerprint, context.now()
    found = rederive(patches, {}, held, numerics, now, "", unmade.union(damaged))
    if found.dropped & set(trained_over(ledger)):
        shards_off(context)
    gone = [replace(each, held=False) for each in sets]
    commit(context, Change(patches=[*found.changed, *found.fresh], vault=gone))
    vault_sets.erase_unneeded(context)
