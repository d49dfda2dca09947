"""Restrict a ledger to some shards, for a caller who may read only those.

`GroupLedger` hides records, requests, heads and exports of other shards. Code that reads a ledger
(routing, `find`, `where`, requests) is restricted by reading through it: it neither opens nor names a
file of another shard. A request is visible if all records that it names are.

    group = replace(context, stores=replace(context.stores, ledger=GroupLedger(ledger, {0, 3})))
    routes_of(group, ["Who is Mara?"])  # asks the indexes of shards 0 and 3 alone

What concerns the whole model stays visible: its settings, its patches, the number of its last commit and
the chain of events. External ids are unique in the whole model, so a commit that would reuse one is
refused, even if the caller can't see the other request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

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
from sisa.core.errors import ConfigConflict
from sisa.core.patches import Patch, VaultSet
from sisa.core.ports import Change, Ledger
from sisa.core.requests import Request, RequestEvent

_Placed = TypeVar("_Placed", RecordRow, Tombstone, SliceFile, IndexFile, Head, HeldCheckpoint, Export)


class GroupLedger:
    """A Ledger of some shards of another one."""

    def __init__(self, whole: Ledger, shards: Collection[int]) -> None:
        self._whole, self._shards = whole, frozenset(shards)

    def _seen(self, found: Iterable[_Placed]) -> list[_Placed]:
        return [each for each in found if each.shard in self._shards]

    def seq(self) -> int:
        return self._whole.seq()

    @property
    def read_only(self) -> bool:
        return self._whole.read_only

    def num_bytes(self) -> int:
        return self._whole.num_bytes()

    def meta(self) -> dict[str, str]:
        return self._whole.meta()

    def commit(self, change: Change) -> int:
        names = {each.external_id: each.request_id for each in change.requests if each.external_id}
        for each in self._whole.requests():
            if names.get(each.external_id or "", each.request_id) != each.request_id:
                raise ConfigConflict(
                    "this external id already stands for another request",
                    next_step="give the new request an external id of its own",
                )
        return self._whole.commit(change)

    def exclusive(self) -> AbstractContextManager[None]:
        return self._whole.exclusive()

    def snapshot(self) -> AbstractContextManager[None]:
        return self._whole.snapshot()

    def scrub(self, removed: Collection[RecordRow] | None = ()) -> None:
        self._whole.scrub(removed)

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        found = self._whole.lookup(id_digests)
        return {key: each for key, each in found.items() if each.shard in self._shards}

    def by_subject(
        self, subject_digest: str, shard: int | None = None
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        held, deleted = self._whole.by_subject(subject_digest, shard)
        return self._seen(held), self._seen(deleted)

    def num_without_subject(self) -> tuple[int, int]:
        held = [row for shard in sorted(self._shards) for row in self._whole.rows(shard)]
        gone = self.tombstones()
        return (
            sum(each.subject_digest is None for each in held),
            sum(each.subject_digest is None for each in gone),
        )

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        return self._whole.by_vector(shard, vector_ids) if shard in self._shards else {}

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        return self._whole.rows(shard, slice_) if shard in self._shards else []

    def contents(self, shard: int, slice_: int) -> list[tuple[str, str]]:
        return self._whole.contents(shard, slice_) if shard in self._shards else []

    def counts(self) -> dict[int, int]:
        return {shard: count for shard, count in self._whole.counts().items() if shard in self._shards}

    def kinds(self) -> dict[str, int]:
        return self._whole.kinds()  # the form of prompts is one for the whole model

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        return self._seen(self._whole.slices(shard))

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        return self._seen(self._whole.indexes(shard))

    def heads(self) -> list[Head]:
        return self._seen(self._whole.heads())

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        return self._seen(self._whole.checkpoints(shard))

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        held, deleted = self._whole.by_text(text_digests, full_scan=full_scan)
        return self._seen(held), self._seen(deleted)

    def identities(
        self, *, keys: Collection[str] | None = None, id_digests: Collection[str] | None = None
    ) -> list[Identity]:
        found = self._whole.identities(keys=keys, id_digests=id_digests)
        seen = {*self._known([each.id_digest for each in found])}
        return [each for each in found if each.id_digest in seen]

    def work_items(self, keys: Collection[str] | None = None) -> list[WorkItem]:  # noqa: ARG002
        return []  # DROP's lists are of the whole model

    def requests(self) -> list[Request]:
        return [each for each in self._whole.requests() if self._sees(each.request_id)]

    def _sees(self, request_id: str) -> bool:
        named = self._whole.named_by(request_id)
        return bool(named) and self.lookup(named).keys() == set(named)

    def named_by(self, request_id: str) -> list[str]:
        return self._whole.named_by(request_id) if self._sees(request_id) else []

    def events(self, after: int = 0) -> list[RequestEvent]:
        seen = {each.request_id for each in self.requests()}
        return [each for each in self._whole.events(after) if each.request_id in seen]

    def events_of(self, request_id: str) -> list[RequestEvent]:
        return self._whole.events_of(request_id) if self._sees(request_id) else []

    def exports(self) -> list[Export]:
        return self._seen(self._whole.exports())

    def patches(self) -> list[Patch]:
        return self._whole.patches()

    def vault(self) -> list[VaultSet]:
        return self._whole.vault()

    def vaulted(self, name: str) -> list[str]:
        return self._known(self._whole.vaulted(name))

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        return self._whole.sets_with(self._known(id_digests))

    def _known(self, id_digests: Collection[str]) -> list[str]:
        seen = self.lookup(id_digests)
        return [each for each in id_digests if each in seen]

    def num_tombstones(self) -> int:
        return len(self.tombstones())

    def tombstones(self) -> list[Tombstone]:
        return self._seen(self._whole.tombstones())

    def event_head(self) -> WitnessHead:
        return self._whole.event_head()

    def has_event(self, link: str) -> bool:
        return self._whole.has_event(link)

    def lost(self) -> list[str]:
        return self._whole.lost()
