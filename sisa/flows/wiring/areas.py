"""List what the storage areas hold and what the ledger lists there, and purge old versions."""

from __future__ import annotations

from sisa.core import ports
from sisa.core.domain import active, wanted
from sisa.core.errors import EnvironmentFault
from sisa.flows.wiring.context import Context, trained_over
from sisa.planning.plan import states_names

ALWAYS_SEALED = ("vault", "runs")  # areas that are sealed in a plain model, too


def known_by_area(context: Context) -> dict[str, frozenset[str]]:
    """Return the names that the ledger lists, by storage area; for hidden states, the held ones."""
    ledger = context.stores.ledger
    patches = ledger.patches()
    return {
        "records": frozenset(file.name for file in ledger.slices()),
        "index": frozenset(file.name for file in ledger.indexes()),
        "checkpoints": frozenset(each.key for each in ledger.checkpoints()),
        "patches": frozenset(each.key for each in active(patches)).union(trained_over(ledger)),
        "vault": frozenset(each.name for each in ledger.vault() if each.held),
        "runs": frozenset(each.key for each in wanted(patches)),
        "prefixes": _known_hidden_states(context),
    }


def _known_hidden_states(context: Context) -> frozenset[str]:
    """Return the held files of hidden states of the present slices."""
    if not context.settings.keeps_hidden_states:
        return frozenset()
    try:
        held = context.stores.hidden_states.held()
    except EnvironmentFault:
        return frozenset()  # it is a cache; erasing there raises the error again
    slices = context.stores.ledger.slices()
    return held & states_names(slices, context.recipe, context.compute.fingerprint)


def areas(context: Context) -> dict[str, ports.StoredFiles]:
    """Return the storage areas whose files the ledger lists.

    Everything held there can be erased, leftover temporary files included; in the vault and the drafts,
    keys as well.
    """
    stores = context.stores
    return {
        "records": stores.records,
        "index": stores.index,
        "checkpoints": stores.checkpoints,
        "patches": stores.patches,
        "vault": stores.vault,
        "runs": stores.drafts,
        "prefixes": stores.hidden_states,
    }


def purge(context: Context, *, dry_run: bool = False) -> tuple[ports.KeptVersions, ...]:
    """Remove old versions of replaced or erased objects; return those that a bucket keeps.

    The log stays: it is public, and its old checkpoints are evidence.
    """
    found = sorted(context.stores.blobs.keys() - {"log"})
    return tuple(kept for area in found for kept in context.stores.blobs[area].purge(dry_run=dry_run))
