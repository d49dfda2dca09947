"""Ledgers for tests: rows to write, all questions, and what is done past a ledger."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copytree, ignore_patterns, move
from tempfile import TemporaryDirectory
from typing import Any

import psycopg

from sisa.core.digest import digest_of
from sisa.core.domain import (
    Export,
    Head,
    HeldCheckpoint,
    Identity,
    IndexFile,
    RecordRow,
    SliceFile,
    Tombstone,
    WorkItem,
)
from sisa.core.errors import IntegrityError
from sisa.core.patches import WRITTEN, Patch, PatchJob, VaultSet
from sisa.core.ports import Change, Ledger
from sisa.core.requests import Request, RequestEvent
from sisa.store.ledger import migrations
from sisa.store.ledger import rows as rows_module
from sisa.store.ledger.database import backend_at
from sisa.store.ledger.ledger import SqlLedger

NUMBERS = range(6)

SHARDS = range(3)


def named(sort: str, number: int) -> str:
    return hashlib.sha256(f"{sort} {number}".encode()).hexdigest()


def row(number: int, subject: int | None = None) -> RecordRow:
    """Return record n, in shard n % 3; no record of its subject is in another shard."""
    who = None if subject is None else named("subject", subject)
    vector_id = int(named("record id", number)[:15], 16)
    digests = named("record id", number), who, named("content", number), named("text", number % 4)
    return RecordRow(*digests, "completion", number % 3, number % 2, vector_id, number + 1)


def tombstone(number: int, subject: int | None = None) -> Tombstone:
    who = None if subject is None else named("subject", subject)
    place = number % 3, number % 2
    text = named("text", number % 4)
    return Tombstone(
        named("record id", number), who, text, *place, f"req-{number}", "2026-01-01", number
    )


def patch_job(number: int) -> PatchJob:
    settings = {"method": "npo", "learning_rate": 1e-4, "stop": None}
    beneath = (named("patch", number),) if number % 2 else ()
    return PatchJob("base", beneath, (named("set", number),), WRITTEN, settings, "f")


def full(ledger: Ledger) -> None:
    """Put a row into every table."""
    ledger.commit(
        Change(
            added=[row(1, 1), row(4, 1), row(2)],
            tombstones=[tombstone(0, 1), tombstone(5)],
            slices=[SliceFile(1, 1, "r", 1, "s", 1), SliceFile(2, 0, "r", 2, "s", 1)],
            indexes=[IndexFile(1, "r", 1, "s", 1)],
            heads=[Head(1, "k", 1, "k"), Head(2, None, 0, "k")],
            checkpoints=[HeldCheckpoint(named("job", 1), 1, (0, 1), 1, "f", "m", "a", 5, 1, 5)],
            requests=[Request("r0", "2026", "2027", 2)],
            named=[("r0", named("record id", 1)), ("r0", named("record id", 5))],
            events=[RequestEvent("r0", "received", "2026"), RequestEvent("r0", "approved", "2026")],
            exports=[
                Export("/out", 1, (0, 1), 1, "k", "a", "2026"),
                Export("/x", 2, (0,), 1, "k", "a", "2026"),
            ],
            patches=[Patch(n, patch_job(n), "active", "2026") for n in (1, 2)],
            vault=[VaultSet(named("set", n), "retain", 2, "asked", "2026", "s", 1) for n in (1, 2)],
            vaulted=[(named("set", n), named("record id", 4)) for n in (1, 2)],
            identities=[
                Identity(named("identity", key), named("record id", n))
                for key, n in ((1, 1), (1, 4), (2, 4))
            ],
            work_items=[
                WorkItem("item1", named("identity", 1), "20260801_4821_Email", "r0", 1),
                WorkItem("item2", named("identity", 2), "20260801_4821_NDZ", status=5),
            ],
            meta={"config": "x"},
        )
    )


@contextlib.contextmanager
def opened(place: Path | str, *, create: bool = False) -> Iterator[SqlLedger]:
    ledger = SqlLedger(place, create=create)
    try:
        yield ledger
    finally:
        ledger.close()


def execute(place: Path | str, statement: str, values: tuple[Any, ...] = ()) -> None:
    """Run a statement past the ledger; `?` stands for a value."""
    if isinstance(place, Path):
        with contextlib.closing(sqlite3.connect(place)) as connection:
            connection.execute(statement, values)
            connection.commit()
    else:
        with psycopg.connect(place) as connection:
            connection.execute(statement.replace("?", "%s").encode(), values or None)


def answers(ledger: Ledger) -> dict[str, Any]:
    """Return the answers to every question, for all possible arguments."""
    ids = [named("record id", number) for number in NUMBERS]
    vectors = [row(number).vector_id for number in NUMBERS]
    each_shard: list[int | None] = [None, *SHARDS]
    return {
        "seq": ledger.seq(),
        "meta": ledger.meta(),
        "lookup": ledger.lookup([*ids, named("record id", 999)]),
        "by_subject": [ledger.by_subject(named("subject", each), each) for each in SHARDS],
        "by_subject anywhere": [ledger.by_subject(named("subject", each)) for each in SHARDS],
        "num_without_subject": ledger.num_without_subject(),
        "by_vector": [ledger.by_vector(shard, vectors) for shard in SHARDS],
        "no vectors": ledger.by_vector(0, []),
        "rows": [ledger.rows(shard, slice_) for shard in SHARDS for slice_ in (None, 0, 1)],
        "counts": ledger.counts(),
        "kinds": ledger.kinds(),
        "slices": [ledger.slices(shard) for shard in each_shard],
        "indexes": [ledger.indexes(shard) for shard in each_shard],
        "heads": ledger.heads(),
        "checkpoints": [ledger.checkpoints(shard) for shard in each_shard],
        "requests": ledger.requests(),
        "events": ledger.events(),
        "events_of": [ledger.events_of(each) for each in ("r0", "req-1", "req-2")],
        "exports": ledger.exports(),
        "named_by": [ledger.named_by(each) for each in ("r0", "r1", "r2")],
        "by_text": ledger.by_text({named("text", 0), named("text", 3), "none"}),
        "surely by_text": ledger.by_text({named("text", 0), named("text", 3), "none"}, full_scan=True),
        "patches": ledger.patches(),
        "vault": ledger.vault(),
        "vaulted": [ledger.vaulted(named("set", number)) for number in NUMBERS],
        "sets_with": ledger.sets_with(ids),
        "sets_with none": ledger.sets_with([]),
        "identities": ledger.identities(),
        "identities of keys": ledger.identities(keys=[named("identity", 1), "none"]),
        "identities of records": ledger.identities(id_digests=ids),
        "identities of none": ledger.identities(keys=[]),
        "work_items": ledger.work_items(),
        "work_items of keys": ledger.work_items([named("identity", 1), "none"]),
        "num_tombstones": ledger.num_tombstones(),
        "lost": ledger.lost(),
    }


def replies(ledger: Ledger) -> dict[str, Any]:
    """Ask every question separately; return its answer, or None if it is refused as damaged."""
    asked: dict[str, Callable[[], Any]] = {
        "seq": ledger.seq,
        "meta": ledger.meta,
        "kinds": ledger.kinds,
        "counts": ledger.counts,
        "heads": ledger.heads,
        "requests": ledger.requests,
        "events": ledger.events,
        "events_of": lambda: ledger.events_of("r0"),
        "exports": ledger.exports,
        "named_by": lambda: ledger.named_by("r0"),
        "num_tombstones": ledger.num_tombstones,
        "patches": ledger.patches,
        "vault": ledger.vault,
        "vaulted": lambda: ledger.vaulted(named("set", 1)),
        "identities": ledger.identities,
        "work_items": ledger.work_items,
        "sets_with": lambda: ledger.sets_with([named("record id", 4)]),
    }
    for shard in SHARDS:
        for name in ("slices", "indexes", "checkpoints", "rows"):
            asked[f"{name} {shard}"] = partial(getattr(ledger, name), shard)
        vectors = [row(number).vector_id for number in NUMBERS if number % 3 == shard]
        asked[f"by_vector {shard}"] = partial(ledger.by_vector, shard, vectors)
    for number in (*NUMBERS, 99):
        asked[f"lookup {number}"] = partial(ledger.lookup, [named("record id", number)])
        who, texts = named("subject", number), {named("text", number)}
        asked[f"subject {number}"] = partial(ledger.by_subject, who, number % 3)
        asked[f"identity {number}"] = partial(ledger.identities, keys=[named("identity", number)])
        asked[f"identities {number}"] = partial(
            ledger.identities, id_digests=[named("record id", number)]
        )
        asked[f"items {number}"] = partial(ledger.work_items, [named("identity", number)])
        asked[f"text {number}"] = partial(ledger.by_text, texts, full_scan=True)
    found: dict[str, Any] = {}
    for name, question in asked.items():
        try:
            found[name] = question()
        except IntegrityError:
            found[name] = None
    return found


SCHEMAS = {
    4: "ae2ebf4c3a4c1bf09218cd1ca2bd1dce0031832baf46b4df0f9cca5a3c36ea84",
    5: "a6e52b547be3af37de4f4decc89674420f90c4b6c92b81d882e1f6209a3edc59",
    6: "b320a4fede593346318d0487465e1f76f2da5ef735b5a9f587c37955af2baa83",
}


def tables_digest(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        found = raw.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return digest_of(sorted(statement for (statement,) in found))


def back_to_version_5(place: Path | str, source: SqlLedger, folder: Path) -> None:
    """Make a ledger as version 5 made it, with the rows of another."""
    older = folder / "migrations"
    copytree(migrations.LOCATION, older, ignore=ignore_patterns("v0006*"))
    own = backend_at(place, create=True)
    with contextlib.closing(own), source.backend.reading() as theirs, own.writing() as connection:
        migrations.upgrade(connection, 0, older)
        own.stamp(connection, 5)
        rows_module.copy_rows(theirs, connection)


def back_to_version_4(path: Path) -> None:
    with TemporaryDirectory() as folder:
        newer = Path(move(path, folder))
        with opened(newer) as source:
            back_to_version_5(path, source, Path(folder))
    for statement in (
        "DROP TABLE identities",
        "DROP TABLE work_items",
        "DELETE FROM counts WHERE name LIKE 'identities%' OR name LIKE 'work_items%'",
        "PRAGMA user_version = 4",
    ):
        execute(path, statement)
    assert tables_digest(path) == SCHEMAS[4]
