"""Fake a ledger in memory, which passes the contract suite of the real one.

It keeps everything in `tables`. It has no damage, and no readers beside a writer.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from sisa.core.domain import (
    Export,
    Head,
    HeldCheckpoint,
    Identity,
    IndexFile,
    RecordRow,
    SliceFile,
    Tombstone,
    WitnessHead,
    WorkItem,
)
from sisa.core.event_chain import chained
from sisa.core.patches import Patch, VaultSet
from sisa.core.ports import Change
from sisa.core.requests import Request, RequestEvent


@dataclass
class _Tables:
    seq: int = 0
    meta: dict[str, str] = field(default_factory=dict)
    records: dict[str, RecordRow] = field(default_factory=dict)
    tombstones: dict[str, Tombstone] = field(default_factory=dict)
    slices: dict[tuple[int, int], SliceFile] = field(default_factory=dict)
    indexes: dict[int, IndexFile] = field(default_factory=dict)
    heads: dict[int, Head] = field(default_factory=dict)
    checkpoints: dict[str, HeldCheckpoint] = field(default_factory=dict)
    requests: dict[str, tuple[int, Request]] = field(default_factory=dict)
    named: set[tuple[str, str]] = field(default_factory=set)
    events: list[RequestEvent] = field(default_factory=list)
    exports: dict[tuple[str, str], Export] = field(default_factory=dict)
    patches: dict[str, Patch] = field(default_factory=dict)
    vault: dict[str, VaultSet] = field(default_factory=dict)
    vaulted: set[tuple[str, str]] = field(default_factory=set)
    identities: set[tuple[str, str]] = field(default_factory=set)
    work_items: dict[str, WorkItem] = field(default_factory=dict)


class FakeLedger:
    def __init__(self) -> None:
        self.tables = _Tables()
        self.alone: AbstractContextManager[Any] = threading.RLock()

    read_only = False

    def num_bytes(self) -> int:
        return 0

    def seq(self) -> int:
        return self.tables.seq

    def meta(self) -> dict[str, str]:
        seq = {"seq": str(self.tables.seq)} if self.tables.seq else {}
        return {**self.tables.meta, **seq}

    def commit(self, change: Change) -> int:
        t = self.tables
        t.seq += 1
        for row in change.removed:
            t.records.pop(row.id_digest, None)
        for key in change.dropped:
            t.checkpoints.pop(key, None)
        for shard in change.unindexed:
            t.indexes.pop(shard, None)
        for shard in change.headless:
            t.heads.pop(shard, None)
        for place in change.emptied:
            t.slices.pop(place, None)
        for name in change.unexported:
            t.exports.pop(name, None)
        for set_name in change.unvaulted:
            t.vault.pop(set_name, None)
        t.vaulted = {pair for pair in t.vaulted if pair[0] not in change.unvaulted}
        t.exports.update({each.name: each for each in change.exports})
        t.records.update({row.id_digest: replace(row, seq=t.seq) for row in change.added})
        t.tombstones.update({each.id_digest: each for each in change.tombstones})
        t.slices.update({(each.shard, each.slice): each for each in change.slices})
        t.indexes.update({each.shard: each for each in change.indexes})
        t.heads.update({each.shard: each for each in change.heads})
        t.checkpoints.update({each.key: each for each in change.checkpoints})
        t.patches.update({each.key: each for each in change.patches})
        t.vault.update({each.name: each for each in change.vault})
        t.vaulted |= set(change.vaulted)
        t.identities = {pair for pair in t.identities if pair[1] not in change.unidentified}
        t.identities |= {(each.key, each.id_digest) for each in change.identities}
        t.work_items.update({each.item: each for each in change.work_items})
        t.meta.update(change.meta)
        for request in change.requests:
            first, _ = t.requests.get(request.request_id, (t.seq, request))
            t.requests[request.request_id] = (first, request)
        t.named |= set(change.named)
        for event in change.events:
            link = t.events[-1].link if t.events else ""
            t.events.append(replace(event, link=event.link or chained(link, event)))
        return t.seq

    def exclusive(self) -> AbstractContextManager[None]:
        return self.alone

    def snapshot(self) -> AbstractContextManager[None]:
        return nullcontext()

    def scrub(self, removed: Collection[RecordRow] | None = ()) -> None:
        """Do nothing: memory keeps no removed rows."""

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        found: dict[str, RecordRow | Tombstone] = {}
        for digest in id_digests:
            held = self.tables.records.get(digest) or self.tables.tombstones.get(digest)
            if held is not None:
                found[digest] = held
        return found

    def by_subject(
        self, subject_digest: str, shard: int | None = None
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        t = self.tables
        live = [row for row in t.records.values() if row.subject_digest == subject_digest]
        assert shard is None or {row.shard for row in live} <= {shard}
        dead = [each for each in t.tombstones.values() if each.subject_digest == subject_digest]
        return _ordered(live), sorted(dead, key=lambda each: each.id_digest)

    def num_without_subject(self) -> tuple[int, int]:
        live, dead = self.tables.records.values(), self.tables.tombstones.values()
        return sum(not each.subject_digest for each in live), sum(
            not each.subject_digest for each in dead
        )

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        rows = [row for row in self.tables.records.values() if row.shard == shard]
        return {row.vector_id: row for row in rows if row.vector_id in vector_ids}

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        return _ordered(
            row
            for row in self.tables.records.values()
            if row.shard == shard and slice_ in (None, row.slice)
        )

    def contents(self, shard: int, slice_: int) -> list[tuple[str, str]]:
        return [(row.id_digest, row.record_digest) for row in self.rows(shard, slice_)]

    def counts(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for file in self.tables.slices.values():
            counts[file.shard] = counts.get(file.shard, 0) + file.num_records
        return counts

    def kinds(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for row in self.tables.records.values():
            kinds[row.kind] = kinds.get(row.kind, 0) + 1
        return kinds

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        return [f for _, f in sorted(self.tables.slices.items()) if shard in (None, f.shard)]

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        return [f for _, f in sorted(self.tables.indexes.items()) if shard in (None, f.shard)]

    def heads(self) -> list[Head]:
        return [head for _, head in sorted(self.tables.heads.items())]

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        held = [each for each in self.tables.checkpoints.values() if shard in (None, each.shard)]
        return sorted(held, key=lambda each: each.sort_key)

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        del full_scan  # memory loses no rows
        t = self.tables
        live = [row for row in t.records.values() if row.text_digest in text_digests]
        dead = [each for each in t.tombstones.values() if each.text_digest in text_digests]
        return _ordered(live), sorted(dead, key=lambda each: each.id_digest)

    def named_by(self, request_id: str) -> list[str]:
        return sorted(record for request, record in self.tables.named if request == request_id)

    def events(self, after: int = 0) -> list[RequestEvent]:
        return self.tables.events[after:]

    def events_of(self, request_id: str) -> list[RequestEvent]:
        return [each for each in self.tables.events if each.request_id == request_id]

    def identities(
        self, *, keys: Collection[str] | None = None, id_digests: Collection[str] | None = None
    ) -> list[Identity]:
        found = [Identity(*pair) for pair in sorted(self.tables.identities)]
        if keys is not None:
            return [each for each in found if each.key in keys]
        return [each for each in found if id_digests is None or each.id_digest in id_digests]

    def work_items(self, keys: Collection[str] | None = None) -> list[WorkItem]:
        found = [each for _, each in sorted(self.tables.work_items.items())]
        return [each for each in found if keys is None or each.key in keys]

    def requests(self) -> list[Request]:
        found = sorted(self.tables.requests.values(), key=lambda each: (each[0], each[1].request_id))
        return [request for _, request in found]

    def exports(self) -> list[Export]:
        return [each for _, each in sorted(self.tables.exports.items())]

    def patches(self) -> list[Patch]:
        return sorted(self.tables.patches.values(), key=lambda each: each.version)

    def vault(self) -> list[VaultSet]:
        return [each for _, each in sorted(self.tables.vault.items())]

    def vaulted(self, name: str) -> list[str]:
        return sorted(each for where, each in self.tables.vaulted if where == name)

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, each in sorted(self.tables.vaulted):
            if each in id_digests:
                found.setdefault(each, []).append(name)
        return found

    def num_tombstones(self) -> int:
        return len(self.tables.tombstones)

    def tombstones(self) -> list[Tombstone]:
        return [each for _, each in sorted(self.tables.tombstones.items())]

    def event_head(self) -> WitnessHead:
        events = self.tables.events
        return WitnessHead(events[-1].link if events else "", len(events))

    def has_event(self, link: str) -> bool:
        return any(event.link == link for event in self.tables.events)

    def lost(self) -> list[str]:
        return []


def _ordered(rows: Iterable[RecordRow]) -> list[RecordRow]:
    return sorted(rows, key=lambda row: row.id_digest)
