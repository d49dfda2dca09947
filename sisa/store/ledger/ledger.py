"""The ledger in SQLite, the only authority on where records are.

One `commit` is one transaction with one sequence number. Rows hold keyed digests, positions, counts and
digests of files; never an id, a subject or text. The absence of a row is confirmed without an index.

A `Change` is what one transaction removes, replaces and adds. Removals come before additions, so that a
row can move in one change. Added records get the transaction's
number. Events without a link are chained to the last one, without a key. A request keeps the number of
its first commit, and how many records it names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from sisa.core.domain import (
    Export,
    Head,
    HeldCheckpoint,
    IndexFile,
    Patch,
    Probed,
    RecordRow,
    Request,
    RequestEvent,
    SliceFile,
    Tombstone,
    VaultSet,
    WitnessHead,
    parse_patch_job,
)
from sisa.core.ports import Change
from sisa.core.requests import chained
from sisa.planning.layout import root_of
from sisa.store.ledger import rows
from sisa.store.ledger.database import Database, having, made
from sisa.store.ledger.rows import (
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
    SEQ,
    SLICES,
    TOMBSTONES,
    VAULT,
    VAULTED,
    Writing,
    check_row_count,
    expected_rows,
    read,
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
            seq = apply(connection, change)
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


def apply(connection: sa.Connection, change: Change) -> int:
    """Write a change, and return the number of its transaction. Raise rows.Damaged."""
    before = read(connection, META, META.c.key == SEQ)
    seq = int(before[0][1]) + 1 if before else 1
    writing = Writing(connection)
    _remove(writing, change)
    writing.insert(RECORDS, [{**asdict(row), "seq": seq} for row in change.added])
    for table, values in (
        (TOMBSTONES, change.tombstones),
        (SLICES, change.slices),
        (INDEXES, change.indexes),
        (HEADS, change.heads),
    ):
        writing.put(table, [asdict(each) for each in values])
    checkpoints = [{**asdict(each), "prefix": json.dumps(each.prefix)} for each in change.checkpoints]
    writing.put(CHECKPOINTS, checkpoints)
    writing.put(VAULT, [{**asdict(each), "held": int(each.held)} for each in change.vault])
    writing.put(EXPORTS, [_export_row(each) for each in change.exports])
    writing.put(PATCHES, [_patch_row(each) for each in change.patches])
    writing.put(VAULTED, [{"name": name, "id_digest": each} for name, each in change.vaulted])
    meta = {**change.meta, SEQ: str(seq)}
    writing.put(META, [{"key": key, "value": value} for key, value in meta.items()])
    _put_requests(writing, change, seq)
    _append_events(writing, change.events)
    writing.end()
    writing.end_keyed(seq)
    return seq


def _export_row(export: Export) -> dict[str, Any]:
    lists = {"patches": json.dumps(export.patches), "prefix": json.dumps(export.prefix)}
    return asdict(export) | lists


def _patch_row(patch: Patch) -> dict[str, Any]:
    """Return a patch as a row."""
    row = {**asdict(patch), "key": patch.key}
    return row | {name: json.dumps(row[name], sort_keys=True) for name in ("job", "report")}


def _remove(writing: Writing, change: Change) -> None:
    writing.remove(RECORDS, [(each.id_digest,) for each in change.removed])
    writing.remove(CHECKPOINTS, [(key,) for key in change.dropped])
    writing.remove(INDEXES, [(shard,) for shard in change.unindexed])
    writing.remove(HEADS, [(shard,) for shard in change.headless])
    writing.remove(EXPORTS, list(change.unexported))
    writing.remove(SLICES, list(change.emptied))
    _remove_sets(writing, change.unvaulted)


def _remove_sets(writing: Writing, names: Collection[str]) -> None:
    """Remove sets of the vault, with the rows of their records, which are found without an index."""
    if names:
        pairs = read(writing.connection, VAULTED)
        check_row_count(VAULTED, expected_rows(writing.connection, VAULTED), len(pairs))
        writing.remove(VAULTED, [(name, each) for name, each, _ in pairs if name in set(names)])
        writing.remove(VAULT, [(name,) for name in names])


def _put_requests(writing: Writing, change: Change, seq: int) -> None:
    arriving: dict[str, list[str]] = {}
    for request_id, record in change.named:
        arriving.setdefault(request_id, []).append(record)
    requests: dict[str, Request | None] = dict.fromkeys(arriving)
    requests |= {request.request_id: request for request in change.requests}
    for request_id, request in requests.items():
        known = read(writing.connection, REQUESTS, REQUESTS.c.request_id == request_id)
        named = {row[1] for row in read(writing.connection, NAMED, NAMED.c.request_id == request_id)}
        _, first, num_named, body, _ = known[0] if known else (request_id, seq, len(named), "", 0)
        check_row_count(NAMED, num_named, len(named))
        named |= set(arriving.get(request_id, ()))
        rows = [{"request_id": request_id, "id_digest": each} for each in arriving.get(request_id, ())]
        writing.put(NAMED, rows)
        if request is not None:
            body = json.dumps(asdict(request), sort_keys=True)
        if body:
            row = {"request_id": request_id, SEQ: first, "num_named": len(named), "body": body}
            writing.put(REQUESTS, [row])


def _append_events(writing: Writing, events: Sequence[RequestEvent]) -> None:
    latest = sa.select(sa.func.max(EVENTS.c.position)).scalar_subquery()
    last = read(writing.connection, EVENTS, EVENTS.c.position == latest)
    position, link = (last[0][0], last[0][-2]) if last else (0, "")
    rows = []
    for event in events:
        position, link = position + 1, event.link or chained(link, event)
        rows.append({**asdict(event), "position": position, "link": link})
    writing.insert(EVENTS, rows)
