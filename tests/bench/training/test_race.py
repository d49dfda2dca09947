"""The decisions of the race without a model: who gets which records, ratios and tables."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sisa.core.domain import BaseFiles, Part, Record
from sisa.lm.base.tokens import Tokens
from sisa.store.records import FileRecords
from tests.bench.command import people
from tests.bench.training.contestants import Ours, Race, Theirs
from tests.bench.training.race import draw, over, ratios, summary
from tests.bench.training.race_ground import (
    ONE_WORKER,
    TWO_WORKERS,
    WHOLE_BY_TWO,
    Data,
    Ground,
    Layout,
    run_file,
)
from tests.fakes.keyring import PLAIN

RACE = Race(Path("base"), "q, v", None, epochs=2, batch=8, rate=1e-3)


def ground(folder: Path, num_records: int) -> Ground:
    records = [Record(f"r{n:02}", None, "text", (Part("text", "x"),)) for n in range(num_records)]
    tokens = [Tokens([n], [n]) for n in range(num_records)]
    return Ground(
        folder, Data(BaseFiles(Path("base"), "digest"), tuple(records), tuple(tokens)), ExitStack()
    )


@pytest.mark.parametrize("layout", [TWO_WORKERS, ONE_WORKER, WHOLE_BY_TWO])
def test_every_record_is_trained_by_one_worker(tmp_path: Path, layout: Layout) -> None:
    entry = ground(tmp_path, 32).ours(RACE, layout)
    assert len(entry.work) == layout.workers
    seen: list[str] = []
    for (who, threads, _), work in entry.work:
        assert isinstance(work, Ours)
        assert (who, threads) == ("ours", layout.threads)
        store = FileRecords(work.site.records_at, PLAIN)
        for chain, tokens in zip(work.chains, work.tokens, strict=True):
            ids = [each.record.id for file in chain.slices for each in store.read(file)]
            assert sorted(ids) == sorted(f"r{each.input_ids[0]:02}" for each in tokens)
            assert chain.record_epochs == RACE.epochs * len(ids)
            assert len(chain.jobs) == layout.slices
            seen += ids
    assert sorted(seen) == [f"r{n:02}" for n in range(32)]


def test_all_models_take_as_many_steps(tmp_path: Path) -> None:
    batches = {
        each: run_file(tmp_path, RACE, each).micro_batch_size for each in (ONE_WORKER, TWO_WORKERS)
    }
    steps = {32 / each.shards / batch for each, batch in batches.items()}
    assert steps == {32 / RACE.batch}


def test_theirs_get_all_tokens(tmp_path: Path) -> None:
    here = ground(tmp_path, 6)
    ((_, work),) = here.theirs("hf", RACE, grouped=True).work
    assert isinstance(work, Theirs)
    assert (work.tokens, work.grouped) == (here.data.tokens, True)


def test_completions_of_invented_people_begin_with_one_space() -> None:
    completions = [each["completion"] for each in people(None)]
    assert all(each == f" {each.strip()}" for each in completions)


def row(who: str, layers: str, *seconds: float) -> dict[str, Any]:
    speed = {"tokens_per_s": 100.0, "seconds_per_epoch": 1.0, "loss": 2.0}
    return {
        "who": who,
        "adapter": "q, v",
        "layers": layers,
        "seconds": list(seconds),
        "core_seconds": list(seconds),
        **speed,
    }


ROWS = [
    row(TWO_WORKERS.name, "all", 10, 20, 10),
    row(TWO_WORKERS.name, "top 10", 5, 5, 5),
    row("Trainer + PEFT", "all", 20, 60, 10),
    row("Trainer + PEFT", "top 10", 10, 10, 10),
    row(ONE_WORKER.name, "all", 1, 1, 1),
]


def test_a_ratio_is_the_median_of_rounds() -> None:
    assert over(ROWS[2], ROWS[0]) == 2.0  # of 2, 3 and 1


def test_the_top_third_stands_against_all_layers_too() -> None:
    others = [{**each, "adapter": "all linear"} for each in ROWS if each["who"] != TWO_WORKERS.name]
    found = [(each["ours"], each["theirs"], each["times_as_fast"]) for each in ratios([*ROWS, *others])]
    assert found == [("all", "all", 2.0), ("top 10", "all", 4.0), ("top 10", "top 10", 2.0)]


@pytest.mark.parametrize("trl", [None, "1.16.0"])
def test_the_table_says_when_trl_is_missing(trl: str | None, tmp_path: Path) -> None:
    found = {"rows": ROWS, "ratios": list(ratios(ROWS)), "trl": trl}
    lines = list(summary(found))
    assert any("is not installed" in line for line in lines) == (trl is None)
    assert sum(line.startswith("| q, v | all | all |") for line in lines) == 1
    draw(found, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1_000


def committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return found


def test_the_committed_numbers_keep_the_goals() -> None:
    found = committed("race.json")
    assert found["ratios"] == list(ratios(found["rows"]))
    for row in found["ratios"]:
        cached = row["ours"] != "all" and row["theirs"] == "all"
        assert row["times_as_fast"] >= (3.3 if cached else 1.5)
        if cached and row["adapter"] == "all linear":
            assert row["times_as_fast"] >= 3.5
    (ours,) = (row["loss"] for row in found["rows"] if row["who"] == ONE_WORKER.name)
    theirs = [
        row["loss"]
        for row in found["rows"]
        if (row["adapter"], row["layers"]) == ("all linear", "all") and not row["who"].startswith("ours")
    ]
    assert abs(ours - sum(theirs) / len(theirs)) < 0.03
    assert found["whole"]["one_worker_over_one_adapter"] <= 1.05
