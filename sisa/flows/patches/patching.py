"""Request, make and revert patches; they are always approximate.

    want    put the texts into the vault -> commit the wish
    make    make what is wanted, lowest first -> commit each; from then on it is served beneath every
            shard -> erase the texts that no patch needs: those that the base no longer knows

The ledger holds a wish before anything is computed, so the same command continues an interrupted one.
There is one wish at a time. `approx/patches/` makes patches; `planning/patch_plan.py` decides which
patches there should be.

All shards can be trained over the patches that the ledger's meta names, exactly with respect to the
patched base. If a record in the retain set of such a patch is deleted, everything trained over the patch
is dropped in one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sisa.core.domain import Record, RecordRow
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.core.events import Notice
from sisa.core.ledger_meta import TRAINED_OVER
from sisa.core.patches import WRITTEN, Patch, PatchJob, VaultSet, active, wanted
from sisa.core.ports import Change, PatchOrder
from sisa.core.requests import Request
from sisa.flows.context.areas import known_by_area, purge, stores_by_area
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context
from sisa.flows.context.plans import view_shards
from sisa.flows.patches import vault_sets
from sisa.flows.patches.vault_sets import WrittenSets
from sisa.planning.patch_plan import activated, next_job, next_version, rederive, unmade
from sisa.planning.plan import plan_shard
from sisa.store.areas import PATCHES, RUNS, VAULT

Measure = Callable[[Sequence[Patch], Sequence[Patch]], Mapping[str, Any]]  # active before and after


@dataclass(frozen=True)
class Wish:
    """Describe the patch that a user wants.

    `settings` are those of a `PatchJob`. With `retain` None, the base writes the retain set. `consent`
    allows keeping `forget` and `retain` until no patch needs them. `reference` names a model that never
    saw the forgotten texts, measured for comparison.
    """

    settings: Mapping[str, Any]
    forget: Sequence[Record] = field(default=(), repr=False)
    retain: Sequence[Record] | None = field(default=None, repr=False)
    consent: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Unlearnt:
    """Hold the result of making patches.

    `patch` is the last one made, or None. With `unfinished`, time ran out and the same command continues
    the run. The numbers count the sets of texts erased and kept, and the slices trained over the patch;
    `drift` is that of the shards before, where it was asked for.
    """

    patch: Patch | None
    unfinished: bool
    report: Mapping[str, Any]
    erased_sets: int
    kept_sets: int
    slices_trained: int = 0
    drift: float | None = None


def want(context: Context, wish: Wish, requests: Sequence[Request] = ()) -> Patch:
    """Record a wish to forget its own texts and those of requests.

    A wish for a patch that is already active or wanted returns that patch. Raise InvalidInput (sets,
    settings, consent) or ConfigConflict (a request without text, another wish).
    """
    from_requests = [vault_sets.set_of_request(context, each) for each in requests]
    if (wish.forget or wish.retain is not None) and not wish.consent.strip():
        raise InvalidInput(
            "texts are kept, encrypted, until a patch is made from them: that needs a recorded consent",
            expected="who allowed it, or on what ground",
            next_step="give --consent",
        )
    texts = [record for found in from_requests for record in context.stores.vault.read(found)]
    context.compute.patcher().check(wish.settings, [*texts, *wish.forget], wish.retain, wish.reference)
    _notice_held(context, wish.forget)
    patches, job = context.stores.ledger.patches(), _job_of(context, wish, from_requests)
    for each in patches:
        if each.state in ("active", "wanted") and each.job == job:
            return each
    if waiting := wanted(patches):
        raise ConfigConflict(
            "another patch is wanted and not made yet; nothing was changed",
            where=f"patch {waiting[0].version}",
            next_step="continue it by `sisa approx unlearn`, or give it up by `sisa approx revert`",
        )
    written = WrittenSets()
    if wish.forget:
        written += vault_sets.put(context, "forget", wish.forget, wish.consent)
    if wish.retain is not None:
        written += vault_sets.put(context, "retain", wish.retain, wish.consent)
    known = {each.name: each for each in context.stores.ledger.vault() if each.held}
    sets = [known.get(each.name, each) for each in written.sets]  # a held set stays as first written
    asked = requests[-1].request_id if requests else ""
    found = Patch(next_version(patches), job, "wanted", context.now(), request_id=asked)
    commit(context, Change(patches=[found], vault=sets, vaulted=written.pairs))
    return found


def _job_of(context: Context, wish: Wish, from_requests: Sequence[VaultSet]) -> PatchJob:
    """Return the job of a wish, whose sets need not be in the vault yet."""
    ledger, name = context.stores.ledger, context.settings.assigner.set_name
    retain = WRITTEN if wish.retain is None else name("retain", wish.retain)
    forget = [each.name for each in from_requests]
    forget += [name("forget", wish.forget)] if wish.forget else []
    settings, numerics = dict(wish.settings), context.compute.fingerprint
    like = PatchJob(context.settings.base, (), (), retain, settings, numerics)
    held = vault_sets.held_sets(context)
    return next_job(ledger.patches(), held, context.settings.config.patch_mode, like, forget)


def _notice_held(context: Context, records: Sequence[Record]) -> None:
    if count := _num_held(context, records):
        what = f"{count} of these texts are records of the model"
        does = "a patch does not delete them from the shards; `sisa forget` does, exactly"
        context.report(Notice(f"{what}: {does}"))


def _num_held(context: Context, records: Sequence[Record]) -> int:
    """Return how many of some texts are records of the model, by id or by text."""
    ledger, assigner = context.stores.ledger, context.settings.assigner
    named = [(assigner.id_digest(each.id), assigner.text_digest(each)) for each in records]
    by_id = ledger.lookup([id_digest for id_digest, _ in named])
    held, _ = ledger.by_text({text_digest for _, text_digest in named})
    texts = {row.text_digest for row in held}
    ids = {key for key, each in by_id.items() if isinstance(each, RecordRow)}
    return sum(id_digest in ids or text_digest in texts for id_digest, text_digest in named)


def check_retain_is_foreign(context: Context, wish: Wish) -> None:
    """Raise ConfigConflict if shards could not be trained over the patch: its retain set is theirs."""
    if wish.retain and (count := _num_held(context, wish.retain)):
        raise _retained_records(f"{count} of {len(wish.retain)} texts to keep are records")


def _retained_records(got: str) -> ConfigConflict:
    return ConfigConflict(
        "records of the model are in a retain set: deleting one would retrain every shard",
        expected="patches whose retain sets hold no record of the model",
        got=got,
        next_step="leave the shards as they are, or make the patch with a written retain set",
    )


def make_wanted(
    context: Context,
    max_seconds: float | None = None,
    measure: Measure | None = None,
    reference: str = "",
) -> Unlearnt:
    """Make the wanted patches, lowest first; drop one that is not made, with its report.

    Raise the errors of reading the vault, of the base and of the machine; the wish stays.
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
            return Unlearnt(last, True, report, *_clean_up(context))
        if made.saved is None:
            dropped = replace(patch, report=dict(report))
            commit(context, Change(patches=unmade(ledger.patches(), dropped)))
            continue
        now = replace(
            patch,
            state="active",
            made_at=context.now(),
            manifest_sha256=made.saved.manifest_sha256,
            adapter_sha256=made.saved.adapter_sha256,
            num_bytes=made.saved.num_bytes,
            report=dict(report),
        )
        before = ledger.patches()
        changed = activated(before, now)
        if measure is not None:
            gone = {each.key for each in changed}
            after = [*(each for each in active(before) if each.key not in gone), now]
            effect = dict(measure(active(before), after))
            changed[0] = replace(now, report={**now.report, "composition": effect})
        commit(context, Change(patches=changed))
        last = changed[0]
    return Unlearnt(last, False, report if last is None else last.report, *_clean_up(context))


def _clean_up(context: Context) -> tuple[int, int]:
    """Erase texts that no patch needs and unlisted files of patches; let hooks complete what follows.

    Return the numbers of sets erased and kept.
    """
    counts = vault_sets.erase_unneeded(context)
    known, held, keyring = known_by_area(context), stores_by_area(context), context.stores.keyring
    keyring.destroy(PATCHES, sorted(keyring.held(PATCHES) - known[PATCHES]))
    for area in (VAULT, RUNS, PATCHES):
        held[area].erase(sorted(held[area].held() - known[area]))
    purge(context)
    context.stores.ledger.scrub()
    for hook in context.hooks:
        hook.complete(context)
    return counts


def _order(context: Context, patch: Patch, max_seconds: float | None, reference: str) -> PatchOrder:
    sets = {each.name: each for each in context.stores.ledger.vault()}
    stack = {each.key: each for each in active(context.stores.ledger.patches())}
    job = patch.job
    if absent := [key for key in job.beneath if key not in stack]:
        raise ConfigConflict(
            "a patch beneath this one is gone",
            where=f"patch {patch.version}",
            got=f"{len(absent)} of {len(job.beneath)} are missing",
            next_step="give it up by `sisa approx revert`, then want it again",
        )
    beneath = tuple(stack[key] for key in job.beneath)
    return PatchOrder(job, tuple(sets[name] for name in job.sets), beneath, max_seconds, reference)


def revert_patches(context: Context, *, everything: bool = False) -> list[Patch]:
    """Withdraw the wanted patch, else the newest active one, or all. Raise InvalidInput without any."""
    patches = context.stores.ledger.patches()
    waiting, stack = wanted(patches), active(patches)
    chosen = [*stack, *waiting] if everything else (waiting or stack[-1:])
    if not chosen:
        raise InvalidInput("there is no patch to revert", next_step="`sisa approx patches` lists them")
    gone = [replace(each, state="reverted" if each.state == "active" else "dropped") for each in chosen]
    commit(context, Change(patches=gone))
    _clean_up(context)
    return gone


def release_sets(context: Context, sets: Sequence[VaultSet]) -> list[VaultSet]:
    """Erase texts when consent is withdrawn; give up wishes that need them, and go on without those."""
    names = {each.name for each in sets}
    patches, held = context.stores.ledger.patches(), vault_sets.held_sets(context) - names
    needing = [each.key for each in wanted(patches) if not names.isdisjoint(each.job.sets)]
    found = rederive(patches, {}, held, context.compute.fingerprint, context.now(), "", needing)
    gone = [replace(each, held=False) for each in sets]
    commit(context, Change(vault=gone, patches=[*found.changed, *found.fresh]))
    _clean_up(context)
    return gone


def shards_over(context: Context, stack: Sequence[Patch]) -> None:
    """Commit new targets: every shard over these patches. Heads serve as before until it is trained.

    Raise ConfigConflict if records of the model are in the retain set of a patch.
    """
    risky = {each.job.retain for each in stack} & vault_sets.deletable(context)
    if risky:
        raise _retained_records(f"{len(risky)} retain sets that do")
    recipe = context.recipe_over(stack)
    views = view_shards(context, [head.shard for head in context.stores.ledger.heads()])
    heads = [plan_shard(view, recipe, context.compute.fingerprint).head for view in views]
    commit(context, Change(heads=heads, meta={TRAINED_OVER: json.dumps([each.key for each in stack])}))


def shards_off(context: Context) -> None:
    """Drop everything trained over patches at once; the shards start from the plain base."""
    recipe, fingerprint = context.recipe_over(()), context.compute.fingerprint
    views = view_shards(context, [head.shard for head in context.stores.ledger.heads()])
    heads = [plan_shard(replace(view, held=()), recipe, fingerprint).head for view in views]
    dropped = [each.key for each in context.stores.ledger.checkpoints()]
    commit(context, Change(heads=heads, dropped=dropped, meta={TRAINED_OVER: "[]"}))
