"""The keyring of a model without encryption, which needs no fake: it makes no key and seals nothing."""

from __future__ import annotations

from pathlib import Path

from sisa.store.blobs.keyring import FileKeyring

PLAIN = FileKeyring(Path("no-keyring"), seals=False)
