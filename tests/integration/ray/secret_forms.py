"""The forms in which a secret may be written."""

from __future__ import annotations

import base64


def forms(secret: bytes) -> set[bytes]:
    """Return a secret in the forms in which it may be written."""
    text = base64.b64encode(secret)
    return {
        secret,
        secret.hex().encode(),
        text.rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
    }
