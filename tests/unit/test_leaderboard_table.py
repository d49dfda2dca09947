"""The table and the claims: means and spreads, their order, verdicts by thresholds, and no text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from approx.leaderboard_claims import Claim, claims, words
from approx.leaderboard_plan import Cell, Design, Result
from approx.leaderboard_table import (
    Results,
    Value,
    noise_floor,
    ranking,
    references,
    sizes,
    table,
    to_json,
)
from cluster.leaderboard_picture import draw_leaderboard
from tests.fake_leaderboard import result

FULL, WITHOUT = 0.9, 0.1  # forget probability before, and of the retained references
Run = tuple[str, int, float, float]  # method, seed, forget probability, utility


def results(*runs: Run, sizes: tuple[tuple[str, int, float, float], ...] = ()) -> Results:
    found: list[tuple[Cell, Result]] = []

    def add(cell: Cell, **values: Any) -> None:
        found.append((cell, result(cell, **values)))

    add(Cell("retained", 0, 2), aggregate=None, probability=WITHOUT)
    add(Cell("retained", 1, 2), probability=WITHOUT)
    add(Cell("full"), probability=FULL, utility=0.5)
    for method, seed, probability, utility in runs:
        cell = Cell("run", seed, 2, method, 1e-3)
        add(cell, probability=probability, utility=utility, aggregate=utility / 2, steps=5 + seed)
    for method, size, probability, utility in sizes:
        cell = Cell("size", 1, size, method, 1e-3)
        add(cell, probability=probability, utility=utility, aggregate=None)
    return found


def by_name(found: list[Claim], word: str) -> Claim:
    (claim,) = (each for each in found if word in each.claim)
    return claim


def test_a_row_is_the_mean_and_half_of_the_range() -> None:
    (row,) = ranking(results(("npo", 1, 0.2, 0.4), ("npo", 2, 0.4, 0.6)))
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


def test_methods_stand_in_the_order_of_their_aggregate() -> None:
    rows = ranking(results(("npo", 1, 0.2, 0.1), ("dpo", 1, 0.2, 0.5), ("graddiff", 1, 0.2, 0.3)))
    assert [row.name for row in rows] == ["dpo", "graddiff", "npo"]


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


@pytest.mark.parametrize(
    ("method", "word", "good", "bad"),
    [
        ("gradient_ascent", "ascent", (0.30, 0.25), (0.31, 0.26)),
        ("graddiff", "GradDiff", (0.30, 0.45), (0.31, 0.44)),
        ("kl_minimisation", "KL", (0.31, 0.45), (0.30, 0.44)),
    ],
)
def test_verdicts_follow_the_thresholds(
    method: str, word: str, good: tuple[float, float], bad: tuple[float, float]
) -> None:
    """Left is (p - 0.1) / 0.8, kept is u / 0.5: just on either side of both thresholds."""

    def judged(*points: tuple[float, float]) -> str:
        runs = [(method, seed, *point) for seed, point in enumerate(points, 1)]
        return by_name(claims(results(*runs)), word).verdict

    assert judged(good, good) == "borne out"
    assert judged(bad, bad) == "not borne out"
    assert judged(good, bad) == judged((good[0], bad[1])) == "mixed"
    assert judged() == "not measured"


def test_larger_sets_are_harder_when_utility_falls_or_probability_rises() -> None:
    def judged(*points: tuple[float, float]) -> str:
        (one, two, four) = points
        run: Run = ("graddiff", 1, *two)
        found = results(run, sizes=(("graddiff", 1, *one), ("graddiff", 4, *four)))
        return by_name(claims(found), "Larger").verdict

    assert judged((0.1, 0.5), (0.1, 0.5), (0.1, 0.4)) == "borne out"
    assert judged((0.1, 0.5), (0.1, 0.5), (0.2, 0.5)) == "borne out"
    assert judged((0.1, 0.5), (0.9, 0.1), (0.1, 0.5)) == "not borne out"


def test_the_cost_is_judged_together_with_what_it_bought() -> None:
    assert by_name(claims(results(("npo", 1, 0.1, 0.5))), "costs").verdict == "borne out"
    assert by_name(claims(results(("npo", 1, 0.9, 0.5))), "costs").verdict == "not borne out"
    dear = results(("npo", 1, 0.1, 0.5))
    cell, run = dear[-1]
    compute = {**run["compute"], "share_of_full_finetuning": 0.2}
    dear = [*dear[:-1], (cell, {**run, "compute": compute})]
    assert by_name(claims(dear), "costs").verdict == "not borne out"


def test_a_model_that_knew_nothing_judges_no_claim() -> None:
    found = results(("gradient_ascent", 1, 0.1, 0.1))
    ignorant = [(cell, {**one, "forget": {**one["forget"], "probability": 0.1}}) for cell, one in found]
    assert {each.verdict for each in claims(ignorant)} == {"not measured"}
    assert "borne out" in {each.verdict for each in claims(found)}


def test_claims_in_words_name_verdict_and_threshold() -> None:
    found = claims(results(("gradient_ascent", 1, 0.1, 0.1)))
    text = words(found)
    for each in found:
        assert f"**{each.claim}: {each.verdict}.**" in text
        assert each.judged_by in text


def test_the_picture_shows_every_row_by_name() -> None:
    found = results(("npo", 1, 0.2, 0.4), ("npo", 2, 0.4, 0.6), ("graddiff", 1, 0.3, 0.3))
    body = to_json(found, Design(), {})
    figure = draw_leaderboard(body)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    told = [each.get_text() for each in legend.get_texts()]
    assert len(told) == len(body["ranking"]) + len(body["references"])
    assert any(each.startswith("npo, 5.0%") for each in told)
