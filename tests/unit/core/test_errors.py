"""The error tree: exit codes are a contract, and an error carries all it knows wherever it arrives."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from sisa.core import errors
from sisa.core.errors import Problem, SisaError

EXIT_CODES = {
    "SisaError": 1,
    "RejectedRequest": 2,
    "InvalidInput": 2,
    "ConfigConflict": 2,
    "UnknownRecord": 3,
    "IntegrityError": 4,
    "Busy": 5,
    "Outdated": 6,
    "TransientError": 6,
    "EnvironmentFault": 6,
}


def subclasses(kind: type[SisaError]) -> list[type[SisaError]]:
    return [kind, *(found for each in kind.__subclasses__() for found in subclasses(each))]


KINDS = [each for each in subclasses(SisaError) if each.__module__ == errors.__name__]


def full(kind: type[SisaError]) -> SisaError:
    return kind(
        "2 bad records",
        where="people.jsonl",
        expected="an id",
        got="none",
        next_step="correct the file",
        problems=[Problem("line 3", "no id"), Problem("line 9", "empty text")],
    )


def test_exit_codes() -> None:
    assert {kind.__name__: kind.exit_code for kind in KINDS} == EXIT_CODES


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_from_a_worker(kind: type[SisaError]) -> None:
    error = full(kind)
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - as Ray does
    for again in (arrived, copy.copy(error)):
        assert type(again) is kind
        assert again.to_json() == error.to_json()
        assert str(again) == str(error)
        assert again.problems == error.problems


def test_the_text_contains_every_field() -> None:
    assert str(full(errors.InvalidInput)).splitlines() == [
        "2 bad records",
        "  where: people.jsonl",
        "  expected: an id",
        "  got: none",
        "  - line 3: no id",
        "  - line 9: empty text",
        "  next step: correct the file",
    ]


def test_unknown_fields_are_left_out() -> None:
    assert str(errors.Busy("another writer")) == "another writer"


def test_the_json_form_is_a_contract() -> None:
    found = json.loads(json.dumps(full(errors.UnknownRecord).to_json()))
    assert found == {
        "type": "UnknownRecord",
        "message": "2 bad records",
        "where": "people.jsonl",
        "expected": "an id",
        "got": "none",
        "next_step": "correct the file",
        "problems": [{"where": "line 3", "what": "no id"}, {"where": "line 9", "what": "empty text"}],
    }


def test_a_list_of_problems_is_taken_as_it_is_then() -> None:
    problems = [Problem("line 1", "no id")]
    error = errors.InvalidInput("bad", problems=problems)
    problems.clear()
    assert len(error.problems) == 1


def test_an_error_is_listed_as_its_problems_or_as_itself() -> None:
    own = (Problem("line 1", "no id"), Problem("line 2", "no text"))
    assert SisaError("2 bad records", problems=own).as_problems("texts") == own
    alone = SisaError("no number", got="x")
    assert alone.as_problems("texts") == (Problem("texts", "no number: got x"),)
    placed = SisaError("no number", where="alpha", expected="0 to 1", got="x")
    assert placed.as_problems("texts") == (Problem("alpha", "no number: expected 0 to 1, got x"),)
    assert SisaError("is damaged").as_problems("texts") == (Problem("texts", "is damaged"),)
