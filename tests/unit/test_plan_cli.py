"""`sisa plan` and `sisa simulate` at the keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from sisa.assign import Layout
from sisa.runfile import load_run_file
from sisa.stream import Stream, replay
from tests.fakes import fake_record
from tests.unit import care_model

RUN_FILE = """
datasets: [{path: owner/people}]
output_dir: model
sisa: {shards: 3, slices: 2, schedule: sequential, embedder: hashing}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return str(path)


def test_the_run_files_layout_is_replayed(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--records", "900", "--deletions", "60", "--batch", "3", "--seed", "5"]
    assert cli.run(["simulate", run_file, *arguments, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    found = replay(Stream(Layout(3, 2), "sequential"), 900, 60, batch=3, seed=5)
    assert body["record_epochs_retrained"] == found.record_epochs
    assert body["full_trainings"] == found.record_epochs / found.full_record_epochs
    assert cli.run(["simulate", run_file, *arguments]) == 0
    assert f"{found.record_epochs:,} record-epochs" in capsys.readouterr().out
    assert not (Path(run_file).parent / "model").exists()


def test_another_layout_stands_in_for_the_run_files(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--records", "900", "--deletions", "60", "--shards", "30", "--slices", "4"]
    assert cli.run(["simulate", run_file, *arguments, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["shards"], body["slices"], body["batch"]) == (30, 4, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--records", "10", "--deletions", "11"],
        ["--records", "0", "--deletions", "1"],
        ["--records", "10", "--deletions", "1", "--batch", "0"],
        ["--records", "10"],
        ["--records", "10", "--deletions", "1", "--risk", "half"],
        ["--records", "10", "--deletions", "1", "--risk", "0.5:1"],
        ["--records", "10", "--deletions", "1", "--risk", "1:0"],
        ["--records", "10", "--deletions", "6", "--risk", "0.5:1", "--risk", "0.5:0"],
    ],
)
def test_impossible_streams_are_bad_usage(
    run_file: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["simulate", run_file, *arguments]) == 2
    assert capsys.readouterr().out == ""


def planned(
    run_file: str, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> dict[str, Any]:
    asked = ["plan", run_file, "--records", "5000", "--deletions-per-month", "20", *arguments, "--json"]
    assert cli.run(asked) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_recommended_choice_is_the_cheapest_within_the_limits(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(run_file, capsys, "--budget-gb", "1.5", "--checkpoint-mb", "10")
    best = found["recommended"]
    assert best["stored_bytes"] <= 1.5e9
    assert found["units"] == "given"
    assert best["hours_to_utility"] is None
    within = [each for each in found["choices"] if not each["over"]]
    assert best["one_by_one"] == min(each["one_by_one"] for each in within)
    assert any(each["over"] == ["bytes"] for each in found["choices"])
    assert best["num_kept"] == sum(map(len, best["kept"]))
    deep = planned(run_file, capsys, "--min-depth", "0.8")["recommended"]
    assert deep["num_orders"] > 1
    assert deep["serving_depth"] >= 0.8


def test_without_a_choice_within_the_limits_the_exit_code_says_so(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = ["--budget-gb", "0.001"]
    assert planned(run_file, capsys, *tight, code=2)["recommended"] is None
    cli.run(["plan", run_file, "--records", "5000", "--deletions-per-month", "20", *tight])
    assert "nothing fits" in capsys.readouterr().out


def test_hours_need_a_rate_or_a_model(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", run_file, "--records", "50", "--deletions-per-month", "2", "--max-hours", "3"]
    assert cli.run(asked) == 2
    assert "--rate" in capsys.readouterr().err
    found = planned(run_file, capsys, "--max-hours", "0.05", "--rate", "10")
    assert found["recommended"]["hours_to_utility"] <= 0.05
    config = load_run_file(Path(run_file))
    care_model.train_in(tmp_path / "model", config, [fake_record(n) for n in range(12)])
    assert planned(run_file, capsys)["units"] == "of the model's own stages"


def test_choices_are_drawn_into_a_file(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    groups = ["--risk", "0.9:0.001", "--risk", "0.1:0.05"]
    found = planned(run_file, capsys, *groups, "--rate", "9", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["recommended"]["thresholds"] == [0.05]
