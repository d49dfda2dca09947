"""Report every change of a request's state to URLs: signed webhooks, and OpenDSR's status callbacks.

    service:
      webhooks: [{url: https://dpo.example/hooks, secret_file: hook.secret, events: [completed]}]

A message follows Standard Webhooks: `webhook-id`, `webhook-timestamp` and `webhook-signature` beside a
body that names the request, its state and its due date, never a record. A receiver checks it so:

    from standardwebhooks.webhooks import Webhook
    message = Webhook(secret).verify(body, headers)      # raises for what was forged, changed or is old
    if headers["webhook-id"] in seen: ...                # delivered again: the id is the event's

Messages are made from the ledger's events, by position, so changes that commands make are reported, too,
and none is lost while no service runs. Each is delivered at least once, those of one URL in their order.
A receiver that fails is tried again (`RETRY_S`); after the last attempt, or if it answers 410, the
message is given up. A secret file has a secret a line: the first signs, and so do others while they are
replaced. Redirects are not followed.

MODEL/service.sqlite holds what a service must not forget when it is started again; nothing of it names a
record or a person, and a lost file loses messages that wait, no request:

    used       digests of idempotency keys and of the calls that used them, for a week; those of
               OpenDSR's requests for access are their keyed names and subjects
    wanted     whether somebody asked to carry out requests now
    callbacks  where to report on a request, as its sender asked
    seen       up to which event of the ledger messages are queued
    queue      messages that wait, with their attempts; given up ones have no next time
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import stat
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Literal
from urllib.error import HTTPError

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from sisa.config.config import OpenDsrBlock, ServiceBlock, WebhookReceiver
from sisa.core.digest import sha256_hex
from sisa.core.domain import Request, RequestEvent, RequestState
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.requests import OPEN, UNDER_WAY
from sisa.evidence.database import transaction
from sisa.flows.wiring.upper_houses import SERVICE_STATE
from sisa.model import Model
from sisa.store.blobs.files import disk_errors

RETRY_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)  # as Standard Webhooks advises
ANSWER_S = 15.0
DsrStatus = Literal["pending", "in_progress", "completed", "cancelled"]

KEY_S = 7 * 86_400  # an idempotency key
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


_log = logging.getLogger(__name__)

Posting = Callable[
    [str, bytes, Mapping[str, str]], int
]  # URL, body and headers; the status, 0: no answer


class _Unredirected(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow no redirect: its target is not the receiver that was named."""


def post_message(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Return the status that a receiver answers, or 0 if it does not answer."""
    request = urllib.request.Request(url, body, {**headers, "Content-Type": "application/json"})  # noqa: S310 - of the run file, or allowed by it
    try:
        with urllib.request.build_opener(_Unredirected).open(request, timeout=ANSWER_S) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException, ValueError):
        return 0


def secrets_of(receiver: WebhookReceiver) -> list[Webhook]:
    """Return what signs for a receiver. Raise InvalidInput for a file that others can read."""
    path = receiver.secret_file
    with disk_errors(path):
        mode, lines = path.stat().st_mode, path.read_text("ascii", "replace").split()
    found = []
    with contextlib.suppress(ValueError, EmptyWebhookSecretError):
        found = [Webhook(each) for each in lines]
    if stat.S_IMODE(mode) & 0o077 or not found:
        raise InvalidInput(
            "the secret of a webhook can't be used",
            where=str(path),
            expected="`whsec_` and base64, a secret a line, in a file of mode 0600",
            next_step="chmod 600 the file, or write one: see cluster/serve/README.md",
        )
    return found


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
    """A call that is to be done once: what it asks, what it has led to, and when it was made."""

    asked: str
    request: str  # empty: it has not ended
    at: float


class ServiceState:
    """The state of the services of one model."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SERVICE_STATE

    def _tables(self) -> AbstractContextManager[Connection]:
        return transaction(self._path, _SCHEMA, damaged=_damaged)

    def used(self, key: str, asked: str) -> str | None:
        """Note a use of an idempotency key.

        Return the request that a former use has led to, empty for a new key or one whose call did not
        end, and None if it was used for another call.
        """
        now = time.time()
        with self._tables() as db:
            db.execute("DELETE FROM used WHERE at < ?", (now - KEY_S,))
            db.execute("INSERT OR IGNORE INTO used VALUES (?, ?, '', ?)", (key, asked, now))
            known, request = db.execute(
                "SELECT asked, request FROM used WHERE key = ?", (key,)
            ).fetchone()
        return request if known == asked else None

    def call(self, key: str) -> Call | None:
        """Return the call that has used a key, if one did within a week."""
        query = "SELECT asked, request, at FROM used WHERE key = ? AND at >= ?"
        with self._tables() as db:
            row = db.execute(query, (key, time.time() - KEY_S)).fetchone()
        return row and Call(*row)

    def end(self, key: str, request: str) -> bool:
        """Note that the call of a key has ended, once; return whether it had not before."""
        with self._tables() as db:
            query = "UPDATE used SET request = ? WHERE key = ? AND request = ''"
            return db.execute(query, (request, key)).rowcount > 0

    def note_done(self, key: str, request: str) -> None:
        """Note that the call of a key has led to a request."""
        with self._tables() as db:
            db.execute("UPDATE used SET request = ? WHERE key = ?", (request, key))

    def ask_to_run(self) -> None:
        """Note that what is approved is to be carried out now."""
        with self._tables() as db:
            db.execute("INSERT OR IGNORE INTO wanted VALUES (1)")

    def take_run(self) -> bool:
        """Return whether somebody asked to carry out requests, and forget it."""
        if not self._path.exists():
            return False
        with self._tables() as db:
            return db.execute("DELETE FROM wanted").rowcount > 0

    def add_callbacks(self, request: str, urls: Iterable[str]) -> None:
        """Note where to report on a request."""
        with self._tables() as db:
            db.executemany("INSERT OR IGNORE INTO callbacks VALUES (?, ?)", [(request, u) for u in urls])

    def callbacks(self) -> Mapping[str, list[str]]:
        """Return where to report, by request."""
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


class Courier:
    """What reports on the requests of one model."""

    def __init__(
        self, model: Model, post: Posting = post_message, now: Callable[[], float] = time.time
    ) -> None:
        self._model, self._post, self._now = model, post, now
        self._queued_at = -1  # the number of the ledger's commit whose events are queued

    def turn(self) -> int:
        """Queue messages about new events, deliver what is due, and return how many were delivered.

        Raise InvalidInput for a secret or a key that can't be used; messages wait until it can.
        """
        state = ServiceState(self._model.directory)
        self._queue(state)
        settings = self._model.config.service
        signers = {each.url: secrets_of(each) for each in settings.webhooks}
        delivered, late = 0, set[str]()
        for message in state.waiting():  # those of one receiver in their order
            if message.url in late:
                continue
            if message.form == "webhook" and message.url not in signers:
                _log.warning("a message was given up: the run file names its receiver no more")
                state.postpone(message, None)
                continue
            on_time = message.due is not None and message.due <= self._now()
            if on_time and self._deliver(state, settings, signers, message):
                delivered += 1
            else:
                late.add(message.url)
        return delivered

    def _queue(self, state: ServiceState) -> None:
        seq, before = self._model._seq(), state.seen()
        if seq == self._queued_at and before is not None:
            return
        events, requests = self._model.request_events()
        settings = self._model.config.service
        if before is not None and before < len(events):
            callbacks = state.callbacks()
            state.queue(_messages(settings, callbacks, requests, events, before), len(events))
        elif before != len(events):  # the first time; or a backup was restored
            state.queue((), len(events))
        self._queued_at = seq

    def _deliver(
        self,
        state: ServiceState,
        settings: ServiceBlock,
        signers: Mapping[str, list[Webhook]],
        message: Delivery,
    ) -> bool:
        at = datetime.fromtimestamp(self._now(), UTC)
        if message.form == "opendsr":
            headers = opendsr_headers(_block_of(settings), message.body.encode())
        else:
            signed = [each.sign(message.id, at, message.body) for each in signers[message.url]]
            headers = {
                "webhook-id": message.id,
                "webhook-timestamp": str(int(at.timestamp())),
                "webhook-signature": " ".join(signed),
            }
        status = self._post(message.url, message.body.encode(), headers)
        if 200 <= status < 300:
            state.delivered(message)
            return True
        over = status == HTTPStatus.GONE or message.attempts >= len(RETRY_S)
        state.postpone(message, None if over else self._now() + RETRY_S[message.attempts])
        if over:
            _log.warning("a message was given up after %d attempts", message.attempts + 1)
        return False


def opendsr_status(state: RequestState) -> DsrStatus | None:
    """Return OpenDSR's word for a request's state; None for one that changes nothing.

    >>> opendsr_status("held"), opendsr_status("erased"), opendsr_status("denied")
    ('pending', 'in_progress', 'cancelled')
    """
    if state in OPEN:
        return "pending"
    if state in UNDER_WAY:
        return "in_progress"
    if state == "completed":
        return "completed"
    return None if state == "failed" else "cancelled"


def status_body(
    block: OpenDsrBlock, name: str | None, status: DsrStatus | None, expected: str, **more: str
) -> dict[str, Any]:
    """Return what a status or a callback says of a request, given its `subject_request_id`."""
    return {
        "controller_id": block.controller_id,
        "subject_request_id": name,
        "request_status": status,
        "expected_completion_time": expected,
        **more,
    }


def _block_of(settings: ServiceBlock) -> OpenDsrBlock:
    if settings.opendsr is None:
        step = "restore the block, so that its callbacks can be sent"
        raise InvalidInput("OpenDSR is not set up", where="service.opendsr", next_step=step)
    return settings.opendsr


def opendsr_headers(block: OpenDsrBlock, body: bytes) -> dict[str, str]:
    """Return the headers that sign a body. Raise InvalidInput for a key that can't be used."""
    with disk_errors(block.key):
        mode, pem = block.key.stat().st_mode, block.key.read_bytes()
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if isinstance(key, rsa.RSAPrivateKey) and not mode & 0o077:
        signature = key.sign(body, padding.PKCS1v15(), hashes.SHA256())
    elif isinstance(key, ec.EllipticCurvePrivateKey) and not mode & 0o077:
        signature = key.sign(body, ec.ECDSA(hashes.SHA256()))
    else:
        raise InvalidInput(
            "the key of OpenDSR can't be used",
            where=str(block.key),
            expected="an RSA or EC key in PEM, unsealed, in a file of mode 0600",
            got=f"mode {stat.S_IMODE(mode):o}" if mode & 0o077 else "another file",
        )
    return {
        "X-OpenDSR-Processor-Domain": block.domain,
        "X-OpenDSR-Signature": base64.b64encode(signature).decode(),
    }


def expected_by(request: Request) -> str:
    return f"{request.due}T23:59:59Z"


def _messages(
    settings: ServiceBlock,
    callbacks: Mapping[str, list[str]],
    requests: Mapping[str, Request],
    events: Sequence[RequestEvent],
    before: int,
) -> Iterable[Delivery]:
    """Yield a message for each event after the first `before`, for each receiver that wants it."""
    reported = {
        each.request_id: status for each in events[:before] if (status := opendsr_status(each.state))
    }
    for number, each in enumerate(events[before:], before + 1):
        name, request = f"msg_{sha256_hex(each.link.encode())[:32]}", requests[each.request_id]
        data = {
            "request_id": each.request_id,
            "external_id": request.external_id,
            "state": each.state,
            "due": request.due,
            "event": number,
        }
        body = {"type": f"request.{each.state}", "timestamp": each.at, "data": data}
        for receiver in settings.webhooks:
            if not receiver.events or each.state in receiver.events:
                yield Delivery(name, receiver.url, "webhook", json.dumps(body))
        status = opendsr_status(each.state)
        if status and reported.get(each.request_id) != status:
            reported[each.request_id] = status
            for url in callbacks.get(each.request_id, ()):
                more = {"status_callback_url": url}
                due = expected_by(request)
                said = status_body(_block_of(settings), request.external_id, status, due, **more)
                yield Delivery(name, url, "opendsr", json.dumps(said))


def check_receivers(settings: ServiceBlock) -> None:
    """Raise InvalidInput unless every receiver has a secret that can be used."""
    for each in settings.webhooks:
        secrets_of(each)
