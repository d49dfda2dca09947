"""How the whole suite runs: fast tests first, hypothesis the same on every machine.

Tests run in random order, but those without torch or sockets come before those with a tiny model, and
Ray and the real model come last, so that most failures show within seconds. In several processes
(`-n 2`) each takes one test after another, in this order.

What a model keeps outside its directory goes to a state directory of the test's own.

A failure must be repeatable from the log alone, so examples are derived from the test, no database is
kept beside the tree, and the blob that reproduces a failure is printed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.s3_server import Server, environment, running

COST = ("torch", "ray", "slow")  # markers, cheapest first

settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, print_blob=True
)
settings.load_profile("deterministic")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable sort by the dearest marker, after the plugin that shuffles."""
    items.sort(
        key=lambda item: max(
            (COST.index(m.name) + 1 for m in item.iter_markers() if m.name in COST), default=0
        )
    )


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def s3(_s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A real S3 server that the environment names; started by the first test that asks for it."""
    for name, value in environment(_s3_server).items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(scope="session", autouse=True)
def _shared_state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For models that several tests share; no test reaches the state directory of the person at work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("shared-state")))
        yield


@pytest.fixture(autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of one model bear one name: what a test does to its copy must not reach the next test's.

    Not the test's own `monkeypatch`, which it may undo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
