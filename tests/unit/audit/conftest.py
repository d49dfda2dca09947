"""The command line as the tests of this room type it, and the files of a service in a model."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import cli
from cluster.serve.state import ServiceState
from cluster.serve.tokens import Tokens
from sisa.flows.wiring.upper_houses import SERVICE, SERVICE_STATE, TOKENS
from sisa.store.blobs.files import write_atomic
from sisa.store.ledger.database import COMMIT_LOCK


@pytest.fixture
def sisa(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run a command; return its exit code, its JSON, and all that it printed."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code = cli.run([*map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        return code, json.loads(out), out + err

    return run


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
