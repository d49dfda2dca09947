"""Provide one tiny base, one trained model and one Ray per session; each test gets its own copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Tiny, train_scratch


@pytest.fixture(scope="session", autouse=True)
def _metrics_every_second() -> Iterator[None]:
    """Make Ray export metrics every second instead of every ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        yield


@pytest.fixture(autouse=True)
def _shared_ray(request: pytest.FixtureRequest) -> None:
    """Start the Ray that tests with the mark `ray` share, unless the test asks for `own_ray`."""
    if _shares_ray(request.node):
        from tests.models.programs.clusters import share_ray

        share_ray()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared Ray after the last test in a row that shares it.

    Its environment variables must be gone before a module of the next test sets its own.
    """
    if _shares_ray(item) and not _shares_ray(nextitem):
        from cluster.ray.session import disconnect

        disconnect()


def _shares_ray(item: pytest.Item | None) -> bool:
    marked = item is not None and item.get_closest_marker("ray") is not None
    return marked and "own_ray" not in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base of all models of a session."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def smallest_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base of one narrow layer, for many records of which only where they go matters."""
    return make_tiny_base(tmp_path_factory.mktemp("smallest") / "base", hidden=16, layers=1)


@pytest.fixture(scope="session")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base that knows two people's records by heart (`patch_bench.KNOWN`)."""
    from tests.models.patch_bench import make_knowing_base

    return make_knowing_base(tmp_path_factory.mktemp("knowing"))


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    from sisa.data.samples import make_people

    folder = tmp_path_factory.mktemp("template")
    train_scratch(folder, tiny_base, make_people(12, 2))
    return folder


@pytest.fixture
def tiny(_template: Path, tiny_base: Path, tmp_path: Path) -> Tiny:
    """Return a model for one test to change: 12 people with 2 records each, in 3 shards of 2 slices."""
    folder = tmp_path / "tiny"
    shutil.copytree(_template, folder)
    copy = Tiny(folder, tiny_base)
    copy.train()  # records the new path
    return copy
