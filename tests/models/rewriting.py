"""Rewrite the history of a model without its keys, with all that anybody can compute."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from sisa.core.digest import Keyed
from sisa.core.event_chain import chained
from sisa.core.requests import RequestEvent
from sisa.flows.wiring.keys import witness_of
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.model import Model
from sisa.store.ledger import rows
from tests.fakes.ports import SECRET

From = Literal["the change on", "the first on"]

EARLIER = "2001-01-01T00:00:00+00:00"


def take_witness_away(directory: Path) -> None:
    model = Model(directory, executor="serial")
    witness_of(model.config, Keyed(SECRET), model.id).path.unlink(missing_ok=True)


def put(connection: sqlite3.Connection, table: str, key: str, values: tuple[Any, ...]) -> None:
    """Write a row with its checksum, in place of the one with the same key."""
    names = [each[1] for each in connection.execute(f"PRAGMA table_info({table})")]
    whole = (*values, rows.checksum(table, values))
    changed = ", ".join(f"{name} = ?" for name in names)
    where = (*whole, values[names.index(key)])
    connection.execute(f"UPDATE {table} SET {changed} WHERE {key} = ?", where)  # noqa: S608


def link_anew(connection: sqlite3.Connection, start: int, changes: dict[int, str]) -> None:
    """Link all events from a position on without a key, some of them with another date."""
    link = ""
    for position, *values, old, _ in connection.execute("SELECT * FROM events").fetchall():
        request_id, state, at, note = values
        at = changes.get(position, at)
        link = chained(link, RequestEvent(request_id, state, at, note)) if position >= start else old
        put(connection, "events", "position", (position, request_id, state, at, note, link))


def date_back(directory: Path, start: From) -> None:
    """Let the first deletion have been committed years earlier."""
    with closing(sqlite3.connect(directory / LEDGER)) as connection:
        position, request_id = connection.execute(
            "SELECT position, request_id FROM events WHERE state = 'committed'"
        ).fetchone()
        body, seq, named = connection.execute(
            "SELECT body, seq, num_named FROM requests WHERE request_id = ?", (request_id,)
        ).fetchone()
        body = json.dumps({**json.loads(body), "committed_at": EARLIER}, sort_keys=True)
        put(connection, "requests", "request_id", (request_id, seq, named, body))
        *dead, erased, _ = connection.execute(
            "SELECT * FROM tombstones WHERE request_id = ?", (request_id,)
        ).fetchone()
        put(connection, "tombstones", "id_digest", (*dead[:-1], EARLIER, erased))
        link_anew(connection, position if start == "the change on" else 1, {position: EARLIER})
        connection.commit()
