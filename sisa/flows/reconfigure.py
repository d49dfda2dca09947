"""Move an existing model to a changed run file, or refuse.

    effect of a difference      what happens with `--reconfigure`
    none                        the new value is stored
    retrain                     new targets; each head serves until its successor is ready
    reindex                     the index is built again
    reset                       records move to other shards or get another base: everything is trained
                                again, and the old heads serve until then; patches of another base are
                                dropped
    reseal                      held files are written again, encrypted or plain, before the commit

Without `--reconfigure`, every difference except `none` is refused, and all of them are listed.
`config/config.py` defines the effect of each key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from sisa.config.config import Difference
from sisa.config.fields import Effect
from sisa.core.domain import ANY_SHARD, Head, HeldCheckpoint, IndexFile, RecordRow
from sisa.core.errors import ConfigConflict, Problem
from sisa.core.events import Notice
from sisa.core.ledger_meta import TRAINED_ANEW, TRAINED_OVER
from sisa.core.ports import Change, StoredRecord, merged
from sisa.flows.context.areas import known_by_area, purge
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context, trained_over
from sisa.flows.context.plans import plans_of, view_shards
from sisa.flows.context.slices import embed_records, embed_shard, write_shard
from sisa.flows.reconcile import Trained, train_unrecorded
from sisa.flows.record_checks import check_generations
from sisa.planning.layout import index_root
from sisa.planning.plan import ShardView
from sisa.store.areas import ALWAYS_SEALED, HIDDEN_STATES
from sisa.store.blobs.sealed_area import reseal_blobs


def check_no_differences(found: Sequence[Difference], where: str) -> None:
    """Raise ConfigConflict with every difference that would change the model."""
    problems = [
        Problem(each.key, f"the model has {each.old!r}, the run file {each.new!r} ({each.effect})")
        for each in found
        if each.effect != "none"
    ]
    if count := len(problems):
        raise ConfigConflict(
            f"the run file differs from the model in {count} setting{'s' * (count > 1)}; "
            "nothing was changed",
            where=where,
            next_step="restore the settings, or accept the consequence in brackets with --reconfigure",
            problems=problems,
        )


def all_records(context: Context) -> list[StoredRecord]:
    """Return every held record, by keyed id."""
    files = context.stores.ledger.slices()
    held = [record for file in files for record in context.stores.records.read(file)]
    return sorted(held, key=lambda each: each.id_digest)


def _build_indexes(context: Context) -> list[IndexFile]:
    """Build every shard's index again, with another embedder; return the files."""
    indexes = []
    for file in context.stores.ledger.indexes():
        rows = context.stores.ledger.rows(file.shard)
        wanted = embed_shard(context, file.shard, rows)
        indexes.append(context.stores.index.build(file.shard, index_root(rows), None, wanted))
    return indexes


def move(context: Context, effects: Collection[Effect], meta: dict[str, str]) -> Trained:
    """Move the model by all effects in one transaction, once all of them are known to be possible."""
    held = all_records(context)
    context.compute.count_tokens([each.record for each in held])  # refuses records that no longer fit
    num_slices, files = context.settings.assigner.layout.num_slices, context.stores.ledger.slices()
    appended = "reset" not in effects and any(file.slice >= num_slices for file in files)
    appended = appended or any(each.record.generation for each in held)
    check_generations(context.recipe.training, (), append=appended)
    if not {"reset", "retrain"}.isdisjoint(effects):
        meta = {**meta, TRAINED_ANEW: context.now()}
    if "reset" in effects:
        return reset(context, meta)
    shards = [head.shard for head in context.stores.ledger.heads()] if "retrain" in effects else []
    heads = [plan.head for plan in plans_of(context, view_shards(context, shards))]  # with new targets
    indexes = _build_indexes(context) if "reindex" in effects else []
    commit(context, Change(heads=heads, indexes=indexes, meta=meta))
    return Trained()


def reseal_model(context: Context) -> None:
    """Encrypt or decrypt every held file, as the keyring says; both forms can be read meanwhile."""
    for area, names in known_by_area(context).items():
        if area == HIDDEN_STATES:
            context.stores.hidden_states.erase(sorted(names))  # a cache
            continue
        if area in ALWAYS_SEALED:
            continue
        reseal_blobs(context.stores.blobs[area], area, sorted(names), context.stores.keyring)
    purge(context)


def reset(context: Context, meta: dict[str, str]) -> Trained:
    """Move to another layout or base: assign every record again, train from the base, then commit.

    `context` has the new assigner, recipe and embedder; the old heads serve until the commit. The same
    command continues an interrupted run from files that no commit lists.
    """
    held = all_records(context)
    records = [each.record for each in held]
    counts = context.compute.count_tokens(records)
    rows = [context.settings.assigner.row(r, n) for r, n in zip(records, counts, strict=True)]
    written = _write_shards(context, held, rows)
    shards = range(context.settings.assigner.layout.num_shards)
    views = [ShardView(n, tuple(f for f in written.slices if f.shard == n), ()) for n in shards]
    plans = plans_of(context, views)
    trained = train_unrecorded(context, plans, written.slices)
    views = [replace(v, held=tuple(e for e in trained if e.shard == v.shard)) for v in views]
    heads = [plan.head for plan in plans_of(context, views)]
    with context.stores.ledger.exclusive():  # so that checkpoints get the number of their rows
        commit(context, _reset_change(context, rows, written, heads, trained, meta))
    epochs = sum(plan.record_epochs for plan in plans)
    return Trained(epochs, sum(len(plan.train) for plan in plans))


def _write_shards(context: Context, held: Sequence[StoredRecord], rows: Sequence[RecordRow]) -> Change:
    """Write the slices and indexes of all records at their new places, which `rows` give."""
    vectors = embed_records(context, [each.record for each in held])
    fresh = {each.id_digest: each for each in held}
    written = []
    for shard in sorted({row.shard for row in rows}):
        here = [row for row in rows if row.shard == shard]
        wanted = {r.vector_id: v for r, v in zip(rows, vectors, strict=True) if r.shard == shard}
        written.append(write_shard(context, shard, here, {row.slice for row in here}, fresh, wanted))
    return merged(written)


def _reset_change(
    context: Context,
    rows: Sequence[RecordRow],
    written: Change,
    heads: Sequence[Head],
    trained: Sequence[HeldCheckpoint],
    meta: dict[str, str],
) -> Change:
    """Return the transaction that replaces everything held by the new layout or base."""
    old = context.stores.ledger
    seq = old.seq() + 1  # of this commit
    former = [each for each in old.patches() if each.job.base != context.settings.base]
    gone = [replace(e, state="dropped") for e in former if e.state in ("active", "wanted")]
    if gone:
        context.report(Notice(f"{len(gone)} patches of the former base are dropped"))
    beneath_all = not {each.key for each in former}.isdisjoint(trained_over(old))
    filled = {(file.shard, file.slice) for file in written.slices}
    return replace(
        written,
        removed=[row for head in old.heads() for row in old.rows(head.shard)],
        added=rows,
        emptied=[(f.shard, f.slice) for f in old.slices() if (f.shard, f.slice) not in filled],
        unindexed=sorted({file.shard for file in old.indexes()} - {f.shard for f in written.indexes}),
        heads=heads,
        headless=[head.shard for head in old.heads() if head.shard >= len(heads)],
        checkpoints=[replace(each, seq=seq) for each in trained],
        dropped=[each.key for each in old.checkpoints()],
        patches=gone,
        exports=[  # any record deleted later may be in them
            replace(each, shard=ANY_SHARD, prefix=(), seq=seq)
            for each in old.exports()
            if not each.stale
        ],
        meta={**meta, TRAINED_OVER: "[]"} if beneath_all else meta,
    )
