"""The ledger in SQL, the only authority on where records are.

One `commit` is one transaction with one sequence number: a `Change`, whose removals come before its
additions, so that a row can move in it. Added records get the transaction's number. Events without a
link are chained to the last one, without a key. A request keeps the number of its first commit, and how
many records it names. The absence of a row is confirmed without an index.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

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
from sisa.core.requests import Probed, Request, RequestEvent
from sisa.planning.layout import root_of
from sisa.store.ledger import rows
from sisa.store.ledger.database import Database, as_objects, ledger_version, rows_having
from sisa.store.ledger.rows import SEQ, Writing
from sisa.store.ledger.tables import (
    CHECKPOINTS_TABLE,
    EVENTS_TABLE,
    EXPORTS_TABLE,
    HEADS_TABLE,
    IDENTITIES_TABLE,
    INDEXES_TABLE,
    META_TABLE,
    NAMED_TABLE,
    PATCHES_TABLE,
    RECORDS_TABLE,
    REQUESTS_TABLE,
    SLICES_TABLE,
    TOMBSTONES_TABLE,
    VAULT_TABLE,
    VAULTED_TABLE,
    WORK_ITEMS_TABLE,
    schema,
)


@dataclass(frozen=True, slots=True)
class _Vaulted:
    name: str
    id_digest: str


class SqlLedger(Database):
    """A Ledger in SQL. With `create=False`, a missing one is an IntegrityError."""

    def seq(self) -> int:
        return int(self.meta().get(SEQ, "0"))

    def meta(self) -> dict[str, str]:
        with self._reading() as connection:
            return {key: value for key, value, _ in rows.read_all(connection, META_TABLE)}

    def commit(self, change: Change) -> int:
        with self._guard(), self.backend.writing(len(change.added)) as connection:
            seq, unidentified = _apply(connection, change)
        self.unscrubbed |= unidentified
        return seq

    def lookup(self, id_digests: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        wanted = list(dict.fromkeys(id_digests))
        found: dict[str, RecordRow | Tombstone] = {}
        kinds: list[tuple[Any, sa.Table]] = [(RecordRow, RECORDS_TABLE), (Tombstone, TOMBSTONES_TABLE)]
        with self._reading() as connection:
            for kind, table in kinds:
                here = rows_having(connection, kind, table.c.id_digest, wanted)
                found |= {each.id_digest: each for each in here}
                wanted = [each for each in wanted if each not in found]
                rows.check_hidden(connection, table.c.id_digest, wanted, 0)
        return found

    def by_subject(
        self, subject_digest: str, shard: int | None = None
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        held, gone = RECORDS_TABLE.c.subject_digest, TOMBSTONES_TABLE.c.subject_digest
        wanted = [subject_digest]
        with self._reading() as connection:
            live = rows_having(connection, RecordRow, held, wanted)
            rows.check_hidden(connection, held, wanted, len(live), shard=shard)
            dead = rows_having(connection, Tombstone, gone, wanted, full_scan=True)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def num_without_subject(self) -> tuple[int, int]:
        found = []
        with self._reading() as connection:
            for table in (RECORDS_TABLE, TOMBSTONES_TABLE):
                query = sa.select(sa.func.count()).where(table.c.subject_digest.is_(None))
                found.append(connection.execute(query).scalar_one())
        return found[0], found[1]

    def by_vector(self, shard: int, vector_ids: Collection[int]) -> dict[int, RecordRow]:
        found: dict[int, RecordRow] = {}
        with self._reading() as connection:
            for chunk in rows.chunks(list(vector_ids)):
                here = (RECORDS_TABLE.c.shard == shard, RECORDS_TABLE.c.vector_id.in_(chunk))
                held = as_objects(RecordRow, RECORDS_TABLE, rows.read(connection, RECORDS_TABLE, *here))
                found |= {each.vector_id: each for each in held}
            missing = set(vector_ids) - found.keys()
            every = rows.read_all(connection, RECORDS_TABLE, shard) if missing else []
            if any(row.vector_id in missing for row in as_objects(RecordRow, RECORDS_TABLE, every)):
                raise rows.Damaged("a record that is not found by its vector")
        return found

    def rows(self, shard: int, slice_: int | None = None) -> list[RecordRow]:
        return self._all(RecordRow, RECORDS_TABLE, RECORDS_TABLE.c.id_digest, shard=shard, slice_=slice_)

    def contents(self, shard: int, slice_: int) -> list[tuple[str, str]]:
        with self._reading() as connection:
            found = rows.contents(connection, shard, slice_)
            here = (SLICES_TABLE.c.shard == shard, SLICES_TABLE.c.slice == slice_)
            files = as_objects(SliceFile, SLICES_TABLE, rows.read(connection, SLICES_TABLE, *here))
            if [each.root for each in files] != ([root_of(found)] if found else []):
                raise rows.Damaged("records that do not match the root of their slice")
        return found

    def counts(self) -> dict[int, int]:
        found = Counter[int]()
        for file in self.slices():
            found[file.shard] += file.num_records
        return dict(found)

    def kinds(self) -> dict[str, int]:
        with self._reading() as connection:
            return {kind: count for kind, count in rows.expected_kinds(connection).items() if count}

    def slices(self, shard: int | None = None) -> list[SliceFile]:
        return self._all(
            SliceFile, SLICES_TABLE, SLICES_TABLE.c.shard, SLICES_TABLE.c.slice, shard=shard
        )

    def indexes(self, shard: int | None = None) -> list[IndexFile]:
        return self._all(IndexFile, INDEXES_TABLE, INDEXES_TABLE.c.shard, shard=shard)

    def heads(self) -> list[Head]:
        return self._all(Head, HEADS_TABLE, HEADS_TABLE.c.shard)

    def checkpoints(self, shard: int | None = None) -> list[HeldCheckpoint]:
        return sorted(
            self._all(HeldCheckpoint, CHECKPOINTS_TABLE, shard=shard), key=attrgetter("sort_key")
        )

    def by_text(
        self, text_digests: Collection[str], *, full_scan: bool = False
    ) -> tuple[list[RecordRow], list[Tombstone]]:
        wanted = sorted(text_digests)
        with self._reading() as connection:
            held, gone = RECORDS_TABLE.c.text_digest, TOMBSTONES_TABLE.c.text_digest
            live = rows_having(connection, RecordRow, held, wanted, full_scan=full_scan)
            dead = rows_having(connection, Tombstone, gone, wanted, full_scan=full_scan)
        return sorted(live, key=_BY_ID), sorted(dead, key=_BY_ID)

    def named_by(self, request_id: str) -> list[str]:
        with self._reading() as connection:
            found = rows.read(connection, NAMED_TABLE, NAMED_TABLE.c.request_id == request_id)
            request = rows.read(connection, REQUESTS_TABLE, REQUESTS_TABLE.c.request_id == request_id)
            for _, _, num_named, _, _ in request:
                rows.check_row_count(NAMED_TABLE, num_named, len(found))
        return sorted(id_digest for _, id_digest, _ in found)

    def events(self, after: int = 0) -> list[RequestEvent]:
        with self._reading() as connection:
            found = rows.read(
                connection,
                EVENTS_TABLE,
                EVENTS_TABLE.c.position > after,
                order=[EVENTS_TABLE.c.position],
            )
            rows.check_complete(connection, EVENTS_TABLE, after + len(found))
        return as_objects(RequestEvent, EVENTS_TABLE, found)

    def events_of(self, request_id: str) -> list[RequestEvent]:
        column, known = EVENTS_TABLE.c.request_id, sa.select(REQUESTS_TABLE.c.request_id)
        here = column.in_([request_id]) | column.not_in(known)  # an event that lost its request's name
        with self._reading() as connection:
            found = rows.read(connection, EVENTS_TABLE, here, order=[EVENTS_TABLE.c.position])
            rows.check_complete(connection, EVENTS_TABLE, rows.actual_rows(connection, EVENTS_TABLE))
        events = as_objects(RequestEvent, EVENTS_TABLE, found)
        return [each for each in events if each.request_id == request_id]

    def exports(self) -> list[Export]:
        return self._all(Export, EXPORTS_TABLE, EXPORTS_TABLE.c.path, EXPORTS_TABLE.c.key)

    def identities(
        self, *, keys: Collection[str] | None = None, id_digests: Collection[str] | None = None
    ) -> list[Identity]:
        with self._reading() as connection:
            if keys is not None:
                wanted = sorted(keys)
                found = rows_having(connection, Identity, IDENTITIES_TABLE.c.key, wanted, full_scan=True)
            elif id_digests is not None:
                found = _identities_of(connection, id_digests)
            else:
                every = rows.read_all(connection, IDENTITIES_TABLE)
                found = as_objects(Identity, IDENTITIES_TABLE, every)
        return sorted(found, key=attrgetter("key", "id_digest"))

    def work_items(self, keys: Collection[str] | None = None) -> list[WorkItem]:
        if keys is None:
            return self._all(WorkItem, WORK_ITEMS_TABLE, WORK_ITEMS_TABLE.c.item)
        with self._reading() as connection:
            found = rows_having(
                connection, WorkItem, WORK_ITEMS_TABLE.c.key, sorted(keys), full_scan=True
            )
        return sorted(found, key=attrgetter("item"))

    def requests(self) -> list[Request]:
        order = (REQUESTS_TABLE.c.seq, REQUESTS_TABLE.c.request_id)
        with self._reading() as connection:
            return [
                _request(body)
                for _, _, _, body, _ in rows.read_all(connection, REQUESTS_TABLE, order=order)
            ]

    def num_tombstones(self) -> int:
        with self._reading() as connection:
            found = rows.actual_rows(connection, TOMBSTONES_TABLE)
            rows.check_complete(connection, TOMBSTONES_TABLE, found)
        return found

    def tombstones(self) -> list[Tombstone]:
        return self._all(Tombstone, TOMBSTONES_TABLE, TOMBSTONES_TABLE.c.id_digest)

    def event_head(self) -> WitnessHead:
        with self._reading() as connection:
            position, link = _last_event(connection)
            rows.check_complete(connection, EVENTS_TABLE, position)
        return WitnessHead(link, position)

    def has_event(self, link: str) -> bool:
        with self._reading() as connection:
            return bool(rows.read(connection, EVENTS_TABLE, EVENTS_TABLE.c.link == link))

    def copy(self, source: SqlLedger) -> dict[str, int]:
        """Replace all rows by another ledger's, compare them, and return their numbers by table.

        It is one transaction. Raise IntegrityError for damage in either.
        """
        with self._guard(), source._reading() as theirs, self.backend.writing() as own:
            return rows.copy_rows(theirs, own)

    def newest_time(self) -> str:
        """Return the latest time in any row; "" if there is none."""
        columns = [each for table in rows.COUNTED for each in table.columns]
        times = [each for each in columns if each.name == "at" or each.name.endswith("_at")]
        with self._reading() as connection:
            found = [connection.execute(sa.select(sa.func.max(each))).scalar_one() for each in times]
        return max((str(each) for each in found if each), default="")

    def values(self) -> Iterator[tuple[str, str]]:
        """Yield each text of each row, with the name of its table."""
        with self._reading() as connection:
            for table in rows.COUNTED:
                for row in rows.read(connection, table):
                    yield from ((table.name, each) for each in row if isinstance(each, str))

    def lost(self) -> list[str]:
        with self._reading() as connection:
            return rows.lost_rows(connection)

    def patches(self) -> list[Patch]:
        return self._all(Patch, PATCHES_TABLE, PATCHES_TABLE.c.version)

    def vault(self) -> list[VaultSet]:
        return self._all(VaultSet, VAULT_TABLE, VAULT_TABLE.c.name)

    def vaulted(self, name: str) -> list[str]:
        with self._reading() as connection:  # from all rows: no damaged index hides a set
            found = rows_having(connection, _Vaulted, VAULTED_TABLE.c.name, [name], full_scan=True)
        return sorted(each.id_digest for each in found)

    def sets_with(self, id_digests: Collection[str]) -> dict[str, list[str]]:
        sets: dict[str, list[str]] = {}
        wanted = sorted(id_digests)
        with self._reading() as connection:
            found = rows_having(connection, _Vaulted, VAULTED_TABLE.c.id_digest, wanted, full_scan=True)
        for each in sorted(found, key=lambda row: row.name):
            sets.setdefault(each.id_digest, []).append(each.name)
        return sets


def erase_ledger(url: str, model: str) -> None:
    """Erase all tables of a model's ledger on a server, or of an empty one; spare another model's."""
    if ledger_version(url) == 0:
        return
    with contextlib.closing(SqlLedger(url)) as ledger:
        if ledger.meta().get("model", model) == model:
            with ledger._guard(), ledger.backend.writing() as connection:
                schema.drop_all(connection)
                connection.exec_driver_sql("DROP TABLE IF EXISTS alembic_version")


_BY_ID = attrgetter("id_digest")
_RECORD = attrgetter(*RECORDS_TABLE.columns.keys()[:-2])  # without `seq` and `crc`


@lru_cache(maxsize=1 << 15)  # a flow asks for all requests several times, and few of them change
def _request(text: str) -> Request:
    """Return the request of a row's JSON. Raise Damaged."""
    try:
        body = json.loads(text)
        lists = {name: tuple(tuple(each) for each in body[name]) for name in ("shards", "served")}
        probed = body.get("probed")
        return Request(**{**body, **lists, "probed": Probed(**probed) if probed else None})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise rows.Damaged("a request that can't be read") from error


def _as_row(table: sa.Table, held: Any) -> dict[str, Any]:
    """Return an object as a row: lists, mappings and jobs become JSON, and booleans numbers."""
    values = {name: getattr(held, name) for name in table.columns.keys()[:-1]}
    for name, value in values.items():
        if isinstance(value, bool):
            values[name] = int(value)
        elif not isinstance(value, str | int | float | None):
            values[name] = json.dumps(value, default=asdict, sort_keys=True)
    return values


def _apply(connection: sa.Connection, change: Change) -> tuple[int, set[str]]:
    """Write a change; return its transaction's number, and the keys of the identities that it removed.

    Raise rows.Damaged.
    """
    before = rows.read(connection, META_TABLE, META_TABLE.c.key == SEQ)
    seq = int(before[0][1]) + 1 if before else 1
    writing = Writing(connection)
    unidentified = _remove(writing, change)
    writing.insert_values(RECORDS_TABLE, [(*_RECORD(row), seq) for row in change.added])
    for table, values in (
        (TOMBSTONES_TABLE, change.tombstones),
        (SLICES_TABLE, change.slices),
        (INDEXES_TABLE, change.indexes),
        (HEADS_TABLE, change.heads),
        (CHECKPOINTS_TABLE, change.checkpoints),
        (VAULT_TABLE, change.vault),
        (EXPORTS_TABLE, change.exports),
        (PATCHES_TABLE, change.patches),
        (IDENTITIES_TABLE, change.identities),
        (WORK_ITEMS_TABLE, change.work_items),
    ):
        writing.put(table, [_as_row(table, each) for each in values])
    writing.put(VAULTED_TABLE, [{"name": name, "id_digest": each} for name, each in change.vaulted])
    meta = {**change.meta, SEQ: str(seq)}
    writing.put(META_TABLE, [{"key": key, "value": value} for key, value in meta.items()])
    _put_requests(writing, change, seq)
    _append_events(writing, change.events)
    writing.write_counts()
    writing.write_keyed_counts(seq)
    return seq, unidentified


def _remove(writing: Writing, change: Change) -> set[str]:
    """Remove rows; return the keys of the removed identities."""
    writing.remove(RECORDS_TABLE, [(each.id_digest,) for each in change.removed])
    writing.remove(CHECKPOINTS_TABLE, [(key,) for key in change.dropped])
    writing.remove(INDEXES_TABLE, [(shard,) for shard in change.unindexed])
    writing.remove(HEADS_TABLE, [(shard,) for shard in change.headless])
    writing.remove(EXPORTS_TABLE, list(change.unexported))
    writing.remove(SLICES_TABLE, list(change.emptied))
    gone = _identities_of(writing.connection, change.unidentified)
    writing.remove(IDENTITIES_TABLE, [(each.key, each.id_digest) for each in gone])
    if change.unvaulted:
        pairs = rows.read_all(writing.connection, VAULTED_TABLE)  # without an index
        writing.remove(VAULTED_TABLE, [(n, each) for n, each, _ in pairs if n in change.unvaulted])
        writing.remove(VAULT_TABLE, [(name,) for name in change.unvaulted])
    return {each.key for each in gone}


def _identities_of(connection: sa.Connection, id_digests: Collection[str]) -> list[Identity]:
    whose = sorted(id_digests)
    return rows_having(connection, Identity, IDENTITIES_TABLE.c.id_digest, whose, full_scan=True)


def _put_requests(writing: Writing, change: Change, seq: int) -> None:
    named: dict[str, list[str]] = {}
    for request_id, id_digest in change.named:
        named.setdefault(request_id, []).append(id_digest)
    requests = {request.request_id: request for request in change.requests}
    for request_id in dict.fromkeys((*named, *requests)):
        _put_request(writing, request_id, requests.get(request_id), named.get(request_id, []), seq)


def _put_request(
    writing: Writing, request_id: str, request: Request | None, named: Sequence[str], seq: int
) -> None:
    """Add names to a request, and replace its row if `request` is given."""
    connection = writing.connection
    known = rows.read(connection, REQUESTS_TABLE, REQUESTS_TABLE.c.request_id == request_id)
    before = {
        row[1] for row in rows.read(connection, NAMED_TABLE, NAMED_TABLE.c.request_id == request_id)
    }
    first, body = seq, ""
    if known:
        _, first, num_named, body, _ = known[0]
        rows.check_row_count(NAMED_TABLE, num_named, len(before))
    writing.put(NAMED_TABLE, [{"request_id": request_id, "id_digest": each} for each in named])
    if request is not None:
        body = json.dumps(asdict(request), sort_keys=True)
    if body:
        num_named = len(before.union(named))
        row = {"request_id": request_id, SEQ: first, "num_named": num_named, "body": body}
        writing.put(REQUESTS_TABLE, [row])


def _last_event(connection: sa.Connection) -> tuple[int, str]:
    latest = sa.select(sa.func.max(EVENTS_TABLE.c.position)).scalar_subquery()
    found = rows.read(connection, EVENTS_TABLE, EVENTS_TABLE.c.position == latest)
    return (found[0][0], found[0][-2]) if found else (0, "")


def _append_events(writing: Writing, events: Sequence[RequestEvent]) -> None:
    position, link = _last_event(writing.connection)
    chain = []
    for event in events:
        position, link = position + 1, event.link or chained(link, event)
        chain.append({**asdict(event), "position": position, "link": link})
    writing.insert(EVENTS_TABLE, chain)
