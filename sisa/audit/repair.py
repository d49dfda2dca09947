"""Repair what can be derived again, under the writer lock, and end in the usual reconciliation.

    modes      made readable by the owner alone
    forms      files rewritten, encrypted or plain, as the model is
    index      built from the slice files, which are checked first
    damaged    checkpoints leave the ledger and heads move to clean ones, in one commit; bytes go later
    patches    damaged ones are given up, and wanted again if their texts are held
    gaps       missing stages before a whole target are trained again, so that the chain is whole
    the rest   `reconcile` erases unknown files, trains targets, advances heads, scrubs the ledger

A repair is idempotent and can be interrupted anywhere. While anything is missing that can't be derived
(a slice file, the ledger, the key), only modes are repaired and nothing is erased: an unknown file may
be the missing piece. A head moves only to a checkpoint whose bytes were just checked. A stage that is
trained again under the same fingerprint has the same key and the same bytes. Backups are not restored
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sisa.audit.doctor import Diagnosis, diagnose, diagnosis, surroundings
from sisa.audit.findings import Finding, examine
from sisa.audit.garbage import remove_garbage
from sisa.core.domain import Chain, Head, HeldCheckpoint, SliceJob
from sisa.core.ports import Change
from sisa.flows.patches.on_deletion import give_up
from sisa.flows.reconcile import just_trained, reconcile, train_chains
from sisa.flows.reconfigure import reseal_model
from sisa.flows.wiring import wiring
from sisa.flows.wiring.context import (
    Context,
    commit,
    embed_shard,
    plan_of,
    view_shard,
)
from sisa.flows.wiring.witness import catch_up, is_behind
from sisa.planning.layout import index_root
from sisa.planning.plan import ShardPlan, reached
from sisa.store.blobs import files
from sisa.store.blobs.files import walk

if TYPE_CHECKING:
    from sisa.model import Model


@dataclass(frozen=True)
class RepairOutcome:
    """Hold what a repair did, and the diagnoses before and after it."""

    done: tuple[str, ...]
    before: Diagnosis
    after: Diagnosis


def repair(model: Model) -> RepairOutcome:
    """Diagnose a model, repair it, and diagnose it again. Raise Busy while another process writes."""
    wiring.check_executor(model.executor)  # before anything is written
    before = diagnose(model.directory)
    with files.writer_lock(model.directory / wiring.LOCK), model._context(as_it_is=True) as context:
        found = examine(context, model.directory)
        if any(each.repair == "retrain" for each in found):
            _ = model.resources.base  # refuses a changed base before a checkpoint is given up
        done = _mend_sources(context, found) if is_behind(context) else []
        catch_up(context)
        done += mend(context, model.directory).done
    return RepairOutcome(tuple(done), before, diagnose(model.directory))


def _mend_sources(context: Context, found: Sequence[Finding]) -> list[str]:
    """Repair what repeating the deletions needs, without training on records that they delete."""
    if any(each.lost for each in found):
        return []
    _, done = _give_up(context, found)
    return _mend_indexes(context, found) + done


def mend(context: Context, directory: Path) -> RepairOutcome:
    """Repair an opened model; the caller holds the writer lock."""
    found = [*surroundings(directory), *examine(context, directory)]
    done = _mend_modes(directory, found)
    unwritable = any(each.kind == "read_only" for each in found)
    if not unwritable and not any(each.lost for each in found):
        done += _mend_indexes(context, found)
        done += _mend_patches(context, found)
        done += _mend_checkpoints(context, found)
        done += _mend_heads(context, found)
        removed = remove_garbage(context, directory)
        if removed:
            done.append(f"removed {len(removed)} unknown or retired files and directories")
        done += _mend_forms(context, found)
        trained = reconcile(context)
        if trained.slices_trained:
            done.append(f"trained {trained.slices_trained} stages")
    after = [*surroundings(directory), *examine(context, directory)]
    after = [each for each in after if each.kind != "log"]  # this process just wrote to the log
    return RepairOutcome(tuple(done), diagnosis(directory, found), diagnosis(directory, after))


def _mend_modes(directory: Path, found: Sequence[Finding]) -> list[str]:
    wrong = [directory / each.where for each in found if each.repair == "mode"]
    paths = [each for top in wrong for each in ([top] if top == directory else walk(top))]
    for path in paths:
        with files.disk_errors(path):
            if not path.is_symlink():
                path.chmod(files.DIRECTORY_MODE if path.is_dir() else files.FILE_MODE)
    return [f"made {len(paths)} files and directories readable by their owner only"] if wrong else []


def _mend_forms(context: Context, found: Sequence[Finding]) -> list[str]:
    wrong = [each for each in found if each.repair == "reseal"]
    if not wrong:
        return []
    reseal_model(context)
    return [f"rewrote {len(wrong)} files or checkpoints, encrypted or plain as the model is"]


def _mend_indexes(context: Context, found: Sequence[Finding]) -> list[str]:
    done = []
    for shard in sorted({int(f.shard) for f in found if f.repair == "reindex" and f.shard is not None}):
        rows = context.stores.ledger.rows(shard)
        if not rows:
            commit(context, Change(unindexed=[shard]))
        else:
            wanted = embed_shard(context, shard, rows)
            commit(
                context,
                Change(indexes=[context.stores.index.build(shard, index_root(rows), None, wanted)]),
            )
        done.append(f"built the index of shard {shard} from its slice files")
    return done


def _mend_patches(context: Context, found: Sequence[Finding]) -> list[str]:
    """Give up damaged patches and sets of texts."""
    damaged = [each.key for each in found if each.repair == "patches"]
    if not damaged:
        return []
    give_up(context, damaged)
    return [f"gave up {len(damaged)} damaged patches or sets of texts"]


def _mend_checkpoints(context: Context, found: Sequence[Finding]) -> list[str]:
    """Give up damaged checkpoints, then close the gaps that they leave."""
    plans, done = _give_up(context, found)
    return done + close_gaps(context, plans)


def _give_up(context: Context, found: Sequence[Finding]) -> tuple[list[ShardPlan], list[str]]:
    """Give up damaged checkpoints; return the plans of their shards and of those with gaps."""
    damaged: dict[int, list[str]] = {}
    for each in found:
        if each.repair == "retrain" and each.shard is not None:
            damaged.setdefault(each.shard, []).extend([each.key] if each.key else [])
    plans, done = [], []
    for shard, keys in sorted(damaged.items()):
        plan = plan_of(context, view_shard(context, shard, dropped=keys))
        plans.append(plan)
        if keys:
            commit(context, Change(dropped=keys, heads=[plan.head]))
            context.stores.checkpoints.erase(keys)
            done.append(f"gave up {len(keys)} damaged checkpoints of shard {shard}")
    return plans, done


def close_gaps(context: Context, plans: Sequence[ShardPlan]) -> list[str]:
    """Train missing stages before a held one again, in every order; return what was done."""
    done: list[str] = []
    chains: list[Chain] = []
    for plan in (
        plans if context.settings.recipe.shard_budget is None else ()
    ):  # a budget leaves gaps on purpose
        gaps = _gaps(context, plan)
        if gaps and gaps[0].jobs[0].fingerprint != context.compute.fingerprint:
            done.append(
                f"shard {plan.shard} serves its target, but its earlier stages were trained in another "
                "environment and can't be made again here: its next deletion retrains more"
            )
            continue
        chains += gaps
    if not chains:
        return done
    seq = context.stores.ledger.seq()
    trained = train_chains(  # one by one: chains of two orders may share their first stages
        context,
        chains,
        lambda stage: _note_stage(context, just_trained(stage, seq)),
        one_by_one=True,
    )
    return [*done, f"trained {trained} stages again"]


def _note_stage(context: Context, found: HeldCheckpoint) -> None:
    commit(context, Change(checkpoints=[found]))


def _gaps(context: Context, plan: ShardPlan) -> list[Chain]:
    """Return runs of missing stages before a held one; `reconcile` trains those after it."""
    held = {each.key: each for each in context.stores.ledger.checkpoints(plan.shard)}
    slices = tuple(context.stores.ledger.slices(plan.shard))
    gaps: dict[tuple[str, ...], Chain] = {}
    for path in plan.paths:
        run: list[SliceJob] = []
        parent: HeldCheckpoint | None = None
        for job in path[: reached(path, held)]:
            if job.key not in held:
                run.append(job)
                continue
            if run:
                gaps[tuple(each.key for each in run)] = Chain(plan.shard, tuple(run), parent, slices)
                run = []
            parent = held[job.key]
    return list(gaps.values())


def _mend_heads(context: Context, found: Sequence[Finding]) -> list[str]:
    shards = sorted({int(f.shard) for f in found if f.repair == "heads" and f.shard is not None})
    layout = range(context.settings.assigner.layout.num_shards)
    heads: list[Head] = [
        plan_of(context, view_shard(context, shard)).head for shard in shards if shard in layout
    ]
    if shards:
        commit(context, Change(heads=heads, headless=[s for s in shards if s not in layout]))
    return [f"derived {len(shards)} heads from the held checkpoints"] if shards else []
