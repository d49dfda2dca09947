"""The order and surroundings of the whole suite: fast tests first, hypothesis the same on every
machine.

Tests run in random order, but those without torch or sockets come before the others, so that most
failures show within seconds. With several processes (`-n 2`) each takes one test after another, in this
order. Tests with a Ray follow the fast ones in one process that shares it. Tests over something
expensive that their file makes once are in one process, too (`xdist_group`). Slow tests precede short
ones that train tiny models, so that all processes end together.

What a model keeps outside its directory goes to a state directory of the test's own. Files of tests are
in memory where there is room: every write is synced, which would cost thousands of waits for a disk.
`PYTEST_DEBUG_TEMPROOT=/tmp` uses the disk.

A failure must be repeatable from the log alone, so examples are derived from the test, no database is
kept beside the tree, and the blob that reproduces a failure is printed. `--hypothesis-profile full`
tries all examples of the properties whose full number is named, otherwise a share (`examples.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from _pytest.nodeid import coerce_node_id
from hypothesis import settings

from tests.examples import FULL
from tests.fakes.s3_server import Server, environment, running

TURNS = ("ray", "slow", "torch")  # markers, by their turn after the fast tests
MEMORY = Path("/dev/shm")  # noqa: S108 - pytest makes a private directory in it
ROOM_BYTES = 4 * 2**30  # a whole run leaves less than a tenth of it

settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, print_blob=True
)
settings.register_profile(FULL, settings.get_profile("deterministic"))
settings.load_profile("deterministic")


def _has_room(directory: Path) -> bool:
    if not os.access(directory, os.W_OK):
        return False
    return min(shutil.disk_usage(directory).free, psutil.virtual_memory().available) >= ROOM_BYTES


if _has_room(MEMORY):  # before pytest first asks for a directory
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_itemcollected(item: pytest.Item) -> None:
    """In a process of xdist's, a test's name ends in its group; xdist 3.8 writes it where pytest 9 does
    not look."""
    if getattr(item.config.option, "loadgroup", False) and (group := _group(item)):
        item._id = coerce_node_id(f"{item.nodeid}@{group}")


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("ray"):
        return "ray"
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable sort, after the plugin that shuffles."""
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
    """A real S3 server that the environment names; started by the first test that asks for it."""
    for name, value in environment(_s3_server).items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture
def own_ray() -> Iterator[None]:
    """For a test that starts, ends or breaks its Ray itself; they come after those that share one."""
    from cluster.ray.ray_session import disconnect

    disconnect()
    yield
    disconnect()


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
