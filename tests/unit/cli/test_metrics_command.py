"""`sisa metrics` at the command line, and lines as curves; erased losses have no point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import cli, maintenance
from cluster.observe.curves import Curves, points, summary
from sisa.store.areas import METRICS
from sisa.store.metrics import KEPT, FileMetrics, without_losses
from tests.fakes.metrics import EVENTS, RUN, kept
from tests.models import confessing

LINES = [kept(event) for event in EVENTS if isinstance(event, KEPT)]


def test_lines_become_curves() -> None:
    found = {each.curve: (each.step, each.value) for each in points(LINES)}
    assert found == {
        "loss/shard-2/slice-1": (1, 0.75),
        "slice_seconds": (1, 2.5),
        "slices_trained": (1, 1.0),
        "tokens_trained": (1, 900.0),
        "tokens_per_second": (1, 360.0),
        "queue/depth": (1, 2.0),
        "queue/undecided": (1, 1.0),
        "queue/held": (1, 0.0),
        "queue/failed_erasures": (1, 1.0),
        "queue/oldest_days_left": (1, -3.0),
        "deletion/seconds": (1, 12.5),
        "deletion/records": (1, 4.0),
        "deletion/erasure_failures": (1, 1.0),
    }
    gone = points([without_losses(line, set()) for line in LINES])
    assert {each.curve for each in gone} == found.keys() - {
        *("loss/shard-2/slice-1", "tokens_trained", "tokens_per_second")
    }


def test_a_run_in_a_few_numbers() -> None:
    assert summary(LINES) == {
        "began": LINES[0]["at"],
        "slices_trained": 1,
        "tokens": 900,
        "seconds": 2.5,
        "tokens_per_second": 360.0,
        "last_loss": 0.75,
        "deletions": 1,
        "erasure_failures": 1,
    }
    assert summary([])["last_loss"] is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "model"
    confessing.build(folder)
    for line in LINES:
        FileMetrics(folder / METRICS).append(line)
    return folder


def test_runs_are_shown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["metrics", "-m", str(model), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["runs"], body["passed_on"]) == ([{"run": RUN, **summary(LINES)}], None)
    assert cli.run(["metrics", "-m", str(model)]) == 0
    text = capsys.readouterr().out
    assert f"{RUN}: 1 slice, 900 tokens, 360 tok/s a worker, last loss 0.7500" in text
    assert "1 erasure FAILED" in text


def test_runs_are_passed_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, int] = {}
    asked: list[tuple[str, str]] = []

    def to_fake(uri: str, experiment: str, curves: Curves) -> None:
        asked.append((uri, experiment))
        taken.update({run: len(found) for run, found in curves.items()})

    monkeypatch.setattr(maintenance, "to_mlflow", to_fake)
    assert cli.run(["metrics", "-m", str(model), "--to", "mlflow", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed_on"] == ["mlflow", str(tmp_path)]
    assert (taken, asked) == ({RUN: 13}, [(str(tmp_path), model.parent.name)])


def test_a_run_that_is_none_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["metrics", "-m", str(model), "--run", "../../secret"]) == 4
    assert cli.run(["metrics", "-m", str(model), "--to", "paper", "x"]) == 2
    assert "is not one of" in capsys.readouterr().err


def test_the_tool_is_chosen_by_its_name(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = tmp_path / "board"
    assert cli.run(["metrics", "-m", str(model), "--to", "tensorboard", str(board)]) == 0
    assert [each.name for each in board.iterdir()] == [RUN]
