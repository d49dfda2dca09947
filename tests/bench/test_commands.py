"""Benchmarks run to their end at their smallest, so that a change elsewhere breaks none unnoticed.

Each command's `main` writes its JSON, from which its tables are made. A test fails for a command that is
named nowhere.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from sisa.data.reader import read_records
from sisa.data.samples import make_people
from sisa.lm.routing.embedder import HashingEmbedder
from tests.bench.answering import routing
from tests.bench.command import read, write
from tests.bench.training.equal_shards import Bench
from tests.fakes.benchmarks import MADE_UP, write_made_up
from tests.models.patched import QUIET
from tests.models.tiny_base import make_tiny_base

HERE = Path(__file__).parent
SMALLEST = {  # `BASE` stands for a tiny base
    "answering.answers": "--base BASE --sizes 1",
    "answering.lookup": "--sizes 1000",
    "answering.throughput": "--base BASE --rounds 1 --threads 1",
    "patches.probe": "--base-model BASE --people 2 --steps 1",
    "training.lanes": "--base-model BASE --shards 2 --records 1",
}
OTHERWISE = {
    "answering.hostile": "test_hostile.py",
    "answering.orphans": "test_quality.py: its decisions; the rest takes the models of `quality`",
    "answering.quality": "test_quality.py: its decisions; the rest trains for hours",
    "answering.routing": "below",
    "answering.utility": "test_utility.py",
    "deletion.retrained": "test_retrained.py",
    "patches.fallback": "tests/integration/patches/test_fallback.py",
    "scale.fleet": "test_fleet.py",
    "scale.membership": "test_membership.py",
    "scale.questions": "test_questions.py",
    "scale.rollback": "test_rollback.py",
    "training.race": "test_race.py: its decisions",
}
MINUTES = {  # at any scale: try them by hand
    "answering.cold",
    "deletion.forget",
    "patches.forgetting",
    "patches.sequential",
    "training.executors",
    "training.profile_step",
}


def test_every_command_is_tried() -> None:
    paths = [path for path in HERE.glob("*/*.py") if "\ndef main(" in path.read_text(encoding="utf-8")]
    found = {f"{path.parent.name}.{path.stem}" for path in paths if path.stem != "__main__"}
    assert found == SMALLEST.keys() | OTHERWISE.keys() | MINUTES


def check_tables(name: str, out: Path) -> None:
    """Check that a benchmark makes its tables from what it has written."""
    module, found = importlib.import_module(f"tests.bench.{name}"), read(out)
    for table in [each for each in vars(module) if each == "table" or each.endswith("_table")]:
        assert len(list(getattr(module, table)(found))) > 2, table


def test_only_a_result_of_the_same_design_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert read(out, {"method": "npo"}) == {}
    write(out, found := {"method": "npo", "settings": {"beta": 0.05}, "seeds": {"7": {}}})
    assert read(out, {"method": "npo", "settings": {"beta": 0.05}}) == read(out) == found
    assert read(out, {"method": "npo", "settings": {}}) == {}


@QUIET
@pytest.mark.torch
@pytest.mark.parametrize("name", SMALLEST)
def test_a_command_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_base(tmp_path / "base")
    words = SMALLEST[name].replace("BASE", str(base)).split()
    monkeypatch.setattr(sys, "argv", [name, *words, "--out", str(tmp_path / "out.json")])
    importlib.import_module(f"tests.bench.{name}").main()
    check_tables(name, tmp_path / "out.json")


def test_equal_shards_are_read_as_training_reads_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "base", shards=2, slices=2, per_cell=1)
    config = bench.config("model")
    found = read_records(config.datasets, config.sisa.group_by, subjects="some")
    assert [each.id for each in found] == [each.id for each in bench.records()]


def test_routing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        {"question": each["prompt"], "answer": each["completion"], "paraphrased_question": each["id"]}
        for each in make_people(5, 8)
    ]
    write_made_up(
        tmp_path / "tofu", {"full": asked, "retain_perturbed": asked, "forget10_perturbed": []}
    )
    for source in ("rwku", "muse/news", "muse/books"):
        write_made_up(tmp_path / source, MADE_UP[source.partition("/")[0]]())
    monkeypatch.setattr(routing, "resolve_embedder", lambda _: HashingEmbedder())
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["routing", "--data", str(tmp_path), "--out", str(out)])
    routing.main()
    check_tables("answering.routing", out)
