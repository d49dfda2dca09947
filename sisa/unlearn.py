"""Make the frozen base say less of what it knew: always approximate, never called exact.

    from sisa.unlearn import unlearn, revert
    done = unlearn(model, Wish(settings, forget=records, consent="the person asked for it"))
    done.patch.report["metrics_after"]

A patch is served as soon as it is made; the shards' own answers are measured with and without it. Shards
are trained over it only if the caller asks for that, at once or once they have drifted too far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sisa.core.errors import InvalidInput
from sisa.core.patches import Patch, VaultSet, active, wanted
from sisa.flows.context.context import Context, patch_files, patches_beneath, trained_over
from sisa.flows.patches import patching, vault_sets
from sisa.flows.patches.composition import Composition, measure
from sisa.flows.patches.patching import Unlearnt, Wish, shards_over
from sisa.flows.requests import find_request
from sisa.flows.wiring.model_directory import retry_read
from sisa.model import Model


def unlearn(
    model: Model,
    wish: Wish | None,
    *,
    request_ids: Sequence[str] = (),
    max_seconds: float | None = None,
    max_drift: float | None = None,
) -> Unlearnt:
    """Make a patch; without a wish, continue the wanted one. Raise InvalidInput if none is wanted.

    With `max_drift`, retrain all shards over the patches once their `drift` reaches it; 0 retrains them
    without measuring it. Raise ConfigConflict if that could never be, and the errors of `patching.want`
    and `make_wanted`.
    """
    with model.writing() as context:
        model.resources.refuse_changed_base()
        if wish is not None:
            if max_drift is not None:
                patching.check_retain_is_foreign(context, wish)
            patch = patching.want(context, wish, [find_request(context, each) for each in request_ids])
            if patch.state == "active":
                return Unlearnt(patch, False, patch.report, 0, 0)
        elif not wanted(context.stores.ledger.patches()):
            raise InvalidInput(
                "no patch is wanted", next_step="say what to forget, by --forget or --request"
            )

        trained_on = patches_beneath(context.stores.ledger, context.settings.base)
        effect = _Effect(context)
        done = patching.make_wanted(context, max_seconds, effect, "" if wish is None else wish.reference)
    if done.unfinished or max_drift is None:
        return done
    found = None
    if max_drift > 0:
        # If the shards were trained over all patches but the last one, its effect is the drift.
        last = effect.last if effect.before == trained_on else None
        found = drift(model) if last is None else last.drift
        if found is not None and found < max_drift:
            return replace(done, drift=found)
    return replace(done, drift=found, slices_trained=retrain(model))


@dataclass
class _Effect:
    """Measure the effect of each patch that is made; keep the last one and the patches before it."""

    context: Context
    before: Sequence[Patch] = ()
    last: Composition | None = None

    def __call__(self, before: Sequence[Patch], after: Sequence[Patch]) -> Mapping[str, Any]:
        found = measure(self.context, before, after)
        self.before, self.last = before, found
        return found.to_json()


@retry_read
def drift(model: Model) -> float | None:
    """Return how far the patches served now have moved the shards from those they were trained over."""
    with model.context() as context:
        ledger = context.stores.ledger
        before, after = patches_beneath(ledger, context.settings.base), active(ledger.patches())
        if before == after:
            return 0.0
        return measure(context, before, after).drift


def retrain(model: Model) -> int:
    """Train all shards over the patches served now, exactly; return the number of slices trained."""
    with model.writing() as context:
        stack = active(context.stores.ledger.patches())
        if trained_over(context.stores.ledger) != tuple(each.key for each in stack):
            shards_over(context, stack)
    return model.resume().slices_trained


def revert(model: Model, *, everything: bool = False, retrain_shards: bool = False) -> list[Patch]:
    """Withdraw the wanted patch, else the newest one, or all. Raise InvalidInput if there is none."""
    with model.writing() as context:
        gone = patching.revert_patches(context, everything=everything)
    if retrain_shards:
        retrain(model)
    return gone


def release(
    model: Model, *, sets: Sequence[str] = (), request_ids: Sequence[str] = (), everything: bool = False
) -> list[VaultSet]:
    """Erase texts from the vault when consent is withdrawn. Raise UnknownRecord for unknown names."""
    with model.writing() as context:
        held = [each for each in context.stores.ledger.vault() if each.held]
        named = held if everything else vault_sets.chosen(context, sets, request_ids)
        if not named:
            raise InvalidInput("no text is in the vault", next_step="`sisa approx patches` lists sets")
        return patching.release_sets(context, named)


@retry_read
def patches(model: Model) -> tuple[list[Patch], list[VaultSet], tuple[str, ...]]:
    """Return all patches ever wanted, the vault's sets, and the patches beneath trained shards."""
    with model.context() as context:
        ledger = context.stores.ledger
        return ledger.patches(), ledger.vault(), trained_over(ledger)


@retry_read
def served(model: Model) -> list[dict[str, bytes]]:
    """Return the files of the patches served now, lowest first. Raise IntegrityError."""
    with model.context() as context:
        return patch_files(context.stores.patches, active(context.stores.ledger.patches()))
