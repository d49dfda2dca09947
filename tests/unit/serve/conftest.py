"""A service over a small model of fakes, and a client of it, for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cluster.serve.app import build_app
from cluster.serve.domain import Service
from sisa.config.config import ServiceBlock
from sisa.model import open_model
from tests.fakes.answers import FakeAnswers

LOOPBACK = "http://127.0.0.1"


@pytest.fixture
def service(bare: Path) -> Service:
    """Return a service without tokens over a copy of the model."""
    return Service(open_model(bare), FakeAnswers(), tokens=None, settings=ServiceBlock())


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    """Return a client of the service, as one on the same machine."""
    with TestClient(build_app(service), base_url=LOOPBACK) as made:
        yield made
