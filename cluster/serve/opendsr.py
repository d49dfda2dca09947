"""Speak OpenDSR: the states, bodies and signatures of responses and status callbacks.

`api/opendsr.py` has the endpoints, and `webhooks.py` sends the callbacks.
"""

from __future__ import annotations

import base64
import stat
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from sisa.config.config import OpenDsrBlock
from sisa.core.errors import InvalidInput
from sisa.core.requests import OPEN, OPENDSR, UNDER_WAY, Request, RequestState
from sisa.store.blobs.files import disk_errors

CLOCK_SKEW = timedelta(minutes=5)  # by which others' clocks may be ahead, as receivers of webhooks allow
DsrStatus = Literal["pending", "in_progress", "completed", "cancelled"]


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


class DsrTimes(NamedTuple):
    """When a request came and when it should be complete, named and written as in OpenDSR's bodies."""

    received_time: str
    expected_completion_time: str


def status_body(
    block: OpenDsrBlock, name: str | None, status: DsrStatus | None, times: DsrTimes
) -> dict[str, Any]:
    """Return the body of a status or a callback; `name` is the `subject_request_id`.

    OpenDSR has `received_time` in its first response alone; here every status says it, too.
    """
    return {
        "controller_id": block.controller_id,
        "subject_request_id": name,
        "request_status": status,
        **times._asdict(),
    }


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


def day_asked(submitted_time: datetime, now: datetime) -> str:
    """Return the day, in UTC, on which a person asked the controller, whose clock may be a little ahead.

    >>> now = datetime(2026, 1, 31, 23, 58, tzinfo=UTC)
    >>> [day_asked(now + timedelta(minutes=each), now) for each in (-30, 4, 6)]
    ['2026-01-31', '2026-01-31', '2026-02-01']
    """
    ahead = timedelta(0) < submitted_time - now <= CLOCK_SKEW
    return (now if ahead else submitted_time).astimezone(UTC).date().isoformat()


def times_of(request: Request) -> DsrTimes:
    """Return when a request came here, and the end of its due date.

    The `received_on` of one that came by OpenDSR is the day on which the person asked the controller.
    """
    late = "" if request.reason == OPENDSR else request.received_on
    found = datetime.fromisoformat(late or request.created_at)
    received = found if found.tzinfo else found.replace(tzinfo=UTC)
    return DsrTimes(received.isoformat(timespec="seconds"), f"{request.due}T23:59:59Z")
