"""`sisa plan` and `sisa simulate` at the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from cluster.render.plan_picture import draw_choices
from sisa.config.runfile import load_run_file, parse_run_file
from sisa.planning.deletion_stream import Stream, replay_stream
from sisa.planning.layout import Layout
from sisa.planning.layout_advice import Demand, LayoutLimits, advise, recommended
from tests.fakes.ports import fake_record
from tests.models import confessing
from tests.unit.commands import Ask, Sisa

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


@pytest.fixture
def planned(ask: Ask, run_file: str) -> Ask:
    """Run `sisa plan` for 5,000 records and 20 deletions a month; return its JSON."""
    asked = ("plan", run_file, "--records", "5000", "--deletions-per-month", "20")
    return lambda *arguments, code=0: ask(*asked, *arguments, code=code)


def test_the_run_files_layout_is_replayed(run_file: str, ask: Ask, sisa: Sisa) -> None:
    asked = [
        "simulate",
        run_file,
        "--records",
        "900",
        "--deletions",
        "60",
        "--batch",
        "3",
        "--seed",
        "5",
    ]
    body = ask(*asked)
    found = replay_stream(Stream(Layout(3, 2), "sequential"), 900, 60, batch=3, seed=5)
    assert body["record_epochs_retrained"] == found.record_epochs
    assert body["full_trainings"] == found.record_epochs / found.full_record_epochs
    assert f"{found.record_epochs:,} record-epochs" in sisa(*asked)[1]
    assert not (Path(run_file).parent / "model").exists()


def test_another_layout_stands_in_for_the_run_files(run_file: str, ask: Ask) -> None:
    layout = ("--shards", "30", "--slices", "4")
    body = ask("simulate", run_file, "--records", "900", "--deletions", "60", *layout)
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
        ["--records", "10", "--deletions", "1", "--seed", "-1"],
    ],
)
def test_impossible_streams_are_bad_usage(run_file: str, arguments: list[str], sisa: Sisa) -> None:
    assert sisa("simulate", run_file, *arguments)[:2] == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--deletions-per-month", "nan"],
        ["--deletions-per-month", "inf"],
        ["--deletions-per-month", "5001"],
        ["--deletions-per-month", "2", "--rate", "inf"],
        ["--deletions-per-month", "2", "--plot", "plan.txt"],
        ["--deletions-per-month", "2", "--plot", "nowhere/plan.png"],
    ],
)
def test_impossible_plans_are_bad_usage(
    run_file: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sisa: Sisa
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sisa("plan", run_file, "--records", "5000", *arguments)[:2] == (2, "")


def test_options_that_do_not_fit_are_reported_together(run_file: str, ask: Ask) -> None:
    asked = ["--records", "9", "--deletions-per-month", "20", "--max-hours", "3", "--plot", "x.txt"]
    found = ask("plan", run_file, *asked, "--risk", "a", "--risk", "2:1", code=2)
    wanted = ["--risk", "--risk", "--deletions-per-month", "--max-hours", "--plot"]
    assert [each["where"] for each in found["error"]["problems"]] == wanted
    banded = Path(run_file).with_name("banded.yaml")
    banded.write_text(RUN_FILE.replace("slices: 2", "slices: 2, bands: {thresholds: [0.1]}"))
    asked = ["--records", "9", "--deletions", "2", "--slices", "1", "--risk", "0.5:1"]
    found = ask("simulate", banded, *asked, code=2)
    assert [each["where"] for each in found["error"]["problems"]] == ["--risk", "--slices"]


def test_a_picture_without_its_library_is_an_environment_fault(
    planned: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = planned("--plot", tmp_path / "plan.png", code=6)["error"]
    assert "deletion-ready-model[notebook]" in error["next_step"]


def test_the_recommended_choice_is_the_cheapest_within_the_limits(planned: Ask) -> None:
    found = planned("--budget-gb", "1.5", "--checkpoint-mb", "10")
    best = found["recommended"]
    assert best["stored_bytes"] <= 1.5e9
    assert found["units"] == "given"
    assert best["hours_to_utility"] is None
    within = [each for each in found["choices"] if not each["over"]]
    assert best["one_by_one"] == min(each["one_by_one"] for each in within)
    assert any(each["over"] == ["bytes"] for each in found["choices"])
    assert best["num_kept"] == sum(map(len, best["kept"]))
    deep = planned("--min-depth", "0.8")["recommended"]
    assert deep["num_orders"] > 1
    assert deep["serving_depth"] >= 0.8
    assert deep["training"] > best["training"] == pytest.approx(1)
    assert best["record_epochs_to_utility"] > 0


@pytest.mark.parametrize(
    "limits", [[], ["--min-depth", "0.8"], ["--budget-gb", "0.5", "--checkpoint-mb", "1"]]
)
def test_the_recommended_choice_is_a_block_of_a_run_file(
    run_file: str, limits: list[str], planned: Ask, sisa: Sisa
) -> None:
    groups = ["--risk", "0.9:0.001", "--risk", "0.1:0.05"]
    found = planned(*groups, *limits)
    best, block = found["recommended"], found["run_file"]["sisa"]
    asked = ("plan", run_file, "--records", "5000", "--deletions-per-month", "20")
    block_text = sisa(*asked, *groups, *limits)[1].split("\n\n")[1]
    assert yaml.safe_load(block_text) == {"sisa": block}
    own = parse_run_file(
        f"datasets: [{{path: a.jsonl}}]\noutput_dir: model\n{block_text}\n", "run.yaml"
    ).sisa
    assert (own.shards, own.slices, own.orders) == (
        best["num_shards"],
        best["num_slices"],
        best["num_orders"],
    )
    assert own.bands is not None
    assert list(own.bands.thresholds) == best["thresholds"]
    whole = sum(len(kept) - kept[-1] - 1 for kept in best["kept"]) == 0
    assert own.checkpoint_budget_bytes == (None if whole else 500_000_000)
    assert whole == ("--budget-gb" not in limits)


def test_without_a_choice_within_the_limits_the_exit_code_says_so(
    run_file: str, planned: Ask, sisa: Sisa
) -> None:
    assert planned("--budget-gb", "0.001", code=2)["recommended"] is None
    asked = ("plan", run_file, "--records", "5000", "--deletions-per-month", "20")
    assert "nothing fits" in sisa(*asked, "--budget-gb", "0.001")[1]


def test_hours_need_a_rate_or_a_model(run_file: str, tmp_path: Path, planned: Ask) -> None:
    (problem,) = planned("--max-hours", "3", code=2)["error"]["problems"]
    assert "--rate" in problem["what"]
    found = planned("--max-hours", "0.05", "--rate", "10")
    assert found["recommended"]["hours_to_utility"] <= 0.05
    config = load_run_file(Path(run_file))
    confessing.train_in(tmp_path / "model", config, [fake_record(n) for n in range(12)])
    assert planned()["units"] == "of the model's own stages"


def test_choices_are_drawn_into_a_file(tmp_path: Path, planned: Ask) -> None:
    picture = tmp_path / "plan.png"
    groups = ["--risk", "0.9:0.001", "--risk", "0.1:0.05"]
    found = planned(*groups, "--rate", "9", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["recommended"]["thresholds"] == [0.05]


@pytest.mark.parametrize("rate", [0.0, 9.0])
def test_each_layout_has_a_colour_and_each_cost_a_panel(rate: float) -> None:
    limits = LayoutLimits(1_000_000, record_epochs_per_s=rate)
    advised = advise(Demand(5_000, 20.0), limits)
    figure = draw_choices(advised, recommended(advised))
    *costs, orders = figure.axes
    assert len(costs) == 7
    layouts = {str(each.num_shards) for each in advised}
    for axis in costs:
        lines = [line for line in axis.get_lines() if line.get_label() in layouts]
        assert len(lines) == len({line.get_color() for line in lines}) == len(layouts)
    assert ("hours" in costs[-1].get_title()) == (rate > 0)
    assert [each.get_text() for each in orders.texts] == ["1", "2", "4"]
    assert draw_choices(advised, None).axes
