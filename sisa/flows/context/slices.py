"""Read, embed and write the records of slices.

New slice files get new names, and nothing is overwritten or erased here: the flows decide the order of
effects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

from sisa.core import ports
from sisa.core.domain import Record, RecordRow, SliceFile
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.events import EmbeddingProgress
from sisa.flows.context.context import Context
from sisa.planning.layout import index_root, slice_root

SlicePosition = tuple[int, int]  # shard, slice
EMBEDDED_AT_ONCE = 1024  # texts, between two reports of progress


def held_rows(context: Context, id_digests: Iterable[str]) -> list[RecordRow]:
    """Return the rows of those records (by keyed id) that are held."""
    found = context.stores.ledger.lookup(id_digests).values()
    return [each for each in found if isinstance(each, RecordRow)]


def slices_of(context: Context, rows: Iterable[RecordRow]) -> list[SliceFile]:
    """Return the files that hold these records now."""
    places = {(row.shard, row.slice) for row in rows}
    shards = sorted({shard for shard, _ in places})
    return [f for s in shards for f in context.stores.ledger.slices(s) if (s, f.slice) in places]


def stored_in(
    context: Context, files: Iterable[SliceFile], rows: Collection[RecordRow]
) -> list[ports.StoredRecord]:
    """Return the records of rows, read from the files of their slices."""
    names = {row.id_digest for row in rows}
    places = {(row.shard, row.slice) for row in rows}
    read = (context.stores.records.read(f) for f in files if (f.shard, f.slice) in places)
    return [stored for each in read for stored in each if stored.id_digest in names]


def records_of(context: Context, rows: Sequence[RecordRow]) -> list[Record]:
    """Return the records of rows, in their order, from their slice files. Raise IntegrityError."""
    held = stored_in(context, slices_of(context, rows), rows)
    records = {each.id_digest: each.record for each in held}
    if not records.keys() >= {row.id_digest for row in rows}:
        raise not_in("the file of their slice")
    return [records[row.id_digest] for row in rows]


def ids_of(context: Context, rows: Sequence[RecordRow]) -> list[str]:
    """Return the plain ids of rows, sorted."""
    return sorted(record.id for record in records_of(context, rows))


def not_in(holder: str, where: str = "") -> IntegrityError:
    """Return the error for records that the ledger holds and `holder` does not."""
    return IntegrityError(
        f"the ledger holds records that {holder} does not",
        where=where,
        next_step="run `sisa verify`; restore the model directory from a backup",
    )


def embed_records(context: Context, records: Sequence[Record]) -> list[ports.Vectors]:
    """Return each record's vectors: that of its text, then those of its prompts."""
    import numpy as np

    texts = [(record.text, *record.prompts) for record in records]
    flat = [text for each in texts for text in each]
    embed = context.compute.embedder().embed
    parts = [embed(flat[:EMBEDDED_AT_ONCE])]
    for start in range(EMBEDDED_AT_ONCE, len(flat), EMBEDDED_AT_ONCE):
        context.report(EmbeddingProgress(start, len(flat)))
        parts.append(embed(flat[start : start + EMBEDDED_AT_ONCE]))
    vectors = np.concatenate(parts)
    ends = list(accumulate(map(len, texts)))
    return [vectors[end - len(each) : end] for end, each in zip(ends, texts, strict=True)]


def embed_shard(context: Context, shard: int, rows: Sequence[RecordRow]) -> dict[int, ports.Vectors]:
    """Embed a shard's records again from its slice files; return their vectors by vector id."""
    stored = stored_in(context, context.stores.ledger.slices(shard), rows)
    held = {each.id_digest: each.record for each in stored}
    vectors = embed_records(context, [held[row.id_digest] for row in rows])
    return dict(zip((row.vector_id for row in rows), vectors, strict=True))


def write_shard(
    context: Context,
    shard: int,
    rows: Sequence[RecordRow],
    slices: Iterable[int],
    fresh: Mapping[str, ports.StoredRecord] = MappingProxyType({}),
    vectors: Mapping[int, ports.Vectors] = MappingProxyType({}),
) -> ports.Change:
    """Write some slices and the index of a shard that holds exactly `rows`.

    Return the change that makes the new files current. Records that are not `fresh` (by keyed id) and
    vectors that are not given (by vector id) are read from the present files. Raise IntegrityError, or
    InvalidInput if two records share a vector id.
    """
    written = []
    for slice_ in sorted(slices):
        here = [row for row in rows if row.slice == slice_]
        new = [fresh[row.id_digest] for row in here if row.id_digest in fresh]
        written.append(_write_slice(context, shard, slice_, here, new))
    wanted = {row.vector_id: vectors.get(row.vector_id) for row in rows}
    if len(wanted) < len(rows):
        raise InvalidInput(
            "two record ids share a vector id (chance below 1 in 10^9)",
            where=f"shard {shard}",
            next_step="give one of the new records another id",
        )
    base = next(iter(context.stores.ledger.indexes(shard)), None)
    index = context.stores.index.build(shard, index_root(rows), base, wanted)
    return ports.Change(slices=written, indexes=[index])


def _write_slice(
    context: Context,
    shard: int,
    slice_: int,
    rows: Sequence[RecordRow],
    fresh: Sequence[ports.StoredRecord],
) -> SliceFile:
    files = context.stores.ledger.slices(shard) if len(fresh) < len(rows) else []
    held = [file for file in files if file.slice == slice_]
    by_digest = {each.id_digest: each for each in (*fresh, *stored_in(context, held, rows))}
    if len(by_digest) < len(rows):
        raise not_in("the file of their slice", f"shard {shard}, slice {slice_}")
    records = [by_digest[digest] for digest in sorted(by_digest)]
    return context.stores.records.write(shard, slice_, slice_root(rows), records)
