"""Lay records out over shards and slices.

A record's position is a keyed hash of its subject, else of its id; it never depends on other records, on
arrival order or on content. All records of a subject share one shard, and those of one generation share
one slice. With bands, the record's own deletion risk narrows the slices that it hashes to. An appended
record hashes to the slices of its own generation, which follow those of earlier generations.

Values that place a record are fields of `Record`, stored with it, because a changed layout places held
records anew. What chooses the shard is also part of `ModelDirectory.partition`, the name of the rule
under which a caller may read some shards alone.

>>> from sisa.core.domain import Part, Record
>>> assign = Assigner(Keyed(b"1" * 32), Layout(num_shards=4, num_slices=3))
>>> ada = [Record(f"r{i}", "ada", "text", (Part("text", "x"),)) for i in range(9)]
>>> len({assign.place(record) for record in ada})
1

Source: SISA, Bourtoule et al. 2021, section IV (sharding, slicing).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Identity, Record, RecordRow, Risk, normalised
from sisa.planning.bands import Bands

VECTOR_ID_BITS = 63  # FAISS ids are signed 64-bit


@dataclass(frozen=True, slots=True)
class Layout:
    """Numbers of shards and slices, and the bands that restrict slices by deletion risk."""

    num_shards: int
    num_slices: int
    bands: Bands | None = field(default=None, repr=False)

    def generation(self, slice_: int) -> int:
        """Return the generation of a slice: each has `num_slices`, after those of earlier ones."""
        return slice_ // self.num_slices

    def slices(self, risk: Risk) -> range:
        """Return the slices that a record of generation 0 with this risk may hash to."""
        return range(self.num_slices) if self.bands is None else self.bands.slices(risk, self.num_slices)


class Assigner:
    """Places records, and gives them and what is made of them their keyed names."""

    def __init__(self, keyed: Keyed, layout: Layout) -> None:
        self._keyed = keyed
        self.layout = layout

    def place(self, record: Record) -> tuple[int, int]:
        """Return the (shard, slice) of a record. Raise InvalidInput if its risk is of no class."""
        subject = record.subject_id
        who = ("id", record.id) if subject is None else ("subject", subject)
        allowed = self.layout.slices(record.deletion_risk)
        slice_ = allowed[self._keyed.number("slice", len(allowed), *who)]
        return self._shard(*who), (record.generation or 0) * self.layout.num_slices + slice_

    def shard_of_subject(self, subject_id: str) -> int:
        """Return the shard of all records of a subject."""
        return self._shard("subject", subject_id)

    def _shard(self, *who: str) -> int:
        return self._keyed.number("shard", self.layout.num_shards, *who)

    def row(self, record: Record, num_tokens: int) -> RecordRow:
        """Return the ledger row of a record that is not yet committed. Raise as `place` does."""
        shard, slice_ = self.place(record)
        id_digest, subject = self.id_digest(record.id), record.subject_id
        return RecordRow(
            id_digest=id_digest,
            subject_digest=None if subject is None else self.subject_digest(subject),
            record_digest=self.record_digest(record),
            text_digest=self.text_digest(record),
            kind=record.kind,
            shard=shard,
            slice=slice_,
            vector_id=int(id_digest[:16], 16) >> (64 - VECTOR_ID_BITS),
            num_tokens=num_tokens,
        )

    def differences(self, record: Record, row: RecordRow) -> list[str]:
        """Return the names of the columns in which a row differs from that of its record."""
        again = replace(self.row(record, row.num_tokens), seq=row.seq)
        return [at.name for at in fields(row) if getattr(again, at.name) != getattr(row, at.name)]

    def id_digest(self, record_id: str) -> str:
        return self._keyed.digest("id", record_id)

    def subject_digest(self, subject_id: str) -> str:
        return self._keyed.digest("subject", subject_id)

    def record_digest(self, record: Record) -> str:
        return self._keyed.digest("record", record.canonical())

    def text_digest(self, record: Record) -> str:
        return self._keyed.digest("text", normalised(record.text))

    def identity_key(self, list_name: str, hashed: str) -> str:
        """Return the key of an identifier, given the list of DROP that has it and its hash there."""
        return self._keyed.digest("identity", list_name, hashed)

    def identities(self, record: Record) -> list[Identity]:
        """Return the identities of a record, given its identifiers."""
        name = self.id_digest(record.id)
        keys = [self.identity_key(*each) for each in record.identifiers]
        return [Identity(key, name) for key in dict.fromkeys(keys)]

    def set_name(self, role: str, records: Sequence[Record]) -> str:
        """Return the name of a vault set: a keyed digest of its content."""
        return self._keyed.digest("vault", role, *(each.canonical() for each in records))

    def model_digest(self, heads: Sequence[str | None], patches: Sequence[str]) -> str:
        """Return the name of the served model, given the digests of its adapters."""
        served = {"heads": heads, "patches": patches} if patches else heads
        return self._keyed.digest("model", digest_of(served))


def slice_root(rows: Iterable[RecordRow]) -> str:
    """Return the digest of a slice's records, in canonical order (by keyed id)."""
    return root_of(sorted((row.id_digest, row.record_digest) for row in rows))


def root_of(contents: Sequence[tuple[str, str]]) -> str:
    """Return the root of a slice with these (keyed id, record digest) pairs, in canonical order."""
    return digest_of(contents)


def index_root(rows: Iterable[RecordRow]) -> str:
    """Return the digest of the vectors that a shard's index should hold, and their content."""
    return digest_of(sorted((row.vector_id, row.record_digest) for row in rows))
