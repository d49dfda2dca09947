"""Rewrite the history of a model without its keys, with all that anybody can compute."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
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


def change(connection: sqlite3.Connection, table: str, where: dict[str, Any], **values: Any) -> None:
    """Change columns of the one row that has the given values, and its checksum."""
    asked = " AND ".join(f"{name} = ?" for name in where)
    found = connection.execute(f"SELECT * FROM {table} WHERE {asked}", [*where.values()])  # noqa: S608
    names = [each[0] for each in found.description]
    (row,) = (dict(zip(names, each, strict=True)) | values for each in found.fetchall())
    held = tuple(value for name, value in row.items() if name != "crc")
    changed = ", ".join(f"{name} = ?" for name in [*values, "crc"])
    given = [*values.values(), rows.checksum(table, held), *where.values()]
    connection.execute(f"UPDATE {table} SET {changed} WHERE {asked}", given)  # noqa: S608


def link_anew(connection: sqlite3.Connection, start: int, changes: dict[int, str]) -> None:
    """Link all events from a position on without a key, some of them with another date."""
    link, columns = "", "position, link, request_id, state, at, note"
    for position, old, *rest in connection.execute(f"SELECT {columns} FROM events").fetchall():  # noqa: S608
        event = RequestEvent(*rest)
        event = replace(event, at=changes.get(position, event.at))
        link = chained(link, event) if position >= start else old
        change(connection, "events", {"position": position}, at=event.at, link=link)


def date_back(directory: Path, start: From) -> None:
    """Let the first deletion have been committed years earlier."""
    with closing(sqlite3.connect(directory / LEDGER)) as connection:
        position, request_id = connection.execute(
            "SELECT position, request_id FROM events WHERE state = 'committed'"
        ).fetchone()
        asked = {"request_id": request_id}
        (body,) = connection.execute(
            "SELECT body FROM requests WHERE request_id = ?", (request_id,)
        ).fetchone()
        body = json.dumps({**json.loads(body), "committed_at": EARLIER}, sort_keys=True)
        change(connection, "requests", asked, body=body)
        change(connection, "tombstones", asked, deleted_at=EARLIER)
        link_anew(connection, position if start == "the change on" else 1, {position: EARLIER})
        connection.commit()
