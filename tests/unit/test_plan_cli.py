"""`sisa simulate` at the keyboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import cli
from sisa.stream import Layouted, replay

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
    found = replay(Layouted(3, 2, "sequential"), 900, 60, batch=3, seed=5)
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
    ],
)
def test_impossible_streams_are_bad_usage(
    run_file: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["simulate", run_file, *arguments]) == 2
    assert capsys.readouterr().out == ""
