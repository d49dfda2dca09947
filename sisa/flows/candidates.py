"""Find candidates: records that are like a text or like other records.

The index proposes, the ledger decides: a candidate that the ledger does not hold is not a hit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from sisa.core.domain import Hit, Record, RecordRow, Tombstone
from sisa.core.errors import UnknownRecord
from sisa.core.ports import Vectors
from sisa.flows.context.context import Context
from sisa.flows.context.slices import not_in, records_of
from sisa.flows.locations import lookup, of_subject

NUM_NEAR = 50  # most near-duplicates that are proposed
SHOWN_CHARS = 300  # shown of a candidate's text


@dataclass(frozen=True)
class Candidate:
    """Describe a candidate record."""

    id: str
    score: float
    shard: int
    slice: int
    match: str  # "subject" if the ledger named it, "content" if the index did
    subject: str | None = None
    text: str | None = None  # its beginning without system turns, if the caller asked for it


def find_candidates(
    context: Context,
    *,
    text: str | None,
    subject: str | None,
    like: str | None,
    top_k: int,
    show_text: bool,
) -> list[Candidate]:
    """Return candidates: like a text, of a subject and like those, or like the record with an id."""
    if subject is not None:
        rows, _ = of_subject(context, subject)
        own = [
            _candidate(record, 1.0, row, "subject")
            for record, row in zip(records_of(context, rows), rows, strict=True)
        ]
        found = own + _similar(context, rows, top_k) if rows else []
    elif like is not None:
        (row,) = lookup(context, [like])
        if isinstance(row, Tombstone):
            raise UnknownRecord(
                "that record is deleted: its vector is gone with it",
                next_step="`sisa where` shows when and by which request",
            )
        found = _similar(context, [row], top_k)
    else:
        vectors = context.compute.embedder().embed([str(text)])
        found = _candidates(context, _search(context, vectors, top_k), top_k)
    return found if show_text else _without_text(found)


def near_duplicates(
    context: Context, rows: Sequence[RecordRow], threshold: float, known: Sequence[RecordRow] = ()
) -> list[Candidate]:
    """Return records at least `threshold` near one of `rows`, except `known` copies."""
    return _without_text(_similar(context, rows, NUM_NEAR, threshold, known))


def _without_text(found: Iterable[Candidate]) -> list[Candidate]:
    return [replace(each, text=None) for each in found]


def _similar(
    context: Context,
    rows: Sequence[RecordRow],
    top_k: int,
    threshold: float = -math.inf,
    known: Sequence[RecordRow] = (),
) -> list[Candidate]:
    """Return the records that are most like some rows, except these rows and `known` ones."""
    places = {(row.shard, row.vector_id) for row in (*rows, *known)}
    hits = _search(context, _vectors(context, rows), top_k + len(places))
    close = [h for h in hits if h.score >= threshold and (h.shard, h.vector_id) not in places]
    return _candidates(context, close, top_k)


def _search(context: Context, queries: Vectors, top_k: int) -> list[Hit]:
    """Return the best hits over all shards and queries, one for each record, best first."""
    each = context.stores.index.search(context.stores.ledger.indexes(), queries, top_k)
    found = [hit for hits in each for hit in hits]
    best: dict[tuple[int, int], Hit] = {}
    for hit in sorted(found, key=lambda hit: (-hit.score, hit.shard, hit.vector_id)):
        best.setdefault((hit.shard, hit.vector_id), hit)
    return list(best.values())


def _vectors(context: Context, rows: Sequence[RecordRow]) -> Vectors:
    import numpy as np

    found = []
    for file in context.stores.ledger.indexes():
        wanted = [row.vector_id for row in rows if row.shard == file.shard]
        if wanted:
            found.append(context.stores.index.vectors(file, wanted))
    if sum(map(len, found)) < len(rows):
        raise not_in("the index")
    return np.concatenate(found)


def _candidates(context: Context, hits: Iterable[Hit], top_k: int) -> list[Candidate]:
    """Return the records of the best hits; a hit that the ledger does not hold is none."""
    by_vector = context.stores.ledger.by_vector
    rows = ((hit, by_vector(hit.shard, [hit.vector_id]).get(hit.vector_id)) for hit in hits)
    chosen = list(islice(((hit, row) for hit, row in rows if row is not None), top_k))
    records = records_of(context, [row for _, row in chosen])
    return [
        _candidate(record, round(hit.score, 6), row, "content")
        for (hit, row), record in zip(chosen, records, strict=True)
    ]


def _candidate(record: Record, score: float, row: RecordRow, match: str) -> Candidate:
    said = [part.text for part in record.parts if part.role != "system"]
    text = " ".join(" ".join(said).split())
    shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    return Candidate(record.id, score, row.shard, row.slice, match, record.subject_id, shown)
