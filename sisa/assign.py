"""record -> shard and slice: a keyed hash of its subject, else of its id.

Rules: the place of a record depends on the secret, the number of shards and slices and that record's
own subject or id; never on other records, on arrival order or on content. All records of a subject
share one shard and one slice. A subject named like a record id hashes elsewhere (purposes differ).
Source: Bourtoule et al. 2021, section IV (sharding, slicing); keyed as the laws of exactness demand.

Not covered: churn bands (a record's own deletion risk choosing its slice).

>>> from sisa.domain import Part, Record
>>> assign = Assigner(Keyed(b"1" * 32), Layout(num_shards=4, num_slices=3))
>>> ada = [Record(f"r{i}", "ada", "text", (Part("text", "x"),)) for i in range(9)]
>>> len({assign.place(record) for record in ada})
1
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sisa.digest import Keyed, digest_of
from sisa.domain import Record, RecordRow

VECTOR_ID_BITS = 63  # FAISS ids are signed 64-bit


@dataclass(frozen=True, slots=True)
class Layout:
    """How many shards, and slices in each."""

    num_shards: int
    num_slices: int


class Assigner:
    """Places records and names them by keyed digests."""

    def __init__(self, keyed: Keyed, layout: Layout) -> None:
        self._keyed = keyed
        self.layout = layout

    def id_digest(self, record_id: str) -> str:
        return self._keyed.digest("id", record_id)

    def subject_digest(self, subject_id: str) -> str:
        return self._keyed.digest("subject", subject_id)

    def set_name(self, role: str, records: Sequence[Record]) -> str:
        """The name of a set of the vault: a keyed digest of its content."""
        return self._keyed.digest("vault", role, *(each.canonical() for each in records))

    def place(self, record: Record) -> tuple[int, int]:
        """(shard, slice) of a record."""
        if record.subject_id is not None:
            return self.place_of_subject(record.subject_id)
        return self._place("id", record.id)

    def place_of_subject(self, subject_id: str) -> tuple[int, int]:
        """(shard, slice) of all records of a subject."""
        return self._place("subject", subject_id)

    def _place(self, *who: str) -> tuple[int, int]:
        shard = self._keyed.number("shard", self.layout.num_shards, *who)
        return shard, self._keyed.number("slice", self.layout.num_slices, *who)

    def row(self, record: Record, num_tokens: int) -> RecordRow:
        """The ledger row of a record, not yet committed."""
        shard, slice_ = self.place(record)
        id_digest = self.id_digest(record.id)
        subject = record.subject_id
        return RecordRow(
            id_digest=id_digest,
            subject_digest=None if subject is None else self.subject_digest(subject),
            record_digest=self._keyed.digest("record", record.canonical()),
            text_digest=self._keyed.digest("text", normalised(record.text)),
            kind=record.kind,
            shard=shard,
            slice=slice_,
            vector_id=int(id_digest[:16], 16) >> (64 - VECTOR_ID_BITS),
            num_tokens=num_tokens,
        )


def normalised(text: str) -> str:
    """Text as copies are compared: compatibility forms, case and white space folded.

    >>> normalised("  Ada\\u00a0 WROTE\\n it.") == normalised("ada wrote it.")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def slice_root(rows: Iterable[RecordRow]) -> str:
    """The digest of a slice's records, in canonical order (by keyed id)."""
    return digest_of(sorted((row.id_digest, row.record_digest) for row in rows))


def index_root(rows: Iterable[RecordRow]) -> str:
    """The digest of the vectors that a shard's index should hold, with the content they embed."""
    return digest_of(sorted((row.vector_id, row.record_digest) for row in rows))
