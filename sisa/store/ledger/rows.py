"""Rows of the ledger's tables: each row with a checksum, each table with a recorded count.

A database may detect damaged pages, not a damaged value. So the last column of every row is the CRC-32
of the others, checked whenever the row is read. A lost row has no checksum, so `counts` holds the number
of rows of each table, by shard, slice and kind if it has them. Every write updates it in the same
transaction, and every reading of all rows is compared with it. For KEYED columns `counts` also holds how
many rows have a value with each prefix: the few rows of its bucket prove that a keyed digest is absent.
What is removed or replaced is read and checked first, so that a loss is never counted as a removal.

A CRC finds accidents, not intent, and nothing here detects that a whole ledger was set back. A checksum
covers the values' Python spelling in ASCII, which is the same in every version of Python.

>>> spelled = checksum("meta", ("key", "value"))
>>> spelled == checksum("meta", ("key", "valuf")), spelled == checksum("heads", ("key", "value"))
(False, False)
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import sqlalchemy as sa

from sisa.store.ledger.tables import (
    CHECKPOINTS_TABLE,
    COUNTS_TABLE,
    IDENTITIES_TABLE,
    INDEXES_TABLE,
    META_TABLE,
    NAMED_TABLE,
    RECORDS_TABLE,
    SLICES_TABLE,
    TOMBSTONES_TABLE,
    WORK_ITEMS_TABLE,
    schema,
)

SEQ = "seq"  # key in `meta` of the number of the last commit

NO_POSITION = -1  # shard and slice in `counts` of a whole table
WHOLE = (NO_POSITION, NO_POSITION, "")
BY_SHARD = (RECORDS_TABLE, SLICES_TABLE, INDEXES_TABLE, CHECKPOINTS_TABLE)
# too large to be scanned when rows are added
GROWING = (TOMBSTONES_TABLE, NAMED_TABLE, IDENTITIES_TABLE, WORK_ITEMS_TABLE)
KEYED = (
    *(RECORDS_TABLE.c.id_digest, RECORDS_TABLE.c.subject_digest, RECORDS_TABLE.c.text_digest),
    *(TOMBSTONES_TABLE.c.id_digest, TOMBSTONES_TABLE.c.subject_digest, TOMBSTONES_TABLE.c.text_digest),
    *(IDENTITIES_TABLE.c.key, IDENTITIES_TABLE.c.id_digest, WORK_ITEMS_TABLE.c.key),
)
KEYED_AS_OF = "keyed"  # name in `counts` of the last commit that the counts of KEYED columns include
BUCKET_DIGITS = 3  # of a keyed digest: 4,096 buckets, each with 244 of a million records
COUNTED = tuple(table for table in schema.sorted_tables if table is not COUNTS_TABLE)
_CHUNK_VALUES = 500  # SQLite's limit of bound parameters is far above, on every build
_COUNTS = "SELECT * FROM counts WHERE name = ?"
_PUT_COUNT = (
    "INSERT INTO counts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name, shard, slice, kind) "
    "DO UPDATE SET num_rows = excluded.num_rows, crc = excluded.crc"
)
_BLOCK_ROWS = 10_000
MANY_ROWS = 10_000  # from which a commit is a large one
_FEW_SHARDS = 16  # most shards that are scanned one by one and not all at once
_SEEDS = {table.name: zlib.crc32(table.name.encode()) for table in schema.sorted_tables}

_T = TypeVar("_T")
CountKey = tuple[int, int, str]  # shard, slice, kind


class Damaged(Exception):
    """A row differs from what was written, or rows are missing; names the table, never a value."""


def chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Yield parts of the values that fit into one query."""
    for start in range(0, len(values), _CHUNK_VALUES):
        yield values[start : start + _CHUNK_VALUES]


def checksum(table: str, values: tuple[Any, ...]) -> int:
    """Return the CRC-32 of a row's values in the order of its columns, without the checksum itself."""
    return zlib.crc32(ascii(values).encode(), _SEEDS[table])


def checked_rows(table: sa.Table, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return whole rows after comparing each with its checksum. Raise Damaged."""
    seed, crc32 = _SEEDS[table.name], zlib.crc32
    for row in rows:
        if crc32(ascii(row[:-1]).encode(), seed) != row[-1]:
            raise Damaged(f"a row of {table.name} that is not the one that was written")
    return rows


def _cursor(result: sa.CursorResult[Any]) -> Any:
    """Return the database's own cursor: its rows are tuples already, and there may be many."""
    return result.cursor


def _stream(connection: sa.Connection, query: sa.Select[Any]) -> Any:
    """Return a cursor that does not read all rows at once: PostgreSQL's own would."""
    if connection.dialect.name == "sqlite":
        return _cursor(connection.execute(query))
    options = {"stream_results": True, "max_row_buffer": _BLOCK_ROWS}
    return connection.execute(query, execution_options=options)


def read(
    connection: sa.Connection, table: sa.Table, *where: Any, order: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """Return the checked rows of a table that fulfil all conditions."""
    query = sa.select(table).where(*where).order_by(*order)
    return checked_rows(table, _cursor(connection.execute(query)).fetchall())


def contents(connection: sa.Connection, shard: int, slice_: int) -> list[tuple[str, str]]:
    """Return keyed ids and digests of a slice's records; the caller compares them with its root."""
    query = (
        "SELECT id_digest, record_digest FROM records WHERE shard = ? AND slice = ? ORDER BY id_digest"
    )
    found: list[tuple[str, str]] = _execute(connection, query, (shard, slice_)).fetchall()
    return found


def _execute(
    connection: sa.Connection, query: str, values: tuple[Any, ...] | list[tuple[Any, ...]]
) -> Any:
    """Return the cursor of a query without compiling it, which would take longer than running it.

    A list of values runs it for each of them.
    """
    if connection.dialect.paramstyle != "qmark":
        query = query.replace("?", "%s")
    return _cursor(connection.exec_driver_sql(query, values))


def check_row_count(table: sa.Table, expected: int, got: int) -> None:
    """Raise Damaged unless a table has as many rows as were written."""
    if expected != got:
        raise Damaged(f"{got} rows of {table.name} where {expected} were written")


def expected_rows(
    connection: sa.Connection, table: sa.Table, shard: int | None = None, slice_: int | None = None
) -> int:
    """Return how many rows a table, a shard or a slice should have. Raise Damaged."""
    if shard is None:
        return _table_count(table, _counts_of(connection, table.name, shard=[NO_POSITION]))
    only = {"shard": [shard]} if slice_ is None else {"shard": [shard], "slice": [slice_]}
    return _counts_of(connection, table.name, **only).total()


def check_complete(
    connection: sa.Connection,
    table: sa.Table,
    got: int,
    shard: int | None = None,
    slice_: int | None = None,
) -> None:
    """Raise Damaged unless a table, a shard or a slice should have `got` rows."""
    check_row_count(table, expected_rows(connection, table, shard, slice_), got)


def read_all(
    connection: sa.Connection,
    table: sa.Table,
    shard: int | None = None,
    slice_: int | None = None,
    order: Sequence[Any] = (),
) -> list[tuple[Any, ...]]:
    """Return all rows of a table, a shard or a slice. Raise Damaged if one is missing."""
    where = [] if shard is None else [table.c.shard == shard]
    where += [] if slice_ is None else [table.c.slice == slice_]
    found = read(connection, table, *where, order=order)
    check_complete(connection, table, len(found), shard, slice_)
    return found


def expected_kinds(connection: sa.Connection) -> Counter[str]:
    """Return how many records of each kind there should be. Raise Damaged."""
    found: Counter[str] = Counter()
    counts = _counts_of(connection, RECORDS_TABLE.name)
    for (_, _, kind), count in counts.items():
        found[kind] += count
    del found[""]
    check_row_count(COUNTS_TABLE, _table_count(RECORDS_TABLE, counts), found.total())
    return found


def lost_rows(connection: sa.Connection) -> list[str]:
    """Return the names of the tables without the recorded number of rows. Raise Damaged."""
    found = []
    for table in COUNTED:
        counts = _counts_of(connection, table.name)
        expected = _table_count(table, counts)
        if expected != actual_rows(connection, table):
            found.append(table.name)
        elif table in BY_SHARD and counts.total() != 2 * expected:  # all rows, and again by position
            found.append(f"{COUNTS_TABLE.name} of {table.name}")
    return found


def check_hidden(
    connection: sa.Connection,
    column: sa.Column[Any],
    values: Collection[Any],
    found: int,
    *,
    shard: int | None = None,
) -> None:
    """Raise Damaged unless `found` rows have one of these values, as counted without trusting an index.

    For a KEYED column, the rows of the values' buckets are read, by the same index, and compared with
    the recorded number: some hundreds of a million rows. Otherwise, and in a ledger that another version
    wrote to last, every row of the table (of a shard's records) is read, in about 4 s per million.
    """
    table: Any = column.table
    if not values:
        return
    if column in KEYED and counts_keyed(connection):
        complete = _count_in_buckets(connection, column, set(values))
    else:
        complete = _count_matching(connection, table, [column], {(each,) for each in values}, shard)
    check_row_count(table, complete, found)


def _at(column: sa.Column[Any]) -> int:
    """Return the position of a column in the rows of its table."""
    return column.table.columns.keys().index(column.name)


def bucket(value: str) -> str:
    """Return the beginning of a keyed digest, by which rows are counted."""
    return value[:BUCKET_DIGITS]


def _in_buckets(column: sa.Column[Any], rows: Iterable[tuple[Any, ...]]) -> Counter[str]:
    """Return how many rows have a value of each bucket."""
    at = _at(column)
    return Counter(bucket(row[at]) for row in rows if row[at] is not None)


def _count_in_buckets(connection: sa.Connection, column: sa.Column[Any], wanted: Collection[str]) -> int:
    """Return how many rows have a wanted value. Raise Damaged if their buckets lack rows."""
    table: Any = column.table
    at = _at(column)
    buckets = sorted({bucket(each) for each in wanted})
    expected = _bucket_counts(connection, column, buckets)
    seen = 0
    for each in buckets:
        found = read(connection, table, column >= each, column < each + chr(0x10FFFF))
        held = [row[at] for row in found if bucket(row[at]) == each]
        check_row_count(table, expected[each], len(held))
        seen += sum(value in wanted for value in held)
    return seen


def counts_keyed(connection: sa.Connection) -> bool:
    """Return whether the counts of KEYED columns are of the last commit: other versions omit them."""
    found = read(connection, META_TABLE, META_TABLE.c.key == SEQ)
    as_of = _counts_of(connection, KEYED_AS_OF)
    return bool(as_of) and as_of[WHOLE] == (int(found[0][1]) if found else 0)


def _bucket_counts(
    connection: sa.Connection, column: sa.Column[Any], buckets: Collection[str]
) -> Counter[str]:
    found: Counter[str] = Counter()
    for chunk in chunks(sorted(buckets)):
        whole = {"shard": [NO_POSITION], "slice": [NO_POSITION], "kind": chunk}
        counts = _counts_of(connection, str(column), **whole)
        found.update({kind: count for (_, _, kind), count in counts.items()})
    return found


def _scan(
    connection: sa.Connection, table: sa.Table, shard: int | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yield all rows of a table or a shard, by no index. Raise Damaged, at the end if one is missing."""
    query = sa.select(table) if shard is None else sa.select(table).where(table.c.shard == shard)
    total = 0
    with contextlib.closing(_stream(connection, query)) as cursor:
        while rows := checked_rows(table, cursor.fetchmany(_BLOCK_ROWS)):
            total += len(rows)
            yield from rows
    check_complete(connection, table, total, shard)


def _count_matching(
    connection: sa.Connection,
    table: sa.Table,
    columns: Sequence[sa.Column[Any]],
    wanted: Collection[tuple[Any, ...]],
    shard: int | None,
) -> int:
    """Return how many rows have one of the wanted values in some columns, without any index."""
    at = list(map(_at, columns))
    return sum(tuple([row[each] for each in at]) in wanted for row in _scan(connection, table, shard))


def actual_rows(connection: sa.Connection, table: sa.Table) -> int:
    """Return how many rows a table has."""
    query = f"SELECT count(*) FROM {table.name}"  # noqa: S608 (our own table name)
    return int(connection.exec_driver_sql(query).scalar_one())


def _counts_of(connection: sa.Connection, name: str, **only: Sequence[Any]) -> Counter[CountKey]:
    """Return recorded numbers of rows by position; `only` of some shards, slices or kinds."""
    query, values = _COUNTS, [name]
    for column, chosen in only.items():
        query += f" AND {column} IN ({', '.join('?' * len(chosen))})"
        values += chosen
    rows = checked_rows(COUNTS_TABLE, _execute(connection, query, tuple(values)).fetchall())
    return Counter({(shard, slice_, kind): number for _, shard, slice_, kind, number, _ in rows})


def _table_count(table: sa.Table, counts: Mapping[CountKey, int]) -> int:
    """Return the recorded number of rows of a whole table. Raise Damaged if it is missing."""
    if WHOLE not in counts:
        raise Damaged(f"the number of rows of {table.name} is missing")
    return counts[WHOLE]


def begin_counts(connection: sa.Connection, names: Collection[str] = ()) -> None:
    """Write the counts of a new ledger, or of new tables of an older one: they have no rows."""
    for name in names or (*(table.name for table in COUNTED), KEYED_AS_OF):
        _put_counts(connection, name, {WHOLE: 0})


def _put_counts(connection: sa.Connection, name: str, counts: Mapping[CountKey, int]) -> None:
    if counts:
        values = [(name, *position, count) for position, count in counts.items()]
        _execute(connection, _PUT_COUNT, [_with_checksum(COUNTS_TABLE, each) for each in values])


def _with_checksum(table: sa.Table, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a row with its checksum."""
    return (*values, checksum(table.name, values))


def _values(table: sa.Table, row: Mapping[str, Any]) -> tuple[Any, ...]:
    # A float column returns floats, even for integers.
    return tuple(
        float(row[column.name]) if isinstance(column.type, sa.Float) else row[column.name]
        for column in table.columns[:-1]
    )


def copy_rows(source: sa.Connection, target: sa.Connection) -> dict[str, int]:
    """Replace all rows of a target by a source's; return their numbers by table.

    All are read back and compared. Raise Damaged for damage in either, and for a difference.
    """
    if lost := lost_rows(source):
        raise Damaged(f"lost rows of {', '.join(lost)}")
    found = {}
    for table in schema.sorted_tables:
        target.execute(sa.delete(table))
        query = sa.select(table).order_by(*_key(table))
        with contextlib.closing(_stream(source, query)) as cursor:
            while block := checked_rows(table, cursor.fetchmany(_BLOCK_ROWS)):
                names = table.columns.keys()
                target.execute(sa.insert(table), [dict(zip(names, row, strict=True)) for row in block])
        found[table.name] = _compare(table, _stream(source, query), _stream(target, query))
    return found


def _compare(table: sa.Table, old: Any, new: Any) -> int:
    """Return how many rows two cursors yield. Raise Damaged unless they are equal."""
    number = 0
    with contextlib.closing(old), contextlib.closing(new):
        while True:
            before, after = (list(map(tuple, each.fetchmany(_BLOCK_ROWS))) for each in (old, new))
            if before != after:
                raise Damaged(f"a row of {table.name} that was copied wrongly")
            if not before:
                return number
            number += len(before)


def _key(table: sa.Table) -> list[sa.Column[Any]]:
    return [table.c[name] for name in table.info["key"]]


def _order_of(table: sa.Table) -> Callable[[tuple[Any, ...]], Any]:
    return itemgetter(*(_at(table.c[name]) for name in table.info["order"]))


def _position_of(table: sa.Table) -> Callable[[tuple[Any, ...]], CountKey]:
    if table is RECORDS_TABLE:
        return itemgetter(*(_at(table.c[name]) for name in ("shard", "slice", "kind")))
    shard = _at(table.c.shard)
    return lambda row: (row[shard], NO_POSITION, "")


class Writing:
    """Writes of one transaction; `write_counts` updates the recorded numbers of rows."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self._deltas: dict[str, Counter[CountKey]] = {table.name: Counter() for table in COUNTED}
        self._keyed: dict[sa.Column[Any], Counter[str]] = {column: Counter() for column in KEYED}
        self._counts_keyed = counts_keyed(connection)

    def insert(self, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add new rows, given by column."""
        self.insert_values(table, [_values(table, row) for row in rows])

    def insert_values(self, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add new rows, given as the values of all columns but the checksum."""
        if rows:
            self._count(table, rows, Counter.update)
            # in order, so that neighbours are written to one page
            sealed = [_with_checksum(table, each) for each in sorted(rows, key=_order_of(table))]
            query = f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})"  # noqa: S608
            with self._indexing_later(table, len(rows)):
                _execute(self.connection, query, sealed)

    @contextlib.contextmanager
    def _indexing_later(self, table: sa.Table, num_rows: int) -> Iterator[None]:
        """Build a table's indexes after a block that adds more rows than it holds, each in one sort.

        SQLite only: PostgreSQL would lock readers out, and only the owner of a table may do so.
        """
        large = num_rows >= MANY_ROWS and self.connection.dialect.name == "sqlite"
        anew = large and num_rows > expected_rows(self.connection, table)
        indexes = sorted(table.indexes, key=lambda index: str(index.name)) if anew else []
        for each in indexes:
            each.drop(self.connection)
        yield
        for each in indexes:
            each.create(self.connection)

    def put(self, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, replacing those with the same key; a key always belongs to one shard."""
        latest = {tuple(row[name] for name in table.info["key"]): row for row in rows}
        shards = {row["shard"] for row in rows} if table in BY_SHARD else set()
        self.remove(table, list(latest), shards if len(shards) <= _FEW_SHARDS else ())
        self.insert(table, list(latest.values()))

    def remove(
        self, table: sa.Table, keys: Sequence[tuple[Any, ...]], shards: Collection[int] = ()
    ) -> None:
        """Remove the rows with these keys, after checking them; absent ones are ignored.

        A damaged index may hide a row. So if any key is not found, all rows are read, or those of the
        shards that the keys belong to.
        """
        columns = [RECORDS_TABLE.c.id_digest] if table is RECORDS_TABLE else _key(table)
        found = 0
        for chunk in chunks(keys):
            if len(columns) == 1:
                where = columns[0].in_([value for (value,) in chunk])
            else:
                where = sa.tuple_(*columns).in_(chunk)
            rows = read(self.connection, table, where)
            if rows:
                done = self.connection.execute(sa.delete(table).where(where))
                check_row_count(table, len(rows), done.rowcount)
                self._count(table, rows, Counter.subtract)
                found += len(rows)
        if found < len(set(keys)) and table not in GROWING:
            self.write_counts()
            where_to_look: list[int | None] = [*sorted(shards)] or [None]
            for shard in where_to_look:
                hidden = _count_matching(self.connection, table, columns, set(keys), shard)
                check_row_count(table, 0, hidden)

    def _count(
        self, table: sa.Table, rows: Sequence[tuple[Any, ...]], change: Callable[..., None]
    ) -> None:
        """Change the numbers of rows by `Counter.update` or `Counter.subtract`."""
        deltas = self._deltas[table.name]
        change(deltas, {WHOLE: len(rows)})
        if table in BY_SHARD:
            change(deltas, Counter(map(_position_of(table), rows)))
        for column in KEYED if self._counts_keyed else ():
            if column.table is table:
                change(self._keyed[column], _in_buckets(column, rows))

    def write_counts(self) -> None:
        """Write the numbers of rows that changed."""
        for table in COUNTED:
            deltas = {position: delta for position, delta in self._deltas[table.name].items() if delta}
            if deltas:
                shards = list({NO_POSITION, *(each[0] for each in deltas)})
                only = {"shard": shards} if len(shards) <= _CHUNK_VALUES else {}
                before = _counts_of(self.connection, table.name, **only)
                _table_count(table, before)
                after = {position: before[position] + delta for position, delta in deltas.items()}
                _put_counts(self.connection, table.name, after)
            self._deltas[table.name].clear()

    def write_keyed_counts(self, seq: int) -> None:
        """Update the counts of KEYED columns; count all rows if another version wrote last."""
        for column, deltas in self._keyed.items():
            if self._counts_keyed:
                changed = {each: delta for each, delta in deltas.items() if delta}
                before = _bucket_counts(self.connection, column, changed)
                after = {each: before[each] + delta for each, delta in changed.items()}
            else:
                self.connection.execute(
                    sa.delete(COUNTS_TABLE).where(COUNTS_TABLE.c.name == str(column))
                )
                after = _in_buckets(column, _scan(self.connection, column.table))
            positions = {(NO_POSITION, NO_POSITION, each): count for each, count in after.items()}
            _put_counts(self.connection, str(column), positions)
        _put_counts(self.connection, KEYED_AS_OF, {WHOLE: seq})
