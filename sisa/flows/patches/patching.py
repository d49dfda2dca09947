"""Patches: wanted, made, reverted; approximate, always.

    want    put the texts into the vault -> commit the wish
    make    what is wanted, lowest first -> commit each: from then on it is served beneath every shard
            -> erase the texts that no patch needs: those of which nothing is known any more

A wish is in the ledger before anything is computed, so that the same command goes on with what was cut
short. There is one wish at a time. `approx/patches/` makes patches; `planning/patch_plan.py` decides
which there should be.

All shards can be trained over the patches that the ledger's meta names: exact with respect to the
patched base, since the job of every stage names it. Patches with records of the model in their retain
sets can't be trained over, since one deletion would retrain every shard; if such a record comes later
and is deleted, everything that was trained over the patch goes in one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sisa.core.domain import Record, RecordRow, Request, SavedCheckpoint
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.core.events import Notice
from sisa.core.patch import WRITTEN, Patch, PatchJob, VaultSet, patched_digest
from sisa.core.ports import Change, PatchOrder
from sisa.flows.patches import vault_sets
from sisa.flows.patches.vault_sets import Put
from sisa.flows.wiring.context import Context, areas, commit, known_by_area, purge, view_shard
from sisa.planning.patch_plan import (
    TRAINED_OVER,
    activated,
    active,
    next_job,
    next_version,
    rederive,
    unmade,
    wanted,
)
from sisa.planning.plan import plan_shard

Measure = Callable[[Sequence[Patch], Sequence[Patch]], Mapping[str, Any]]  # active before and after


@dataclass(frozen=True)
class Wish:
    """What a user wants of a patch. `settings` are those of a `PatchJob`; a `retain` of None is a set
    that the base writes; `consent` is to keep `forget` and `retain` until no patch needs them;
    `reference` names a model that never saw what is forgotten, to be measured beside the patch."""

    settings: Mapping[str, Any]
    forget: Sequence[Record] = field(default=(), repr=False)
    retain: Sequence[Record] | None = field(default=None, repr=False)
    consent: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Unlearnt:
    """The result of making patches.

    `patch` is the last one that was made, None when none was. With `unfinished`, the time is spent and
    the same command resumes the run. The numbers are those of sets of texts erased and kept, and of
    slices trained over the patch.
    """

    patch: Patch | None
    unfinished: bool
    report: Mapping[str, Any]
    erased_sets: int
    kept_sets: int
    slices_trained: int = 0


def want(context: Context, wish: Wish, requests: Sequence[Request] = ()) -> Patch:
    """Take a wish in, to forget its own texts and those of requests: everything is checked, the texts
    are in the vault, and the ledger knows it.

    A wish for a patch that is active, or wanted already, is that patch. Raises InvalidInput (sets,
    settings, consent), ConfigConflict (no text of a request, another wish).
    """
    from_requests = [vault_sets.set_of_request(context, each) for each in requests]
    if wish.forget or wish.retain is not None:
        vault_sets.check_consent(wish.consent)
    texts = [record for found in from_requests for record in context.stores.vault.read(found)]
    context.compute.patcher().check(wish.settings, [*texts, *wish.forget], wish.retain, wish.reference)
    _tell_held(context, wish.forget)
    fresh = vault_sets.put(context, "forget", wish.forget, wish.consent) if wish.forget else Put()
    kept = Put() if wish.retain is None else vault_sets.put(context, "retain", wish.retain, wish.consent)
    retain = kept.sets[0].name if kept.sets else WRITTEN
    like = PatchJob(
        context.settings.base, (), (), retain, dict(wish.settings), context.compute.fingerprint
    )
    patches, held = context.stores.ledger.patches(), vault_sets.held_sets(context)
    forget = [each.name for each in (*from_requests, *fresh.sets)]
    job = next_job(patches, held, context.settings.patch_mode, like, forget)
    asked = requests[-1].request_id if requests else ""
    found = Patch(next_version(patches), job, "wanted", context.now(), request_id=asked)
    for each in patches:
        if each.state in ("active", "wanted") and each.job == job:
            return each
    _check_no_other_wish(wanted(patches))
    put = fresh + kept
    commit(context, Change(patches=[found], vault=_new(context, put), vaulted=put.pairs))
    return found


def _new(context: Context, put: Put) -> list[VaultSet]:
    """Return sets as they were first put, where the same texts are held already."""
    known = {each.name: each for each in context.stores.ledger.vault() if each.held}
    return [known.get(each.name, each) for each in put.sets]


def _tell_held(context: Context, records: Sequence[Record]) -> None:
    if not records:
        return
    rows = [context.settings.assigner.row(each, 0) for each in records]
    by_id = context.stores.ledger.lookup([row.id_digest for row in rows])
    held, _ = context.stores.ledger.by_text({row.text_digest for row in rows})
    texts = {row.text_digest for row in held}
    count = sum(
        isinstance(by_id.get(row.id_digest), RecordRow) or row.text_digest in texts for row in rows
    )
    if count:
        context.report(
            Notice(
                f"{count} of these texts are records of the model: a patch does not delete them from "
                "the shards; `sisa forget` does, exactly"
            )
        )


def _check_no_other_wish(waiting: Sequence[Patch]) -> None:
    if waiting:
        raise ConfigConflict(
            "another patch is wanted and not made yet; nothing was changed",
            where=f"patch {waiting[0].version}",
            next_step="go on with it by `sisa approx unlearn`, or give it up by `sisa approx revert`",
        )


def make_wanted(
    context: Context,
    max_seconds: float | None = None,
    measure: Measure | None = None,
    reference: str = "",
) -> Unlearnt:
    """Make what is wanted, lowest first; one that nothing good came of is dropped with its report.

    Raises what reading the vault, the base and the machine raise; the wish stays.
    """
    ledger = context.stores.ledger
    last: Patch | None = None
    report: Mapping[str, Any] = {}
    patcher = context.compute.patcher()
    while waiting := wanted(ledger.patches()):
        patch = waiting[0]
        made = patcher.make(_order(context, patch, max_seconds, reference), context.report)
        report = made.report
        if made.unfinished:
            return Unlearnt(last, True, report, *_settled(context))
        if made.saved is None:
            dropped = replace(patch, report=dict(report))
            commit(context, Change(patches=unmade(ledger.patches(), dropped)))
            continue
        now = _active(patch, made.saved, context.now(), report)
        before = ledger.patches()
        changed = activated(before, now)
        if measure is not None:
            gone = {each.key for each in changed}
            after = [*(each for each in active(before) if each.key not in gone), now]
            effect = dict(measure(active(before), after))
            changed[0] = replace(now, report={**now.report, "composition": effect})
        commit(context, Change(patches=changed))
        last = changed[0]
    return Unlearnt(last, False, report if last is None else last.report, *_settled(context))


def _active(patch: Patch, saved: SavedCheckpoint, now: str, report: Mapping[str, Any]) -> Patch:
    return replace(
        patch,
        state="active",
        made_at=now,
        manifest_sha256=saved.manifest_sha256,
        adapter_sha256=saved.adapter_sha256,
        num_bytes=saved.num_bytes,
        report=dict(report),
    )


def _settled(context: Context) -> tuple[int, int]:
    """Erase texts that no patch needs and files of patches that the ledger does not know; return the
    numbers of sets erased and kept."""
    counts = vault_sets.erase_unneeded(context)
    _erase_unknown(context)
    purge(context)
    context.stores.ledger.scrub()
    return counts


def _erase_unknown(context: Context) -> None:
    """Erase texts, unfinished runs and patches that the ledger does not know."""
    known, held = known_by_area(context), areas(context)
    context.stores.keyring.destroy(
        "patches", sorted(context.stores.keyring.held("patches") - known["patches"])
    )
    for area in ("vault", "runs", "patches"):
        held[area].erase(sorted(held[area].held() - known[area]))


def _order(context: Context, patch: Patch, max_seconds: float | None, reference: str) -> PatchOrder:
    sets = {each.name: each for each in context.stores.ledger.vault()}
    stack = {each.key: each for each in active(context.stores.ledger.patches())}
    job = patch.job
    if absent := [key for key in job.beneath if key not in stack]:
        raise ConfigConflict(
            "a patch that this one was to lie upon is gone",
            where=f"patch {patch.version}",
            got=f"{len(absent)} of {len(job.beneath)} are missing",
            next_step="give it up by `sisa approx revert`, and ask for it again",
        )
    beneath = tuple(stack[key] for key in job.beneath)
    return PatchOrder(job, tuple(sets[name] for name in job.sets), beneath, max_seconds, reference)


def revert_patches(context: Context, *, everything: bool = False) -> list[Patch]:
    """Take back what is wanted and, if nothing is, the newest active patch; or all of them.

    Raises InvalidInput when there is none.
    """
    patches = context.stores.ledger.patches()
    waiting, stack = wanted(patches), active(patches)
    chosen = [*stack, *waiting] if everything else (waiting or stack[-1:])
    if not chosen:
        raise InvalidInput("there is no patch to revert", next_step="`sisa approx patches` lists them")
    gone = [replace(each, state="reverted" if each.state == "active" else "dropped") for each in chosen]
    commit(context, Change(patches=gone))
    _settled(context)
    return gone


def release_sets(context: Context, sets: Sequence[VaultSet]) -> list[VaultSet]:
    """Erase texts on withdrawn consent; a wish that needs them is given up, and those that were to lie
    upon it go on without it."""
    names = {each.name for each in sets}
    patches, held = context.stores.ledger.patches(), vault_sets.held_sets(context) - names
    needing = [each.key for each in wanted(patches) if not names.isdisjoint(each.job.sets)]
    found = rederive(patches, {}, held, context.compute.fingerprint, context.now(), "", needing)
    gone = [replace(each, held=False) for each in sets]
    commit(context, Change(vault=gone, patches=[*found.changed, *found.fresh]))
    _settled(context)
    return gone


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
