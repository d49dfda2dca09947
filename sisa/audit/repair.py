"""Repair what can be derived again, under the writer lock, and end in the usual reconciliation.

    modes      made readable by the owner alone
    forms      files rewritten, encrypted or plain, as the model is
    index      built from the slice files, which are checked first
    damaged    checkpoints leave the ledger and heads move to clean ones, in one commit; bytes go later
    patches    damaged ones are given up, and wanted again if their texts are held
    evidence   a damaged file is erased; `reconcile` makes it again from slice files and the log
    gaps       missing stages before a whole target are trained again, so that the chain is whole
    the rest   `reconcile` erases unknown files, trains targets, advances heads, scrubs the ledger

A repair is idempotent and can be interrupted anywhere. While anything is missing that can't be derived
(a slice file, the ledger, the key), only modes are repaired and nothing is erased: an unknown file may
be the missing piece. A head moves only to a checkpoint whose bytes were just checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sisa.audit.doctor import Diagnosis, diagnose, surroundings
from sisa.audit.findings import Finding, RepairKind, examine
from sisa.audit.garbage import remove_garbage
from sisa.core.domain import Chain, HeldCheckpoint, SliceJob
from sisa.core.events import SliceTrained
from sisa.core.ports import Change
from sisa.flows.context.commit import commit, is_behind
from sisa.flows.context.context import Context
from sisa.flows.context.plans import plan_of, plans_of, view_shard, view_shards
from sisa.flows.context.slices import embed_shard
from sisa.flows.patches.on_deletion import give_up
from sisa.flows.reconcile import just_trained, reconcile, train_chains
from sisa.flows.reconfigure import reseal_model
from sisa.flows.restored_backup import catch_up
from sisa.flows.rights.drop import stray_identities
from sisa.flows.wiring import wiring
from sisa.flows.wiring.executors import check_executor
from sisa.flows.wiring.ledger_place import model_lock
from sisa.flows.wiring.model_directory import ModelDirectory
from sisa.planning.layout import index_root
from sisa.planning.plan import ShardPlan, reached
from sisa.store.blobs import files
from sisa.store.blobs.files import walk


@dataclass(frozen=True)
class RepairOutcome:
    """Hold what a repair did, and the diagnoses before and after it."""

    done: tuple[str, ...]
    before: Diagnosis
    after: Diagnosis


def repair(model: ModelDirectory) -> RepairOutcome:
    """Diagnose a model, repair it, and diagnose it again. Raise Busy while another process writes."""
    check_executor(model.executor)  # before anything is written
    before = diagnose(model.directory)
    with model_lock(model.directory), model.context(as_it_is=True) as context:
        found = examine(context, model.directory)
        if any(each.repair == "retrain" for each in found):
            model.resources.refuse_changed_base()  # before a checkpoint is given up
        done: list[str] = []
        if is_behind(context) and not any(each.lost for each in found):
            # What repeating the deletions needs, without training on records that they delete.
            _, given_up = _give_up(context, found)
            done += [*_repair_indexes(context, found), *given_up]
        catch_up(context)
        done += repair_opened(context, model.directory)
    return RepairOutcome(tuple(done), before, diagnose(model.directory))


def repair_opened(context: Context, directory: Path) -> list[str]:
    """Repair an opened model, and return what was done; the caller holds the writer lock."""
    found = [*surroundings(directory), *examine(context, directory)]
    done = _repair_modes(directory, found)
    if any(each.lost or each.kind == "read_only" for each in found):
        return done
    done += _repair_indexes(context, found)
    if damaged := [each.key for each in found if each.repair == "patches"]:
        give_up(context, damaged)
        done.append(f"gave up {len(damaged)} damaged patches or sets of texts")
    if any(each.repair == "evidence" for each in found):
        files.erase_all(directory, [wiring.EVIDENCE, f"{wiring.EVIDENCE}-journal"])
        done.append("erased the damaged evidence, which is made again from the slice files and the log")
    if strays := stray_identities(context):
        commit(context, Change(unidentified=strays))
        done.append(f"removed the identities of {len(strays)} records that are not held")
    plans, given_up = _give_up(context, found)
    done += [*given_up, *close_gaps(context, plans), *_repair_heads(context, found)]
    if removed := remove_garbage(context, directory):
        done.append(f"removed {len(removed)} unknown or retired files and directories")
    if wrong := [each for each in found if each.repair == "reseal"]:
        reseal_model(context)
        done.append(f"rewrote {len(wrong)} files or checkpoints, encrypted or plain as the model is")
    if trained := reconcile(context).slices_trained:
        done.append(f"trained {trained} stages")
    return done


def _repair_modes(directory: Path, found: Sequence[Finding]) -> list[str]:
    wrong = [directory / each.where for each in found if each.repair == "mode"]
    paths = [each for top in wrong for each in ([top] if top == directory else walk(top))]
    for path in paths:
        with files.disk_errors(path):
            if not path.is_symlink():
                path.chmod(files.DIRECTORY_MODE if path.is_dir() else files.FILE_MODE)
    return [f"made {len(paths)} files and directories readable by their owner only"] if wrong else []


def _repair_indexes(context: Context, found: Sequence[Finding]) -> list[str]:
    done = []
    for shard in _shards(found, "reindex"):
        change = Change(unindexed=[shard])
        if rows := context.stores.ledger.rows(shard):
            wanted = embed_shard(context, shard, rows)
            change = Change(indexes=[context.stores.index.build(shard, index_root(rows), None, wanted)])
        commit(context, change)
        done.append(f"built the index of shard {shard} from its slice files")
    return done


def _give_up(context: Context, found: Sequence[Finding]) -> tuple[list[ShardPlan], list[str]]:
    """Give up damaged checkpoints; return the plans of their shards and of those with gaps."""
    plans, done = [], []
    for shard in _shards(found, "retrain"):
        here = [each for each in found if each.repair == "retrain" and each.shard == shard]
        keys = [each.key for each in here if each.key]
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
    if context.recipe.shard_budget is not None:
        return done  # a budget leaves gaps on purpose
    for plan in plans:
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

    def note(stage: SliceTrained) -> None:
        commit(context, Change(checkpoints=[just_trained(stage, seq)]))

    # One by one: chains of two orders may share their first stages.
    trained = train_chains(context, chains, note, one_by_one=True)
    return [*done, f"trained {trained} stages again"]


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


def _repair_heads(context: Context, found: Sequence[Finding]) -> list[str]:
    shards = _shards(found, "heads")
    layout = range(context.settings.assigner.layout.num_shards)
    views = view_shards(context, [shard for shard in shards if shard in layout])
    heads = [plan.head for plan in plans_of(context, views)]
    if shards:
        commit(context, Change(heads=heads, headless=[s for s in shards if s not in layout]))
    return [f"derived {len(shards)} heads from the held checkpoints"] if shards else []


def _shards(found: Sequence[Finding], repair: RepairKind) -> list[int]:
    return sorted({each.shard for each in found if each.repair == repair and each.shard is not None})
