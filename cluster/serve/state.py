"""Keep what the services of a model must not forget, in MODEL/service.sqlite.

Nothing in it names a record or a person. A lost file loses messages that wait, and no request.

    used       idempotency keys and the calls that used them, as digests, for a week; for OpenDSR's
               requests for access, keyed digests of their names and subjects
    wanted     the calls to carry out requests now that have not been answered by a run
    callbacks  where to report on a request, as its sender asked
    seen       up to which event of the ledger messages are queued
    queue      messages that wait, with their attempts; those that were given up have no due time
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path
from sqlite3 import Connection

from sisa.core.errors import IntegrityError
from sisa.evidence.database import transaction
from sisa.flows.wiring.upper_houses import SERVICE_STATE

KEY_S = 7 * 86_400  # how long a key is remembered
_SCHEMA = """
CREATE TABLE IF NOT EXISTS used (
    key TEXT PRIMARY KEY, asked TEXT NOT NULL, request TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS wanted (run INTEGER PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS callbacks (
    request TEXT NOT NULL, url TEXT NOT NULL, PRIMARY KEY (request, url)
) STRICT;
CREATE TABLE IF NOT EXISTS seen (one INTEGER PRIMARY KEY CHECK (one = 1), events INTEGER) STRICT;
CREATE TABLE IF NOT EXISTS queue (
    id TEXT NOT NULL, url TEXT NOT NULL, form TEXT NOT NULL, body TEXT NOT NULL,
    attempts INTEGER NOT NULL, due REAL, PRIMARY KEY (id, url)
) STRICT;
"""


@dataclass(frozen=True)
class Delivery:
    """A message that waits to be delivered to a URL; `due` is None for one that was given up."""

    id: str
    url: str
    form: str  # "webhook" or "opendsr": how it is signed
    body: str
    attempts: int = 0
    due: float | None = 0.0  # seconds since the epoch


@dataclass(frozen=True)
class Call:
    """A call that is to be done once."""

    asked: str  # the digest of the call
    request: str  # the request that it led to; empty: it has not ended
    at: float  # seconds since the epoch


class ServiceState:
    """The state of the services of one model."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SERVICE_STATE

    def _tables(self) -> AbstractContextManager[Connection]:
        return transaction(self._path, _SCHEMA, damaged=_damaged)

    def begin(self, key: str, asked: str) -> Call:
        """Use a key for a call. Return the call that has the key: this one, or an earlier one."""
        now = time.time()
        with self._tables() as db:
            db.execute("DELETE FROM used WHERE at < ?", (now - KEY_S,))
            db.execute("INSERT OR IGNORE INTO used VALUES (?, ?, '', ?)", (key, asked, now))
            row = db.execute("SELECT asked, request, at FROM used WHERE key = ?", (key,)).fetchone()
        return Call(*row)

    def call(self, key: str) -> Call | None:
        """Return the call that has used a key, if one did within a week."""
        query = "SELECT asked, request, at FROM used WHERE key = ? AND at >= ?"
        with self._tables() as db:
            row = db.execute(query, (key, time.time() - KEY_S)).fetchone()
        return row and Call(*row)

    def end(self, key: str, request: str) -> bool:
        """Note which request the call of a key led to; return whether this was the first time."""
        with self._tables() as db:
            query = "UPDATE used SET request = ? WHERE key = ? AND request = ''"
            return db.execute(query, (request, key)).rowcount > 0

    def ask_to_run(self) -> None:
        """Have the runner carry out approved requests now."""
        with self._tables() as db:
            db.execute("INSERT INTO wanted VALUES (NULL)")

    def asked_to_run(self) -> int:
        """Return the number of the last call of `ask_to_run` that is open; 0: there is none."""
        if not self._path.exists():
            return 0
        with self._tables() as db:
            return int(db.execute("SELECT ifnull(max(run), 0) FROM wanted").fetchone()[0])

    def has_run(self, asked: int) -> None:
        """Close the calls of `ask_to_run` up to a number."""
        with self._tables() as db:
            db.execute("DELETE FROM wanted WHERE run <= ?", (asked,))

    def add_callbacks(self, request: str, urls: Iterable[str]) -> None:
        """Add URLs to report to on a request."""
        with self._tables() as db:
            db.executemany("INSERT OR IGNORE INTO callbacks VALUES (?, ?)", [(request, u) for u in urls])

    def callbacks(self) -> Mapping[str, list[str]]:
        """Return the URLs to report to, by request."""
        found: dict[str, list[str]] = {}
        with self._tables() as db:
            for request, url in db.execute("SELECT request, url FROM callbacks ORDER BY request, url"):
                found.setdefault(request, []).append(url)
        return found

    def seen(self) -> int | None:
        """Return up to which event deliveries are queued; None before the first time."""
        with self._tables() as db:
            row = db.execute("SELECT events FROM seen").fetchone()
        return row and int(row[0])

    def queue(self, deliveries: Iterable[Delivery], events: int | None = None) -> None:
        """Queue deliveries, of all events up to a number if one is given, in one transaction."""
        with self._tables() as db:
            rows = [astuple(each) for each in deliveries]
            db.executemany("INSERT OR IGNORE INTO queue VALUES (?, ?, ?, ?, ?, ?)", rows)
            if events is not None:
                db.execute("INSERT OR REPLACE INTO seen VALUES (1, ?)", (events,))

    def waiting(self) -> list[Delivery]:
        """Return the deliveries that wait, the oldest first."""
        query = (
            "SELECT id, url, form, body, attempts, due FROM queue WHERE due IS NOT NULL ORDER BY rowid"
        )
        with self._tables() as db:
            return [Delivery(*row) for row in db.execute(query)]

    def delivered(self, delivery: Delivery) -> None:
        """Forget a delivery."""
        with self._tables() as db:
            db.execute("DELETE FROM queue WHERE id = ? AND url = ?", (delivery.id, delivery.url))

    def postpone(self, delivery: Delivery, due: float | None) -> None:
        """Note a failed attempt, and when the next one is due; None gives it up."""
        with self._tables() as db:
            query = "UPDATE queue SET attempts = attempts + 1, due = ? WHERE id = ? AND url = ?"
            db.execute(query, (due, delivery.id, delivery.url))


def _damaged(path: Path, got: str) -> IntegrityError:
    return IntegrityError(
        "the state of the service is damaged",
        where=str(path),
        got=got,
        next_step="move the file away: deliveries that wait are lost with it, and no request",
    )
