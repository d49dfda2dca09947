"""Set the order and environment of the whole suite: fast tests first, the same hypothesis everywhere.

Tests run in random order, but those without torch or sockets run before the others, so that most
failures show within seconds. With several processes (`-n 2`), each takes one test after another, in this
order. Tests with a Ray follow the fast ones in one process that shares it. Tests that share something
expensive made once in their file also run in one process (`xdist_group`). Slow tests precede short ones
that train tiny models, so that all processes end together.

Whatever a model keeps outside its directory goes to a state directory of the test's own. Files of tests
are in memory if there is room: every write is synced, which would cost thousands of waits for a disk.
`PYTEST_DEBUG_TEMPROOT=/tmp` uses the disk.

A failure must be repeatable from the log alone, so examples are derived from the test, no database is
kept beside the tree, and the blob that reproduces a failure is printed. `--hypothesis-profile full`
tries all examples; otherwise a share is tried (`examples.py`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from _pytest.nodeid import coerce_node_id
from hypothesis import settings

from tests.examples import FULL, num_examples
from tests.fakes.postgres_server import PostgresServer, running_postgres
from tests.fakes.s3_server import Server, environment, running

TURNS = ("ray", "slow", "torch")  # markers, in the order in which they follow the fast tests
MEMORY = Path("/dev/shm")  # noqa: S108 - pytest makes a private directory in it
ROOM_BYTES = 4 * 2**30  # a whole run leaves less than a tenth of this behind

settings.register_profile(
    "deterministic",
    max_examples=num_examples(100, share=2),  # of a property that names no number
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
)
settings.register_profile(FULL, settings.get_profile("deterministic"), max_examples=100)
settings.load_profile("deterministic")


def _has_room(directory: Path) -> bool:
    if not os.access(directory, os.W_OK):
        return False
    return min(shutil.disk_usage(directory).free, psutil.virtual_memory().available) >= ROOM_BYTES


if _has_room(MEMORY):  # before pytest first asks for a directory
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
# At Ray's own 15, workers starve beside the other process of the tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# Hundreds of processes follow, and each would compile the same modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_itemcollected(item: pytest.Item) -> None:
    """Append a test's group to its name in xdist's processes.

    xdist 3.8 does so where pytest 9 does not look.
    """
    if getattr(item.config.option, "loadgroup", False) and (group := _group(item)):
        item._id = coerce_node_id(f"{item.nodeid}@{group}")


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("ray"):
        return "ray"
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests stably, after the plugin that shuffles them."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[int, bool]:
    marks = {mark.name for mark in item.iter_markers()}
    turn = next((number for number, name in enumerate(TURNS, start=1) if name in marks), 0)
    if "ray" in marks:
        return turn, "own_ray" in getattr(item, "fixturenames", ())
    return turn, not _group(item)


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def s3(_s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Return a real S3 server that the environment names; the first test that asks for it starts it."""
    for name, value in environment(_s3_server).items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Return a real PostgreSQL server; the first test that asks for it starts it."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def own_ray() -> Iterator[None]:
    """Let a test start, end or break its own Ray; such tests run after those that share one."""
    from cluster.ray.session import disconnect

    disconnect()
    yield
    disconnect()


@pytest.fixture(scope="session", autouse=True)
def _shared_state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a state directory for models that several tests share, so that no test uses the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("shared-state")))
        yield


@pytest.fixture(autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a state directory for each test: copies of one model have one name and would share it.

    The test's own `monkeypatch` is not used, since the test may undo it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use caches and temporary directories that other runs do not share."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("SISA_CACHE", str(tmp_path / "cache"))
