"""Lay records out over shards and slices, and the slices of a shard in orders.

A record's position is a keyed hash of its subject, else of its id; it never depends on other records, on
arrival order or on content. All records of a subject share one shard, and those of one generation share
one slice. With bands, the record's own deletion risk narrows the slices that it hashes to. An appended
record hashes to the slices of its own generation, which follow those of earlier generations.

>>> from sisa.core.domain import Part, Record
>>> assign = Assigner(Keyed(b"1" * 32), Layout(num_shards=4, num_slices=3))
>>> ada = [Record(f"r{i}", "ada", "text", (Part("text", "x"),)) for i in range(9)]
>>> len({assign.place(record) for record in ada})
1

A shard's slices are trained in one or more orders. Order 0 has the slices as they are numbered, and its
last stage is the shard's target. After a deletion from slice s, the prefix before s of each order is
clean; the deepest of them serves until order 0 is trained again. Each order arranges the slices of every
generation alike, and generations follow one another.

>>> rotations(6, 3)
((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (4, 5, 0, 1, 2, 3))
>>> arranged([0, 1, 2, 3, 4, 5], (2, 0, 1))
[2, 0, 1, 5, 3, 4]
>>> matched((5.0, 1.0, 1.0), 2)
((0, 1, 2), (1, 2, 0))

Source: Bourtoule et al. 2021, section IV (sharding, slicing). S3T, Chowdhury et al., ICLR 2025 (arXiv
2406.16257), section 3: cyclic rotations, and orders for known risks by bipartite matching.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

from sisa.core.digest import Keyed, digest_of
from sisa.core.domain import Identity, Record, RecordRow, Risk
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
    """Assigns records to slices and names them by keyed digests."""

    def __init__(self, keyed: Keyed, layout: Layout) -> None:
        self._keyed = keyed
        self.layout = layout

    def id_digest(self, record_id: str) -> str:
        return self._keyed.digest("id", record_id)

    def subject_digest(self, subject_id: str) -> str:
        return self._keyed.digest("subject", subject_id)

    def identity_key(self, kind: str, hashed: str) -> str:
        """Return the key of an identifier, given the list of DROP that has it and its hash there."""
        return self._keyed.digest("identity", kind, hashed)

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

    def place(self, record: Record) -> tuple[int, int]:
        """Return the (shard, slice) of a record."""
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
        """Return the ledger row of a record that is not yet committed."""
        shard, slice_ = self.place(record)
        id_digest, subject = self.id_digest(record.id), record.subject_id
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

    def differences(self, record: Record, row: RecordRow) -> list[str]:
        """Return the names of the columns in which a row differs from that of its record."""
        again = replace(self.row(record, row.num_tokens), seq=row.seq)
        return [at.name for at in fields(row) if getattr(again, at.name) != getattr(row, at.name)]


def normalised(text: str) -> str:
    """Return a text as copies are compared: compatibility forms, case and white space folded.

    >>> normalised("  Ada\\u00a0 WROTE\\n it.") == normalised("ada wrote it.")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def slice_root(rows: Iterable[RecordRow]) -> str:
    """Return the digest of a slice's records, in canonical order (by keyed id)."""
    return root_of(sorted((row.id_digest, row.record_digest) for row in rows))


def root_of(contents: Sequence[tuple[str, str]]) -> str:
    """Return the root of a slice with these (keyed id, record digest) pairs, in canonical order."""
    return digest_of(contents)


def index_root(rows: Iterable[RecordRow]) -> str:
    """Return the digest of the vectors that a shard's index should hold, and their content."""
    return digest_of(sorted((row.vector_id, row.record_digest) for row in rows))


Order = tuple[int, ...]
MAX_MATCHED = 1_000  # most slices of a shard for `matched`, which takes cubic time


def chosen_orders(num_slices: int, num_orders: int, bands: Bands | None) -> tuple[Order, ...]:
    """Return the orders of a run file: matched to the risks of its bands, or else rotations."""
    if bands is None:
        return rotations(num_slices, num_orders)
    return matched(bands.slice_risks(num_slices), num_orders)


def rotations(num_slices: int, num_orders: int) -> tuple[Order, ...]:
    """Return `num_orders` cyclic rotations of the slices, at most one for each slice; order 0 first."""
    starts = (order * num_slices // num_orders for order in range(num_orders))
    return tuple(tuple((start + n) % num_slices for n in range(num_slices)) for start in starts)


def matched(risks: Sequence[float], num_orders: int) -> tuple[Order, ...]:
    """Return `num_orders` orders for slices with given risks of being hit; order 0 first.

    They maximise the expected number of slices that still serve after one deletion, the sum over slices
    of risk x the latest position in any order. Each slice needs one late position in one order, so this
    is an assignment problem. The rest of each order is filled by ascending risk; equal risks are
    rotated, so that orders differ when nothing else decides.
    """
    num_slices, others = len(risks), num_orders - 1
    plain = tuple(range(num_slices))
    found = [plain]
    fixed: list[dict[int, int]] = [{} for _ in range(others)]  # of each order: position -> slice
    for slice_, position, order in _late_positions(risks, others) if others else ():
        fixed[order][position] = slice_
    for number, positions in enumerate(fixed, start=1):
        start = number * num_slices // num_orders
        rotated = (*plain[start:], *plain[:start])
        taken = set(positions.values())
        filling = iter(sorted((s for s in rotated if s not in taken), key=lambda s: risks[s]))
        found.append(tuple(positions[p] if p in positions else next(filling) for p in range(num_slices)))
    return tuple(found)


def _late_positions(risks: Sequence[float], others: int) -> list[tuple[int, int, int]]:
    """Return (slice, position, order) for the slices that an order other than order 0 puts late."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    num_slices = len(risks)
    last = range(num_slices - -(-num_slices // others), num_slices)  # no slice needs an earlier position
    slots = [(position, order) for position in reversed(last) for order in range(others)]
    slices, positions = np.arange(num_slices), np.array([position for position, _ in slots])
    depth = np.maximum(positions[None, :], slices[:, None])  # order 0: each at its number
    rows, columns = linear_sum_assignment(np.array(risks)[:, None] * depth, maximize=True)
    pairs = ((int(row), *slots[column]) for row, column in zip(rows, columns, strict=True))
    return [each for each in pairs if each[1] > each[0]]


def arranged(slices: Iterable[int], order: Sequence[int]) -> list[int]:
    """Return slices of any generations in an order of one generation's slices, by default ascending."""
    if not order:
        return sorted(slices)
    position = {slice_: at for at, slice_ in enumerate(order)}
    return sorted(slices, key=lambda each: (each // len(order), position[each % len(order)]))
