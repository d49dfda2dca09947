"""The plan of a leaderboard: its cells, their names, and continuing an interrupted run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.core.errors import IntegrityError, InvalidInput
from tests.bench.leaderboard.authors import asked_of, kept_questions, read_data, to_forget
from tests.bench.leaderboard.fake_cells import FakeMaker, result, write_authors
from tests.bench.leaderboard.plan import (
    SETTINGS,
    Cell,
    Design,
    HeldCells,
    Result,
    cell_name,
    compete,
    nearest_steps,
)

DESIGN = Design(methods=("npo", "graddiff"), sizes=(1, 4), size_methods=("graddiff",))
INPUTS = {"base": "b", "data": "d"}


def held(folder: Path, maker: FakeMaker, design: Design = DESIGN) -> HeldCells:
    return HeldCells(folder, design, INPUTS, maker)


def test_every_setting_of_every_method_is_run_under_every_seed(tmp_path: Path) -> None:
    found = compete(Design(), held(tmp_path, FakeMaker(), Design()))
    cells = [cell for cell, _ in found]
    assert [cell.kind for cell in cells[:3]] == ["retained", "retained", "full"]
    wanted = [
        (name, each.learning_rate, each.alpha, seed)
        for name in Design().methods
        for each in SETTINGS[name]
        for seed in Design().seeds
    ]
    runs = [cell for cell in cells if cell.kind == "run"]
    assert [(cell.method, cell.learning_rate, cell.alpha, cell.seed) for cell in runs] == wanted
    assert {cell.forgotten for cell in cells if cell.kind == "size"} == set(Design().sizes)


def test_no_cell_depends_on_a_result(tmp_path: Path) -> None:
    def other(cell: Cell) -> Result:
        return result(cell, aggregate=1 - cell.learning_rate, utility=cell.learning_rate)

    first = [cell for cell, _ in compete(DESIGN, held(tmp_path / "a", FakeMaker()))]
    assert [cell for cell, _ in compete(DESIGN, held(tmp_path / "b", FakeMaker(other)))] == first


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    whole = compete(DESIGN, held(tmp_path / "whole", FakeMaker()))
    first = FakeMaker(dies_at=5)
    with pytest.raises(KeyboardInterrupt):
        compete(DESIGN, held(tmp_path / "cut", first))
    second = FakeMaker()
    assert compete(DESIGN, held(tmp_path / "cut", second)) == whole
    assert len(first.made) + len(second.made) == len(whole)
    third = FakeMaker()
    assert compete(DESIGN, held(tmp_path / "cut", third)) == whole
    assert third.made == []


def test_the_methods_own_size_is_not_run_twice(tmp_path: Path) -> None:
    same = replace(DESIGN, sizes=(4, 2, 1))
    found = compete(same, held(tmp_path, FakeMaker(), same))
    assert [cell.forgotten for cell, _ in found if cell.kind == "size"] == [1, 1, 4, 4]


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
        Design(authors=3, forgotten=3, sizes=(9,), methods=("magic",), seeds=(), budget_share=0.0)
    places = [each.where for each in caught.value.problems]
    assert places == ["forgotten", "forgotten", "methods", "budget_share", "seeds"]


def test_no_question_of_utility_is_about_an_author_that_some_cell_forgets(tmp_path: Path) -> None:
    design = Design(authors=5, forgotten=1, sizes=(2,))
    data = read_data(str(write_authors(tmp_path, 6)), design)
    assert len(kept_questions(data, 0)) == 100
    assert len(kept_questions(data, 1)) == 80
    for forgotten in (1, 2):
        cell = Cell("size", 1, forgotten, "npo", 1e-3)
        asked = asked_of(cell, data, design)
        gone = {each.question for each in to_forget(data, 2)}
        assert gone.isdisjoint({each.question for each in asked if each.set == "retain"})
        own = {each.question for each in to_forget(data, forgotten)}
        assert {each.question for each in asked if each.set == "forget"} <= own
        assert {len(each.perturbed) for each in asked} == {design.wrong_answers}
        assert len({each.place for each in asked}) == len(asked)


def test_every_setting_is_asked_the_same(tmp_path: Path) -> None:
    design = Design(authors=5, forgotten=1, sizes=())
    data = read_data(str(write_authors(tmp_path, 5)), design)
    asked = asked_of(Cell("run", 0, 1, "npo"), data, design)
    assert asked == asked_of(Cell("run", 1, 1, "dpo", 1e-3), data, design)
    counts = Counter(each.set for each in asked)
    assert counts == {"retain": 8, "real_authors": 4, "world_facts": 4, "forget": 20}


def test_data_that_is_not_there_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput) as caught:
        read_data(str(tmp_path / "empty"), DESIGN)
    missing = {each.where for each in caught.value.problems}
    assert {"forget10_perturbed.jsonl", "world_facts_perturbed.jsonl"} <= missing
    with pytest.raises(InvalidInput, match="too few authors"):
        read_data(str(write_authors(tmp_path / "few", 3)), DESIGN)
