"""A changed run file over an existing model: refuse it, or move the model to it.

    effect of a difference      what happens with `--reconfigure`
    none                        the new value is noted
    retrain                     new targets; each head serves until its successor is ready
    reindex                     the index is built anew
    reset                       records move to other shards or meet another base: all is trained anew

Rules: without `--reconfigure` any difference but `none` is refused, all of them listed. The secret
never changes, since tombstones are kept under it.

Not covered: which effect a key has (`config.py` says so beside the key).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from sisa.assign import index_root, slice_root
from sisa.config import Difference, Effect
from sisa.domain import ANY_SHARD, Export, Head, IndexFile
from sisa.errors import ConfigConflict, Problem
from sisa.plan import ShardView, plan_shard
from sisa.ports import Change, Ledger, StoredRecord
from sisa.world import World, view_shard


def refuse_differences(found: Sequence[Difference], where: str) -> None:
    """Raises ConfigConflict that lists every difference which would change the model."""
    problems = [
        Problem(each.key, f"the model has {each.old!r}, the run file {each.new!r} ({each.effect})")
        for each in found
        if each.effect != "none"
    ]
    if problems:
        raise ConfigConflict(
            f"the run file differs from the model in {len(problems)} settings; nothing was changed",
            where=where,
            next_step="restore the settings, or accept the consequence in brackets with --reconfigure",
            problems=problems,
        )


def all_records(world: World) -> list[StoredRecord]:
    """Every held record, by keyed id."""
    held = [record for file in world.ledger.slices() for record in world.records.read(file)]
    return sorted(held, key=lambda each: each.id_digest)


def retargeted(world: World) -> list[Head]:
    """New hyper-parameters: every shard's new target; heads stay until it is trained."""
    return [
        plan_shard(view_shard(world, head.shard), world.recipe, world.fingerprint).head
        for head in world.ledger.heads()
    ]


def reindexed(world: World) -> list[IndexFile]:
    """Another embedder: every shard's index, built anew."""
    indexes = []
    for file in world.ledger.indexes():
        rows = world.ledger.rows(file.shard)
        texts = {
            each.id_digest: each.record.text
            for slice_file in world.ledger.slices(file.shard)
            for each in world.records.read(slice_file)
        }
        vectors = world.embed([texts[row.id_digest] for row in rows])
        wanted = dict(zip((row.vector_id for row in rows), vectors, strict=True))
        indexes.append(world.index.build(file.shard, index_root(rows), None, wanted))
    return indexes


def move(world: World, effects: Collection[Effect], meta: dict[str, str]) -> None:
    """Move the model by all of its effects in one transaction, after all of them were found possible."""
    world.count_tokens([each.record for each in all_records(world)])  # refuses what no longer fits
    if "reset" in effects:
        reset(world, meta)
        return
    heads = retargeted(world) if "retrain" in effects else []
    indexes = reindexed(world) if "reindex" in effects else []
    world.ledger.commit(Change(heads=heads, indexes=indexes, meta=meta))


def _unplaced(ledger: Ledger) -> list[Export]:
    """Exports of the old places: from now on, every record that was there may be in them."""
    clean = [each for each in ledger.exports() if each.state == "clean"]
    return [replace(each, shard=ANY_SHARD, slice=0, seq=ledger.seq() + 1) for each in clean]


def reset(world: World, meta: dict[str, str]) -> None:
    """Another layout or base: place every record anew and start from the base.

    `world` has the new assigner, recipe and embedder; the ledger still has the old places.
    """
    held = all_records(world)
    records = [each.record for each in held]
    counts = world.count_tokens(records)
    rows = [world.assigner.row(r, n) for r, n in zip(records, counts, strict=True)]
    vectors = world.embed([record.text for record in records])
    slices, indexes = [], []
    for shard, slice_ in sorted({(row.shard, row.slice) for row in rows}):
        here = [row for row in rows if (row.shard, row.slice) == (shard, slice_)]
        digests = {row.id_digest for row in here}
        members = [each for each in held if each.id_digest in digests]
        slices.append(world.records.write(shard, slice_, slice_root(here), members))
    for shard in sorted({row.shard for row in rows}):
        wanted = {
            row.vector_id: vector
            for row, vector in zip(rows, vectors, strict=True)
            if row.shard == shard
        }
        here = [row for row in rows if row.shard == shard]
        indexes.append(world.index.build(shard, index_root(here), None, wanted))
    places = {(file.shard, file.slice) for file in slices}
    shards = {row.shard for row in rows}
    old = world.ledger
    targets = {
        shard: plan_shard(
            ShardView(shard, tuple(f for f in slices if f.shard == shard), ()),
            world.recipe,
            world.fingerprint,
        ).head
        for shard in range(world.assigner.layout.num_shards)
    }
    old.commit(
        Change(
            removed=[row for head in old.heads() for row in old.rows(head.shard)],
            added=rows,
            slices=slices,
            emptied=[(f.shard, f.slice) for f in old.slices() if (f.shard, f.slice) not in places],
            indexes=indexes,
            unindexed=[file.shard for file in old.indexes() if file.shard not in shards],
            heads=list(targets.values()),
            headless=[head.shard for head in old.heads() if head.shard not in targets],
            dropped=[each.key for each in old.checkpoints()],
            exports=_unplaced(old),
            meta=meta,
        )
    )
