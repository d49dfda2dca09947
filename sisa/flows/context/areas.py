"""List what the storage areas hold and what the ledger lists there, and purge old versions."""

from __future__ import annotations

from sisa.core import ports
from sisa.core.errors import EnvironmentFault
from sisa.core.patches import active, wanted
from sisa.flows.context.context import Context, trained_over
from sisa.planning.hidden_state_files import states_names
from sisa.store.areas import CHECKPOINTS, HIDDEN_STATES, INDEX, LOG, PATCHES, RECORDS, RUNS, VAULT


def known_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names that the ledger lists, by storage area; for hidden states, the held ones."""
    ledger = context.stores.ledger
    patches = ledger.patches()
    return {
        RECORDS: frozenset(file.name for file in ledger.slices()),
        INDEX: frozenset(file.name for file in ledger.indexes()),
        CHECKPOINTS: frozenset(each.key for each in ledger.checkpoints()),
        PATCHES: frozenset(each.key for each in active(patches)).union(trained_over(ledger)),
        VAULT: frozenset(each.name for each in ledger.vault() if each.held),
        RUNS: frozenset(each.key for each in wanted(patches)),
        HIDDEN_STATES: _known_hidden_states(context),
    }


def _known_hidden_states(context: Context) -> frozenset[str]:
    """Return the held files of hidden states of the present slices."""
    if not context.settings.config.prefix_cache_bytes:
        return frozenset()
    try:
        held = context.stores.hidden_states.held()
    except EnvironmentFault:
        return frozenset()  # it is a cache; erasing there raises the error again
    slices = context.stores.ledger.slices()
    return held & states_names(slices, context.recipe, context.compute.fingerprint)


def stores_by_area(context: Context) -> dict[str, ports.StoredFiles]:
    """Return the storage areas whose files the ledger lists.

    Everything held there can be erased, leftover temporary files included; in the vault and among the
    patch drafts, keys as well.
    """
    stores = context.stores
    return {
        RECORDS: stores.records,
        INDEX: stores.index,
        CHECKPOINTS: stores.checkpoints,
        PATCHES: stores.patches,
        VAULT: stores.vault,
        RUNS: stores.patch_drafts,
        HIDDEN_STATES: stores.hidden_states,
    }


def unlisted(context: Context) -> dict[str, frozenset[str]]:
    """Return what each storage area holds and the ledger does not list."""
    known = known_by_area(context)
    return {area: store.held() - known[area] for area, store in stores_by_area(context).items()}


def purge(context: Context, *, dry_run: bool = False) -> tuple[ports.KeptVersions, ...]:
    """Remove old versions of replaced or erased objects; return those that a bucket keeps.

    The log stays: it is public, and its old checkpoints are evidence.
    """
    found = sorted(context.stores.blobs.keys() - {LOG})
    return tuple(kept for area in found for kept in context.stores.blobs[area].purge(dry_run=dry_run))
