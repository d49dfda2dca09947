"""A place for a ledger, and an empty ledger, of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sisa.core.ports import Ledger
from sisa.store.ledger.ledger import SqlLedger
from tests.contract.ledger.ledgers import opened
from tests.fakes.ledger import FakeLedger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, path: Path) -> Path | str:
    """Return where a ledger can be made, in either database."""
    return path if request.param == "sqlite" else request.getfixturevalue("postgres").new_url()


@pytest.fixture
def sql(place: Path | str) -> Iterator[SqlLedger]:
    with opened(place, create=True) as ledger:
        yield ledger


@pytest.fixture
def in_file(path: Path) -> Iterator[SqlLedger]:
    with opened(path, create=True) as ledger:
        yield ledger


@pytest.fixture(params=["fake", "sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, path: Path) -> Iterator[Ledger]:
    if request.param == "fake":
        yield FakeLedger()
    else:
        server = request.getfixturevalue("postgres") if request.param == "postgres" else None
        with opened(server.new_url() if server else path, create=True) as found:
            yield found
