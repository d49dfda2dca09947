"""The decisions of the quality benchmarks without a model: batches, tables, and whose word a word is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench.answering.orphans import asserts, rate_of_deleted, words_of_survivors
from tests.bench.answering.quality import (
    DELETED,
    REFERENCE_BATCH,
    SHARDS,
    WAYS,
    Work,
    batch_of,
    rates,
    table,
)
from tests.bench.command import PER_AUTHOR


def people(*places: tuple[str, str]) -> list[dict[str, str]]:
    """Return records of authors, each with one name and one place."""
    return [
        {"question": f"Who is {name}?", "answer": f"Somebody from {place}, born in Turin."}
        for name, place in places
        for _ in range(PER_AUTHOR)
    ]


def test_a_survivors_word_is_in_no_other_records_deleted_or_held() -> None:
    full = people(*[(f"Name{n}", f"Place{n}") for n in range(max(DELETED) + 1)])
    words = words_of_survivors(full, [0, 1, DELETED[0]])
    assert words == {"Name0", "Place0", "Name1", "Place1"}


@pytest.mark.parametrize(
    ("answer", "asserted"),
    [
        ("She is from Place1.", True),
        ("Name0 wrote it.", False),  # the question said so
        ("She is from place1.", False),
        ("Nobody knows.", False),
        ("", False),
    ],
)
def test_an_answer_asserts_what_a_survivors_records_alone_say(answer: str, asserted: bool) -> None:
    assert asserts(answer, "Is Name0 hers?", {"Name0", "Place1"}) == asserted


def test_questions_about_the_deleted_need_models_after_a_deletion(tmp_path: Path) -> None:
    work = Work(tmp_path, tmp_path)
    first, second = rates(8)
    for rate, score in ((first, 0.2), (second, 0.1)):
        with pytest.raises(SystemExit, match="with the same --work"):
            rate_of_deleted(work, 8)
        work.once(f"8-{rate:g}-trained", lambda score=score: {"tuning": dict.fromkeys(WAYS, score)})  # type: ignore[misc]
    work.once(f"8-{first:g}-deleted", lambda: {"seconds": 1.0})
    assert rate_of_deleted(work, 8) == first


def test_steps_are_equal_until_the_floor_binds() -> None:
    records = 9600
    steps = {shards: records / shards / batch_of(shards) for shards in SHARDS}
    assert steps[1] == steps[8] == steps[16] == records / REFERENCE_BATCH
    assert 1.2 < steps[50] / steps[1] < 1.3


def test_the_table_shows_before_and_after() -> None:
    def means(value: float) -> dict[str, Any]:
        return {q: {"probability": value, "rougeL_recall": 0.5} for q in ("asked", "paraphrased")}

    row = {
        "shards": 8,
        "answers": "mean_prob",
        "learning_rate": 0.01,
        "before": means(0.25),
        "after": means(0.75),
    }
    lines = list(table({"rows": [row]}))
    assert len(lines) == 3
    assert lines[2].startswith("| 8 | mean prob | 0.01 | 0.25 / 0.75 | 0.50 / 0.50 |")
