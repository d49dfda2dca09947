"""Test the contract of tools that draw curves: TensorBoard, and MLflow if it is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster.observe.curves import Curves, Point, to_mlflow, to_tensorboard
from sisa.core.errors import EnvironmentFault

FIRST, SECOND = "20261125T213749Z-0000000a", "20261126T000000Z-0000000b"
POINTS = [
    Point("loss/shard-0/slice-1", 1, 2.5, 1000.0),
    Point("slices_trained", 1, 1.0, 1001.0),
    Point("loss/shard-0/slice-1", 2, 1.25, 1002.0),
]
Write = Callable[[Curves], None]
Held = Callable[[str], list[Point]]


def held_by_tensorboard(folder: Path, run: str) -> list[Point]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = (folder / run).iterdir()
    events: list[Any] = list(LegacyEventFileLoader(str(path)).Load())
    return [
        Point(value.tag, event.step, value.simple_value, event.wall_time)
        for event in events
        for value in event.summary.value
    ]


def held_by_mlflow(uri: str, run: str) -> list[Point]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("models")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`sisa.run` = '{run}'")
    points = [
        Point(key, each.step, each.value, each.timestamp / 1000)
        for key in found.data.metrics
        for each in client.get_metric_history(found.info.run_id, key)
    ]
    return sorted(points, key=lambda each: each.at)


@pytest.fixture(params=["tensorboard", "mlflow"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Write, Held]:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "tensorboard":
        return partial(to_tensorboard, tmp_path), partial(held_by_tensorboard, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return partial(to_mlflow, uri, "models"), partial(held_by_mlflow, uri)


def test_points_arrive_under_their_run(sink: tuple[Write, Held]) -> None:
    write, held = sink
    write({FIRST: POINTS, SECOND: POINTS[:1]})
    assert (held(FIRST), held(SECOND)) == (POINTS, POINTS[:1])


def test_a_run_takes_its_former_place(sink: tuple[Write, Held]) -> None:
    write, held = sink
    write({FIRST: POINTS[:2]})
    write({FIRST: POINTS})
    write({FIRST: POINTS})
    assert held(FIRST) == POINTS


def test_a_tool_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tensorboard", "mlflow"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(EnvironmentFault, match="tensorboard is not installed") as caught:
        to_tensorboard(tmp_path, {})
    assert "[tensorboard]" in caught.value.next_step
    with pytest.raises(EnvironmentFault, match="mlflow is not installed"):
        to_mlflow("http://localhost:1", "models", {})


def lacking(tracking_uri: str) -> Any:
    return importlib.import_module(f"no_such_library_for_{tracking_uri.partition(':')[0]}")


def test_what_mlflow_itself_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client imports a database's library when it first opens its address."""
    mlflow = ModuleType("mlflow")
    mlflow.__dict__.update(MlflowClient=lacking, MlflowException=RuntimeError)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with pytest.raises(EnvironmentFault, match="no_such_library_for_sqlite is not installed") as caught:
        to_mlflow("sqlite:///m.db", "models", {})
    assert "[mlflow]" in caught.value.next_step
