"""The ledger in SQLite, the only authority on where records are.

One `commit` is one transaction with one sequence number. Rows hold keyed digests, positions, counts and
digests of files; never an id, a subject or text. The absence of a row is confirmed without an index.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from sisa.core.domain import (
    Export,
    Head,
    HeldCheckpoint,
    IndexFile,
    Probed,
    RecordRow,
    Request,
    RequestEvent,
    SliceFile,
    Tombstone,
    WitnessHead,
)
from sisa.core.patch import Patch, VaultSet, parse_patch_job
from sisa.core.ports import Change
from sisa.planning.assign import root_of
from sisa.store.ledger import changes, rows
from sisa.store.ledger.database import Database, having, made
from sisa.store.ledger.schema import (
    CHECKPOINTS,
    EVENTS,
    EXPORTS,
    HEADS,
    INDEXES,
    META,
    NAMED,
    PATCHES,
    RECORDS,
    REQUESTS,
    SLICES,
    TOMBSTONES,
    VAULT,
    VAULTED,
)


@dataclass(frozen=True, slots=True)
class _Vaulted:
    name: str
    id_digest: str


class SqlLedger(Database):
    """A Ledger in one SQLite file. With `create=False`, a missing file is an IntegrityError."""

    def seq(self) -> int:
        return int(self.meta().get(rows.SEQ, "0"))

    def meta(self) -> dict[str, str]:
        with self._reading() as connection:
            found = rows.read(connection, META)
            rows.check_row_count(META, rows.expected_rows(connection, META), len(found))
        return {key: value for key, value, _ in found}

    def commit(self, change: Change) -> int:
        with self._guard(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            seq = changes.apply(connection, change)
            connection.commit()
        return seq

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        asked = list(dict.fromkeys(id_digests))
        with self._reading() as connection:
            live = having(connection, RecordRow, RECORDS.c.id_digest, asked)
            found: dict[str, RecordRow | Tombstone] = {each.id_digest: each for each in live}
            asked = [each for each in asked if each not in found]
            rows.check_hidden(connection, RECORDS.c.id_digest, asked, 0)
            dead = having(connection, Tombstone, TOMBSTONES.c.id_digest, asked)
            found |= {each.id_digest: each for each in dead}
            asked = [each for each in asked if each not in found]
            rows.check_hidden(connection, TOMBSTONES.c.id_digest, asked, 0)
        return found

    def by_subject(self, subject_digest: str, shard: int) -> tuple[list[RecordRow], list[Tombstone]]:
        held, gone, asked = RECORDS.c.subject_digest, TOMBSTONES.c.subject_digest, [subject_digest]
        with self._reading() as connection:
            live = having(connection, RecordRow, held, asked)
            rows.check_hidden(connection, held, asked, len(live), shard=shard)
            dead = having(connection, Tombstone, gone, asked, full_scan=True)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def num_without_subject(self) -> tuple[int, int]:
        found = []
        with self._reading() as connection:
            for table in (RECORDS, TOMBSTONES):
                query = sa.select(sa.func.count()).where(table.c.subject_digest.is_(None))
                found.append(connection.execute(query).scalar_one())
        return found[0], found[1]

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        found: dict[int, RecordRow] = {}
        for chunk in rows.chunks(list(vector_ids)):
            here = (RECORDS.c.shard == shard, RECORDS.c.vector_id.in_(chunk))
            found.update({each.vector_id: each for each in self._some(RecordRow, RECORDS, *here)})
        missing = set(vector_ids) - found.keys()
        if missing and any(row.vector_id in missing for row in self.rows(shard)):
            raise self._corrupt("a record that is not found by its vector")
        return found

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        where = [RECORDS.c.shard == shard]
        where += [] if slice_ is None else [RECORDS.c.slice == slice_]
        with self._reading() as connection:
            found = rows.read(connection, RECORDS, *where, order=[RECORDS.c.id_digest])
            expected = rows.expected_in_shard(connection, RECORDS, shard, slice_)
            rows.check_row_count(RECORDS, expected, len(found))
        return made(RecordRow, RECORDS, found)

    def contents(self, shard: int, slice_: int) -> list[tuple[str, str]]:
        with self._reading() as connection:
            found = rows.contents(connection, shard, slice_)
            here = (SLICES.c.shard == shard, SLICES.c.slice == slice_)
            files = made(SliceFile, SLICES, rows.read(connection, SLICES, *here))
        expected = [each.root for each in files]
        if expected != ([root_of(found)] if found else []):
            raise self._corrupt("records that do not match the root of their slice")
        return found

    def counts(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for file in self.slices():
            found[file.shard] = found.get(file.shard, 0) + file.num_records
        return found

    def kinds(self) -> dict[str, int]:
        with self._reading() as connection:
            return {kind: count for kind, count in rows.expected_kinds(connection).items() if count}

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        return self._whole(SliceFile, SLICES, shard, SLICES.c.shard, SLICES.c.slice)

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        return self._whole(IndexFile, INDEXES, shard, INDEXES.c.shard)

    def heads(self) -> list[Head]:
        return self._whole(Head, HEADS, None, HEADS.c.shard)

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        found: list[Any] = self._whole(HeldCheckpoint, CHECKPOINTS, shard)
        with self._parsing("a checkpoint"):
            held = [replace(each, prefix=_slices(each.prefix)) for each in found]
        return sorted(held, key=attrgetter("sort_key"))

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        asked = sorted(text_digests)
        with self._reading() as connection:
            live = having(connection, RecordRow, RECORDS.c.text_digest, asked, full_scan=full_scan)
            dead = having(connection, Tombstone, TOMBSTONES.c.text_digest, asked, full_scan=full_scan)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def named_by(self, request_id: str) -> list[str]:
        with self._reading() as connection:
            found = rows.read(connection, NAMED, NAMED.c.request_id == request_id)
            request = rows.read(connection, REQUESTS, REQUESTS.c.request_id == request_id)
            for _, _, num_named, _, _ in request:
                rows.check_row_count(NAMED, num_named, len(found))
        return sorted(id_digest for _, id_digest, _ in found)

    def events(self, after: int = 0) -> list[RequestEvent]:
        with self._reading() as connection:
            found = rows.read(connection, EVENTS, EVENTS.c.position > after, order=[EVENTS.c.position])
            rows.check_row_count(EVENTS, rows.expected_rows(connection, EVENTS), after + len(found))
        return made(RequestEvent, EVENTS, found)

    def exports(self) -> list[Export]:
        found: list[Any] = self._whole(Export, EXPORTS, None, EXPORTS.c.path, EXPORTS.c.key)
        with self._parsing("an export"):
            return [
                replace(each, patches=tuple(json.loads(each.patches)), prefix=_slices(each.prefix))
                for each in found
            ]

    def requests(self) -> list[Request]:
        order = (REQUESTS.c.seq, REQUESTS.c.request_id)
        with self._reading() as connection:
            found = rows.read(connection, REQUESTS, order=order)
            rows.check_row_count(REQUESTS, rows.expected_rows(connection, REQUESTS), len(found))
        with self._parsing("a request"):
            return [_request(body) for _, _, _, body, _ in found]

    def num_tombstones(self) -> int:
        with self._reading() as connection:
            found = rows.actual_rows(connection, TOMBSTONES)
            rows.check_row_count(TOMBSTONES, rows.expected_rows(connection, TOMBSTONES), found)
        return found

    def tombstones(self) -> list[Tombstone]:
        return self._whole(Tombstone, TOMBSTONES, None, TOMBSTONES.c.id_digest)

    def event_head(self) -> WitnessHead:
        latest = sa.select(sa.func.max(EVENTS.c.position)).scalar_subquery()
        with self._reading() as connection:
            found = rows.read(connection, EVENTS, EVENTS.c.position == latest)
            position, link = (found[0][0], found[0][-2]) if found else (0, "")
            rows.check_row_count(EVENTS, rows.expected_rows(connection, EVENTS), position)
        return WitnessHead(link, position)

    def has_event(self, link: str) -> bool:
        with self._reading() as connection:
            return bool(rows.read(connection, EVENTS, EVENTS.c.link == link))

    def lost(self) -> list[str]:
        with self._reading() as connection:
            return rows.lost_rows(connection)

    def patches(self) -> list[Patch]:
        found = self._whole(Patch, PATCHES, None, PATCHES.c.version)
        with self._parsing("a patch"):
            return [_patch(each) for each in found]

    def vault(self) -> list[VaultSet]:
        found = self._whole(VaultSet, VAULT, None, VAULT.c.name)
        return [replace(each, held=bool(each.held)) for each in found]

    def vaulted(self, name: str) -> list[str]:
        with self._reading() as connection:  # from all rows: no damaged index hides a set
            found = having(connection, _Vaulted, VAULTED.c.name, [name], full_scan=True)
        return sorted(each.id_digest for each in found)

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        named: dict[str, list[str]] = {}
        with self._reading() as connection:
            found = having(connection, _Vaulted, VAULTED.c.id_digest, sorted(id_digests), full_scan=True)
        for each in sorted(found, key=lambda row: row.name):
            named.setdefault(each.id_digest, []).append(each.name)
        return named


_BY_ID = attrgetter("id_digest")


def _slices(text: str) -> tuple[int, ...]:
    return tuple(map(int, json.loads(text)))


@lru_cache(maxsize=1 << 15)  # a flow asks for all requests several times, and few of them change
def _request(text: str) -> Request:
    body = json.loads(text)
    lists = {name: tuple(tuple(each) for each in body[name]) for name in ("shards", "served")}
    probed = body.get("probed")
    return Request(**{**body, **lists, "probed": Probed(**probed) if probed else None})


def _patch(row: Patch) -> Patch:
    """Return a patch whose job and report are still JSON."""
    raw: Any = row
    return replace(row, job=parse_patch_job(json.loads(raw.job)), report=json.loads(raw.report))
