"""Report every change of a request's state to URLs: signed webhooks, and OpenDSR's status callbacks.

    service:
      webhooks: [{url: https://dpo.example/hooks, secret_file: hook.secret, events: [completed]}]

A message follows Standard Webhooks: `webhook-id`, `webhook-timestamp` and `webhook-signature` beside a
body that names the request, its state and its due date, never a record. A receiver checks it:

    from standardwebhooks.webhooks import Webhook
    message = Webhook(secret).verify(body, headers)      # raises if it is forged, changed or old
    if headers["webhook-id"] in seen: ...                # delivered before: the id is the event's

Messages are made from the ledger's events, by position, so changes that commands make are reported, too,
and none is lost while no service runs. Each is delivered at least once; the messages to one URL keep
their order. A failed delivery is repeated (`RETRY_S`); after the last attempt, or an answer of 410, the
message is given up. A secret file has one secret a line, and all of them sign, so that a secret can be
replaced. Redirects are not followed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import stat
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError

from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from cluster.serve.engines import Unredirected
from cluster.serve.opendsr import opendsr_headers, opendsr_status, status_body, times_of
from cluster.serve.state import Delivery, ServiceState
from sisa.config.config import ServiceBlock, WebhookReceiver
from sisa.core.digest import sha256_hex
from sisa.core.errors import InvalidInput
from sisa.core.requests import Request, RequestEvent
from sisa.model import Model
from sisa.store.blobs.files import disk_errors

RETRY_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)  # as Standard Webhooks advises
ANSWER_S = 15.0
# URL, body and headers -> the status of the answer; 0: none came
Posting = Callable[[str, bytes, Mapping[str, str]], int]

_log = logging.getLogger(__name__)


def post_message(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Return the status that a receiver answers, or 0 if it does not answer."""
    headers = {**headers, "Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers)  # noqa: S310 - the run file allows this URL
    try:
        with urllib.request.build_opener(Unredirected).open(request, timeout=ANSWER_S) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException, ValueError):
        return 0


def secrets_of(receiver: WebhookReceiver) -> list[Webhook]:
    """Return the signers of messages to a receiver. Raise InvalidInput for an unusable secret."""
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


class Courier:
    """Report on the requests of one model."""

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
        delivered, blocked = 0, set[str]()
        for message in state.waiting():
            if message.url in blocked:  # by an earlier message, so that the order stays
                continue
            if not _names_receiver(settings, message):
                _log.warning("a message was given up: the run file does not name its receiver any more")
                state.postpone(message, None)
                continue
            is_due = message.due is not None and message.due <= self._now()
            if is_due and self._deliver(state, settings, signers, message):
                delivered += 1
            else:
                blocked.add(message.url)
        return delivered

    def _queue(self, state: ServiceState) -> None:
        seq, before = self._model.seq(), state.seen()
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
        """Return whether a message was delivered; postpone it, or give it up, if not."""
        at = datetime.fromtimestamp(self._now(), UTC)
        if message.form == "opendsr" and settings.opendsr is not None:
            headers = opendsr_headers(settings.opendsr, message.body.encode())
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
        if status == HTTPStatus.GONE or message.attempts >= len(RETRY_S):
            _log.warning("a message was given up after %d attempts", message.attempts + 1)
            state.postpone(message, None)
        else:
            state.postpone(message, self._now() + RETRY_S[message.attempts])
        return False


def _names_receiver(settings: ServiceBlock, message: Delivery) -> bool:
    """Return whether the run file still names the receiver of a message."""
    if message.form == "opendsr":
        return settings.opendsr is not None
    return any(each.url == message.url for each in settings.webhooks)


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
        block, status = settings.opendsr, opendsr_status(each.state)
        if block is not None and status and reported.get(each.request_id) != status:
            reported[each.request_id] = status
            for url in callbacks.get(each.request_id, ()):
                report = status_body(block, request.external_id, status, times_of(request))
                callback = {**report, "status_callback_url": url}
                yield Delivery(name, url, "opendsr", json.dumps(callback))
