"""A history of requests that was rewritten by somebody without the key, or set back, is found.

Rewritten is a deletion's date, with all that anybody can compute: checksums, links without a key. The
witness, which would find it as well, is taken away.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.cli import cli
from sisa.core.digest import Keyed
from sisa.core.domain import RequestEvent, WitnessHead
from sisa.core.errors import IntegrityError
from sisa.core.requests import chained
from sisa.flows.wiring import wiring
from sisa.model import Model
from sisa.store.ledger import rows
from tests.fakes.ports import SECRET
from tests.models.confessing import record

From = Literal["the change on", "the first on"]
EARLIER = "2001-01-01T00:00:00+00:00"


def opened(directory: Path) -> Model:
    return Model(directory, executor="serial")


@pytest.fixture
def directory(model: Path) -> Path:
    """Return a model with two deletions, whose witness is gone."""
    for number in (3, 5):
        opened(model).forget([record(number).id])
    take_witness_away(model)
    return model


def take_witness_away(directory: Path) -> None:
    model = opened(directory)
    wiring.witness_of(model.config, Keyed(SECRET), model.id).path.unlink(missing_ok=True)


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
    with closing(sqlite3.connect(directory / wiring.LEDGER)) as connection:
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


def as_of_an_earlier_version(directory: Path) -> None:
    """Link all events without a key, under the name that an earlier version gave it."""
    with closing(sqlite3.connect(directory / wiring.LEDGER)) as connection:
        put(connection, "meta", "key", ("key", Keyed(SECRET).name))
        link_anew(connection, 1, {})
        connection.commit()


@pytest.mark.parametrize("start", ["the change on", "the first on"])
def test_a_deletion_dated_back_without_the_key_is_found(directory: Path, start: From) -> None:
    assert opened(directory).verify().ok
    take_witness_away(directory)
    date_back(directory, start)
    found = opened(directory).verify()
    assert [each.where for each in found.findings] == ["ledger"]
    assert "events" in found.findings[0].what
    with pytest.raises(IntegrityError, match="contradicts"):
        opened(directory).forget([record(7).id])


def test_a_ledger_of_an_earlier_version_goes_on_under_the_key(directory: Path) -> None:
    as_of_an_earlier_version(directory)
    assert opened(directory).verify().ok
    opened(directory).forget([record(7).id])
    assert opened(directory).verify().ok
    take_witness_away(directory)
    with closing(sqlite3.connect(directory / wiring.LEDGER)) as connection:
        ((count,),) = connection.execute("SELECT count(*) FROM events")
        link_anew(connection, count, {})  # the last alone, and after a keyed one
        connection.commit()
    assert not opened(directory).verify().ok


def anchor_of(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the head as `sisa status` prints it."""
    assert cli.run(["status", "-m", str(directory)]) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("event log"))
    return line.split()[-1]


def verified(directory: Path, anchor: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.run(["verify", "-m", str(directory), "--anchor", anchor])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_an_anchored_head_exposes_a_history_that_was_rewritten_or_set_back(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_of_an_earlier_version(directory)  # the one ledger that can be rewritten without the key
    shutil.copytree(directory, directory.with_name("backup"))
    first = anchor_of(directory, capsys)
    opened(directory).forget([record(7).id])
    last = anchor_of(directory, capsys)
    assert first != last
    for anchor in (first, last):
        assert verified(directory, anchor, capsys)[0] == 0
    take_witness_away(directory)
    code, text = verified(directory.with_name("backup"), last, capsys)
    assert (code, "set back" in text) == (4, True)
    take_witness_away(directory.with_name("backup"))
    date_back(directory.with_name("backup"), "the first on")
    assert opened(directory.with_name("backup")).verify().ok
    code, text = verified(directory.with_name("backup"), first, capsys)
    assert (code, "rewritten" in text) == (4, True)


@pytest.mark.parametrize("anchor", ["", "3", "0:" + "a" * 64, "3:" + "A" * 64, "3:aa"])
def test_what_is_no_head_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str], anchor: str
) -> None:
    assert verified(directory, anchor, capsys)[0] == 2


def test_an_anchor_can_be_given_from_python(directory: Path) -> None:
    head = opened(directory).status().event_head
    assert opened(directory).verify(anchor=head).ok
    assert not opened(directory).verify(anchor=WitnessHead("a" * 64, head.num_events)).ok
