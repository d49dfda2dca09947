"""The table: means and spreads, curves of settings, and reasons against a ranking."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.bench.leaderboard.fake_cells import result
from tests.bench.leaderboard.plan import Cell, Design, Result
from tests.bench.leaderboard.table import (
    Results,
    Value,
    curves,
    draw_leaderboard,
    noise_floor,
    references,
    sizes,
    table,
    to_json,
    weaknesses,
)

FULL, WITHOUT = 0.9, 0.1  # forget probability before, and of the retained references
Run = tuple[str, int, float, float]  # method, seed, forget probability, utility


def results(*runs: Run, sizes: tuple[Run, ...] = (), full: float = FULL) -> Results:
    found: list[tuple[Cell, Result]] = []

    def add(cell: Cell, **values: Any) -> None:
        found.append((cell, result(cell, **values)))

    add(Cell("retained", 0, 2), aggregate=None, probability=WITHOUT)
    add(Cell("retained", 1, 2), probability=WITHOUT)
    add(Cell("full"), probability=full, utility=0.5)
    for method, seed, probability, utility in runs:
        cell = Cell("run", seed, 2, method, 1e-3)
        add(cell, probability=probability, utility=utility, aggregate=utility / 2, steps=5 + seed)
    for method, size, probability, utility in sizes:
        cell = Cell("size", 1, size, method, 1e-3)
        add(cell, probability=probability, utility=utility, aggregate=None)
    return found


def test_a_row_is_the_mean_and_half_of_the_range() -> None:
    (row,) = curves(results(("npo", 1, 0.2, 0.4), ("npo", 2, 0.4, 0.6)))
    found = [row.values[each] for each in ("probability", "model_utility")]
    assert [each.mean for each in found] == pytest.approx([0.3, 0.5])
    assert [each.spread for each in found] == pytest.approx([0.1, 0.1])
    assert (row.num_seeds, row.steps) == (2, (6, 7))


def test_a_run_that_did_not_finish_says_so_in_its_row() -> None:
    found = results(("npo", 1, 0.2, 0.4), ("npo", 2, 0.4, 0.6))
    assert "diverged" not in table(found, Design())
    cell, run = found[-1]
    assert "(diverged)" in table([*found[:-1], (cell, {**run, "ending": "diverged"})], Design())


def test_the_references_row_is_of_both_and_forget_quality_of_the_second() -> None:
    found = list(results())
    found[0] = (found[0][0], {**found[0][1], "model_utility": 0.3})
    row = references(found)[1]
    assert row.name == "retained reference"
    assert row.values["model_utility"].mean == pytest.approx((0.3 + found[1][1]["model_utility"]) / 2)
    assert row.values["p_value"] == Value(found[1][1]["forget_quality"]["p_value"], 0.0)


def test_a_private_reference_names_its_guarantee() -> None:
    cell = Cell("private", learning_rate=1e-3)
    private = {**result(cell), "privacy": {"epsilon": 6.54, "delta": 1e-5}}
    found = [*results(("npo", 1, 0.2, 0.4)), (cell, private)]
    assert [row.name for row in references(found)][2:] == ["DP-SGD on all, epsilon 6.5 at delta 1e-05"]
    labels = draw_leaderboard(to_json(found, Design(), {})).axes[0].get_legend_handles_labels()[1]
    assert "DP-SGD on all, epsilon 6.5 at delta 1e-05" in labels


def test_settings_stand_by_method_and_strength_whatever_came_of_them() -> None:
    found = list(results(("npo", 1, 0.2, 0.1), ("dpo", 1, 0.2, 0.5)))
    strong, weak = Cell("run", 1, 2, "npo", 4e-3), Cell("run", 1, 2, "npo", 5e-4)
    found += [(strong, result(strong, utility=0.9)), (weak, result(weak, utility=0.0))]
    settings = [(row.name, row.learning_rate, row.num_seeds) for row in curves(found)]
    assert settings == [("npo", 5e-4, 1), ("npo", 1e-3, 1), ("npo", 4e-3, 1), ("dpo", 1e-3, 1)]


def test_weak_runs_say_what_they_lack_and_strong_ones_nothing() -> None:
    weak = results(("npo", 1, 0.2, 0.1))
    sentences = weaknesses(weak, Design())
    assert [each.split()[0] for each in sentences] == ["the", "20", "a", "the"]
    assert all(each in table(weak, Design()) for each in sentences)
    strong = [
        (cell, {**one, "steps": 99, "num_questions": {"forget": 200}})
        for cell, one in results(*(("npo", seed, 0.2, 0.1) for seed in range(3)), full=0.95)
    ]
    assert weaknesses(strong, Design()) == []
    assert "No order" not in table(strong, Design())


def test_what_was_not_measured_is_a_dash_and_never_0() -> None:
    assert Value.of([None, 0.1]) == Value(None, None)
    found = results(("npo", 1, 0.2, 0.1))
    body = to_json(found, Design(), {})
    body = json.loads(json.dumps(body))
    sized = results(("npo", 1, 0.2, 0.1), sizes=(("npo", 1, 0.2, 0.1),))
    (_, row), _ = sizes(sized)
    assert row.values["p_value"] == Value(None, None)
    assert body["approximate"] is True


def test_the_markdown_has_as_many_cells_in_each_row_and_the_noise_floor() -> None:
    found = results(("npo", 1, 0.2, 0.1), ("npo", 2, 0.3, 0.2), sizes=(("npo", 1, 0.2, 0.1),))
    text = table(found, Design())
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    floor = noise_floor(found)
    assert floor is not None
    assert f"p {floor['p_value']:.3f}, D {floor['statistic']:.3f}, n {floor['num_model']}" in text


def test_the_picture_draws_each_method_as_one_line_through_its_settings() -> None:
    found = list(results(("npo", 1, 0.2, 0.4), ("npo", 2, 0.4, 0.6), ("graddiff", 1, 0.3, 0.3)))
    strong = Cell("run", 1, 2, "npo", 4e-3)
    found.append((strong, result(strong, probability=0.1, utility=0.2)))
    axes = draw_leaderboard(to_json(found, Design(), {})).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    labels = {each.get_text() for each in legend.get_texts()}
    assert labels == {"npo", "graddiff", "fine-tuned on all", "retained reference"}
    lines = [np.asarray(each.get_xydata(), dtype=float).tolist() for each in axes.get_lines()]
    curve = [[FULL, 0.5], [0.3, 0.5], [0.1, 0.2]]
    assert any(np.shape(each) == (3, 2) and np.allclose(each, curve) for each in lines)
