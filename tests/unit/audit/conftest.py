"""The files of a service in a model, for the tests of this room."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.serve.state import ServiceState
from cluster.serve.tokens import Tokens
from sisa.flows.wiring.upper_houses import SERVICE, SERVICE_STATE, TOKENS
from sisa.store.blobs.files import write_atomic
from sisa.store.ledger.sqlite import COMMIT_LOCK


@pytest.fixture
def service_files(model: Path) -> Iterator[tuple[str, ...]]:
    """Leave all that a service keeps in the model's directory, its database in use; return the names."""
    Tokens(model).add("anna", "officer")
    write_atomic(model / SERVICE, b'{"url": "http://127.0.0.1:8808", "token": "of the owner"}')
    ServiceState(model).ask_to_run()
    with closing(sqlite3.connect(model / SERVICE_STATE)) as other:
        other.execute("PRAGMA journal_mode=wal")
        other.execute("DELETE FROM wanted")
        other.commit()
        state = (SERVICE_STATE, f"{SERVICE_STATE}-wal", f"{SERVICE_STATE}-shm")
        yield SERVICE, TOKENS, *state, COMMIT_LOCK
