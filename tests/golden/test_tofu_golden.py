"""Published aggregates from published logs, to 12 digits: forget quality, model utility, ROUGE-L.

The logs are locuslab's of Llama-2-7B (weight decay 0.01) on TOFU, 300 questions of forget10 and of the
retain set. They are read from SISA_DATA or from `shared/data` beside the checkout; without them these
tests are skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from approx.benchmarks.tofu import evaluation_sets
from approx.benchmarks.tofu_measures import Aggregates, aggregates, quality
from approx.evaluation.question_log import LogRow, read_log
from approx.metrics.word_overlap import rougeL_recall
from tests.fakes.benchmarks import write_published

GOLDEN = Path(os.environ.get("SISA_DATA") or Path(__file__).parents[3] / "shared" / "data") / "golden"
DIGITS = 1e-12
MODELS = ("full", "retain90")
OUR_NAMES = {
    f"{theirs} {there}": f"{ours} {here}"
    for theirs, ours in {"ROUGE": "rouge", "Prob.": "probability", "Truth Ratio": "truth_ratio"}.items()
    for there, here in {
        "Real Authors": "real_authors",
        "Real World": "world_facts",
        "Retain": "retain",
    }.items()
}

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="no published logs: set SISA_DATA to a directory with golden/"
)


@cache
def log(model: str) -> tuple[LogRow, ...]:
    header, rows = read_log(GOLDEN / f"tofu_llama2_{model}.jsonl")
    assert header is None
    return tuple(rows)


@cache
def measured(model: str) -> Aggregates:
    return aggregates(log(model), [log("retain90")])


def expected(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return found[f"llama2-7b_wd0.01_{model}"]  # type: ignore[no-any-return]


def test_forget_quality_of_the_model_that_saw_everything() -> None:
    found = measured("full").forget_quality
    assert found is not None
    assert found.p_value == pytest.approx(1.834066410994743e-21, rel=DIGITS)
    published = expected("retain90")["forget_quality_full_vs_retain"]
    assert found.p_value == pytest.approx(published["Forget Quality"], rel=DIGITS)
    assert found.statistic == pytest.approx(published["KS Test Forget"], rel=DIGITS)
    assert (found.num_model, found.num_reference) == (300, 300)


def test_a_second_reference_gives_the_noise_floor() -> None:
    """The same reference twice has no noise; the floor of any other pair is that pair's test."""
    assert quality(log("full"), log("retain90"), log("retain90")).noise_floor is not None
    found = quality(log("retain90"), log("retain90"), log("full"))
    assert found.p_value == 1.0
    assert found.noise_floor is not None
    assert found.noise_floor.p_value == pytest.approx(1.834066410994743e-21, rel=DIGITS)


def test_forget_quality_is_the_same_for_the_ratio_upside_down() -> None:
    """Any map that keeps order, or turns it round, leaves the test as it is."""
    from approx.metrics.forget_quality import forget_quality
    from approx.metrics.truth_ratio import geometric

    def inverse(model: str) -> list[float]:
        rows = [row for row in log(model) if row.set == "forget10"]
        return [1 / geometric(row.avg_paraphrased_loss or 0, row.average_perturb_loss) for row in rows]

    found = forget_quality(inverse("full"), inverse("retain90"))
    assert found.p_value == pytest.approx(1.834066410994743e-21, rel=DIGITS)


@pytest.mark.parametrize("model", MODELS)
def test_model_utility_and_its_nine_numbers(model: str) -> None:
    published = expected(model)["model_utility"]
    found = measured(model)
    assert found.model_utility == pytest.approx(published["Model Utility"], rel=DIGITS)
    for theirs, ours in OUR_NAMES.items():
        assert found.nine[ours] == pytest.approx(published[theirs], rel=DIGITS), theirs
    for theirs, value in {
        "ROUGE Forget": found.forget.rouge,
        "Prob. Forget": found.forget.probability,
        "Truth Ratio Forget": found.forget.truth_ratio,
    }.items():
        assert value == pytest.approx(published[theirs], rel=DIGITS), theirs


def test_the_utility_that_was_asked_for() -> None:
    assert measured("full").model_utility == pytest.approx(0.6226773637427, rel=DIGITS)


def test_the_arithmetic_truth_ratio_is_another_number() -> None:
    other = aggregates(log("full"), [log("retain90")], variant="arithmetic")
    assert abs(other.model_utility - measured("full").model_utility) > 1e-3
    assert other.truth_ratio == "arithmetic"


def test_logs_without_scores_give_no_attacks() -> None:
    found = measured("full")
    assert (found.attacks, found.attacks_against_reference) == (None, None)
    assert found.forget.extraction_strength is None


@pytest.mark.skipif(not (GOLDEN.parent / "tofu").is_dir(), reason="no TOFU beside the published logs")
def test_a_published_log_can_be_a_reference_for_300_questions() -> None:
    asked = evaluation_sets(str(GOLDEN.parent / "tofu"), "forget10", limit=300)
    assert {each.place: each.answer for each in asked} == {
        row.place: row.ground_truth for row in log("retain90")
    }


def test_a_log_in_the_form_in_which_it_is_published_gives_the_same(tmp_path: Path) -> None:
    path = write_published(tmp_path / "eval_log_aggregated.json", log("full"))
    header, rows = read_log(path)
    found = aggregates(rows, [log("retain90")])
    assert header is None
    assert asdict(found) == asdict(measured("full")) | {"num_questions": found.num_questions}
    assert found.num_questions["forget"] == 300


@pytest.mark.parametrize("model", MODELS)
def test_rouge_recall_of_every_generated_answer(model: str) -> None:
    for row in log(model):
        assert rougeL_recall(row.ground_truth, row.generation or "") == pytest.approx(
            row.rougeL_recall, rel=DIGITS, abs=DIGITS
        )
