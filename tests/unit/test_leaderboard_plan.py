"""The plan of a leaderboard: which cells there are, what names them, what is chosen; going on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from approx.leaderboard_data import asked_of, kept, read_data, to_forget
from approx.leaderboard_held import HeldCells
from approx.leaderboard_plan import (
    TRIALS,
    Cell,
    Design,
    Result,
    Score,
    better_trial,
    cell_name,
    compete,
    nearest_steps,
)
from sisa.errors import IntegrityError, InvalidInput
from tests.fake_leaderboard import FakeMaker, result, write_authors

DESIGN = Design(methods=("npo", "graddiff"), sizes=(1, 4), size_methods=("graddiff",))
INPUTS = {"base": "b", "data": "d"}


def held(folder: Path, maker: FakeMaker, design: Design = DESIGN) -> HeldCells:
    return HeldCells(folder, design, INPUTS, maker)


def fast_is_better(cell: Cell) -> Result:
    return result(cell, aggregate=cell.learning_rate)


def test_every_method_has_the_same_trials_and_seeds(tmp_path: Path) -> None:
    found = compete(Design(), held(tmp_path, FakeMaker(), Design()))
    cells = [cell for cell, _ in found]
    assert [cell.kind for cell in cells[:3]] == ["retained", "retained", "full"]
    for name in Design().methods:
        own = [cell for cell in cells if cell.method == name]
        assert len([cell for cell in own if cell.kind == "trial"]) == len(TRIALS[name]) == 2
        assert [cell.seed for cell in own if cell.kind == "run"] == list(Design().seeds)
    trial_seeds = {cell.seed for cell in cells if cell.kind == "trial"}
    assert trial_seeds.isdisjoint({cell.seed for cell in cells if cell.kind in ("run", "size")})
    assert {cell.forgotten for cell in cells if cell.kind == "size"} == set(Design().sizes)


def test_the_better_trial_is_what_is_run(tmp_path: Path) -> None:
    found = compete(DESIGN, held(tmp_path, FakeMaker(fast_is_better)))
    best = max(each.learning_rate for each in TRIALS["npo"])
    assert {cell.learning_rate for cell, _ in found if cell.kind in ("run", "size")} == {best}


def test_a_tie_is_broken_by_utility_then_by_order() -> None:
    slow, fast = Cell("trial", learning_rate=1.0), Cell("trial", learning_rate=2.0)
    assert better_trial([(slow, Score(0.0, 0.1)), (fast, Score(0.0, 0.2))]) == fast
    assert better_trial([(slow, Score(0.1, 0.2)), (fast, Score(0.1, 0.2))]) == slow
    assert better_trial([(slow, Score(0.1, 0.0)), (fast, Score(0.0, 0.9))]) == slow


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    whole = compete(DESIGN, held(tmp_path / "whole", FakeMaker(fast_is_better)))
    first = FakeMaker(fast_is_better, dies_at=5)
    with pytest.raises(KeyboardInterrupt):
        compete(DESIGN, held(tmp_path / "cut", first))
    second = FakeMaker(fast_is_better)
    assert compete(DESIGN, held(tmp_path / "cut", second)) == whole
    assert len(first.made) + len(second.made) == len(whole)
    third = FakeMaker()
    assert compete(DESIGN, held(tmp_path / "cut", third)) == whole
    assert third.made == []


def test_the_methods_own_size_is_not_run_twice(tmp_path: Path) -> None:
    same = replace(DESIGN, sizes=(4, 2, 1))
    found = compete(same, held(tmp_path, FakeMaker(), same))
    assert [cell.forgotten for cell, _ in found if cell.kind == "size"] == [1, 4]


def test_another_method_beside_makes_only_its_own_cells(tmp_path: Path) -> None:
    compete(DESIGN, held(tmp_path, FakeMaker()))
    more, maker = replace(DESIGN, methods=("npo", "graddiff", "dpo")), FakeMaker()
    compete(more, held(tmp_path, maker, more))
    assert {cell.method for cell in maker.made} == {"dpo"}


@pytest.mark.parametrize(
    "change", [{"epochs": 9}, {"budget_share": 0.1}, {"forget_questions": 3}, {"sizes": (5,)}]
)
def test_whatever_reaches_a_result_reaches_its_name(change: dict[str, Any]) -> None:
    """Sizes too: they decide which authors are asked about for utility."""
    cell = Cell("run", 1, 2, "npo", 1e-3)
    name = cell_name(cell, DESIGN, INPUTS)
    assert cell_name(cell, replace(DESIGN, **change), INPUTS) != name
    assert cell_name(cell, DESIGN, INPUTS | {"data": "other"}) != name
    assert cell_name(replace(cell, seed=2), DESIGN, INPUTS) != name


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    compete(DESIGN, held(tmp_path, FakeMaker()))
    path = next((tmp_path / "cells").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="can't be read"):
        compete(DESIGN, held(tmp_path, FakeMaker()))


def test_steps_come_as_near_to_the_budget_as_they_can() -> None:
    costs, last = [4.0] * 10, [1.0] * 10
    assert nearest_steps(costs, last, 0.0) == 1
    for budget in (9.0, 12.0, 21.0, 37.5):
        steps = nearest_steps(costs, last, budget)
        assert abs(4.0 * steps + 1.0 - budget) == min(abs(4.0 * n + 1.0 - budget) for n in range(1, 11))


def test_designs_that_make_no_sense_name_all_problems() -> None:
    with pytest.raises(InvalidInput) as caught:
        Design(authors=3, forgotten=3, sizes=(9,), methods=("magic",), seeds=(0,), budget_share=0.0)
    places = [each.where for each in caught.value.problems]
    assert places == ["forgotten", "forgotten", "methods", "budget_share", "seeds"]


def test_no_question_of_utility_is_about_an_author_that_some_cell_forgets(tmp_path: Path) -> None:
    design = Design(authors=5, forgotten=1, sizes=(2,))
    data = read_data(str(write_authors(tmp_path, 6)), design)
    assert len(kept(data, 0)) == 100
    assert len(kept(data, 1)) == 80
    for forgotten in (1, 2):
        cell = Cell("size", 1, forgotten, "npo", 1e-3)
        asked = asked_of(cell, data, design)
        gone = {each.question for each in to_forget(data, 2)}
        assert gone.isdisjoint({each.question for each in asked if each.set == "retain"})
        own = {each.question for each in to_forget(data, forgotten)}
        assert {each.question for each in asked if each.set == "forget"} <= own
        assert {len(each.perturbed) for each in asked} == {design.wrong_answers}
        assert len({each.place for each in asked}) == len(asked)


def test_trials_ask_what_runs_ask(tmp_path: Path) -> None:
    design = Design(authors=5, forgotten=1, sizes=())
    data = read_data(str(write_authors(tmp_path, 5)), design)
    trial = asked_of(Cell("trial", 0, 1, "npo"), data, design)
    assert trial == asked_of(Cell("run", 1, 1, "npo"), data, design)
    counts = Counter(each.set for each in trial)
    assert counts == {"retain": 8, "real_authors": 4, "world_facts": 4, "forget": 20}


def test_data_that_is_not_there_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput) as caught:
        read_data(str(tmp_path / "empty"), DESIGN)
    missing = {each.where for each in caught.value.problems}
    assert {"forget10_perturbed.jsonl", "world_facts_perturbed.jsonl"} <= missing
    with pytest.raises(InvalidInput, match="too few authors"):
        read_data(str(write_authors(tmp_path / "few", 3)), DESIGN)
