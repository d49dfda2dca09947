"""The ledger's tables, one for each noun of `core/` that it keeps.

Rows hold keyed digests, positions, counts and digests of files; never an id, a subject or text. What a
person writes about a request (reason, approver, external id, consent) is kept as given, and so are the
paths of exports. `migrations/` upgrades an older ledger; other versions are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import sqlalchemy as sa

from sisa.core import domain
from sisa.core.patches import Patch, VaultSet
from sisa.core.requests import RequestEvent

SCHEMA_VERSION = 6
UPGRADED = (4, 5)  # versions that `migrations/` upgrades

schema = sa.MetaData()

# By default, PostgreSQL's integers are shorter, and its texts are in the order of a language.
_NUMBER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
# All others are text, most of them JSON.
_TYPES: dict[Any, Any] = {int: _NUMBER, bool: _NUMBER, float: sa.Float()}


def _table(
    name: str,
    kinds: Mapping[str, Any],
    *constraints: Any,
    key: Sequence[str],
    indexed: Collection[str] = (),
    heap: bool = False,
    **options: Any,
) -> sa.Table:
    """Return a table with columns of these Python types: its key first, then the others, then `crc`.

    A heap has no primary key: its rows lie in order of arrival, and the rows of one commit in the order
    of all columns of the key but the last.
    """
    ordered = {each: kinds[each] for each in key} | dict(kinds) | {"crc": int}
    columns: list[sa.Column[Any]] = [
        sa.Column(
            each,
            _TYPES.get(kind, _TEXT),
            primary_key=each in key and not heap,
            autoincrement=False,
            nullable=type(None) in get_args(kind),
            index=each in indexed,
        )
        for each, kind in ordered.items()
    ]
    info = {"key": key, "order": key[:-1] if heap else key}
    return sa.Table(name, schema, *columns, *constraints, info=info, **options)


# Shard and slice are NO_POSITION for the count of a whole table.
_COUNT = {"name": str, "shard": int, "slice": int, "kind": str, "num_rows": int}
COUNTS_TABLE = _table("counts", _COUNT, key=("name", "shard", "slice", "kind"))
META_TABLE = _table("meta", {"key": str, "value": str}, key=("key",))
RECORDS_TABLE = _table(
    "records",
    get_type_hints(domain.RecordRow),
    sa.Index("ix_records_id_digest", "id_digest", unique=True),
    sa.Index("ix_records_place", "shard", "slice"),
    sa.Index("ix_records_vector_id", "shard", "vector_id", unique=True),
    key=("shard", "slice", "id_digest"),
    indexed=("subject_digest", "text_digest"),
    heap=True,  # an index names a row by a short number, not by its key
)
TOMBSTONES_TABLE = _table(
    "tombstones",
    get_type_hints(domain.Tombstone),
    key=("id_digest",),
    indexed=("subject_digest", "text_digest"),
)
SLICES_TABLE = _table("slices", get_type_hints(domain.SliceFile), key=("shard", "slice"))
INDEXES_TABLE = _table("indexes", get_type_hints(domain.IndexFile), key=("shard",))
HEADS_TABLE = _table("heads", get_type_hints(domain.Head), key=("shard",))
CHECKPOINTS_TABLE = _table(
    "checkpoints", get_type_hints(domain.HeldCheckpoint), key=("key",), indexed=("shard",)
)
_REQUEST = {"request_id": str, "seq": int, "num_named": int, "body": str}
REQUESTS_TABLE = _table("requests", _REQUEST, key=("request_id",))
NAMED_TABLE = _table("named", {"request_id": str, "id_digest": str}, key=("request_id", "id_digest"))
EXPORTS_TABLE = _table("exports", get_type_hints(domain.Export), key=("path", "key"))
_PATCH = {"key": str, **get_type_hints(Patch)}
PATCHES_TABLE = _table("patches", _PATCH, sa.UniqueConstraint("version"), key=("key",))
VAULT_TABLE = _table("vault", get_type_hints(VaultSet), key=("name",))
_VAULTED = {"name": str, "id_digest": str}
VAULTED_TABLE = _table("vaulted", _VAULTED, key=("name", "id_digest"), indexed=("id_digest",))
IDENTITIES_TABLE = _table(
    "identities",
    get_type_hints(domain.Identity),
    key=("key", "id_digest"),
    indexed=("id_digest",),
    sqlite_with_rowid=False,
)
WORK_ITEMS_TABLE = _table("work_items", get_type_hints(domain.WorkItem), key=("item",), indexed=("key",))
_EVENT = {"position": int, **get_type_hints(RequestEvent)}
EVENTS_TABLE = _table("events", _EVENT, key=("position",), indexed=("link",))
