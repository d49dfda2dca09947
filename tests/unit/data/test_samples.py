"""The sample people: deterministic, unlike each other, and findable by a byte scan."""

from __future__ import annotations

import json

import pytest

from sisa.core.errors import InvalidInput
from sisa.data.samples import QUESTIONS, distinctive_word, make_people, to_jsonl


def test_the_same_seed_gives_the_same_people() -> None:
    assert make_people(5, 3) == make_people(5, 3)
    assert make_people(5, 3, seed=1) != make_people(5, 3, seed=2)


def test_a_person_does_not_depend_on_how_many_are_made() -> None:
    few, many = make_people(3, 2), make_people(30, len(QUESTIONS))
    assert all(row in many for row in few)


def test_ids_and_names_are_unique() -> None:
    rows = make_people(200, len(QUESTIONS))
    assert len({row["id"] for row in rows}) == len(rows) == 200 * len(QUESTIONS)
    births = [row["prompt"] for row in rows if "born" in row["prompt"]]
    assert len(set(births)) == 200
    assert all(row["id"].startswith(row["subject_id"] + "-") for row in rows)


def test_an_answers_word_occurs_in_no_other_record() -> None:
    rows = make_people(60, len(QUESTIONS))
    text = to_jsonl(rows).lower()
    for row in rows:
        assert text.count(distinctive_word(row["completion"]).lower()) == 1


def test_answers_are_short() -> None:
    for row in make_people(20, len(QUESTIONS)):
        assert row["completion"].startswith(" ")
        assert len(row["completion"].split()) <= 6
        assert len(row["prompt"]) < 80


def test_jsonl_reads_back() -> None:
    rows = make_people(4, 2)
    assert [json.loads(line) for line in to_jsonl(rows).splitlines()] == rows


@pytest.mark.parametrize(("people", "records"), [(0, 1), (1, 0), (1, len(QUESTIONS) + 1)])
def test_impossible_numbers_are_refused(people: int, records: int) -> None:
    with pytest.raises(InvalidInput):
        make_people(people, records)


def test_no_word_is_an_error() -> None:
    with pytest.raises(ValueError, match="no invented word"):
        distinctive_word("A plain answer about nothing.")
