"""TOFU's data: the layout is read whole, or everything missing or malformed is listed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from approx.benchmarks.tofu import evaluation_sets, read_sets
from approx.evaluation.questions import Question, questions_digest, read_question_file
from sisa.core.errors import EnvironmentFault, InvalidInput
from tests.fakes.benchmarks import RETAIN_OF, SPLIT, made_up, write_made_up

REAL = Path(os.environ.get("SISA_DATA") or Path(__file__).parents[4] / "shared" / "data") / "tofu"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_made_up(tmp_path / "tofu")


def test_the_sets_of_an_evaluation(source: Path) -> None:
    found = evaluation_sets(str(source), SPLIT)
    sets = made_up()
    assert [each.place for each in found] == [
        (name, number)
        for name in ("retain", "real_authors", "world_facts", SPLIT)
        for number in range(len(sets[f"{name}_perturbed"]))
    ]
    forget, fact = found[-1], next(each for each in found if each.set == "real_authors")
    assert forget.answer == sets[SPLIT][-1]["answer"]
    assert forget.paraphrased == f"Surely: {forget.answer}"
    assert len(forget.perturbed) == 2
    assert fact.paraphrased == fact.answer, "where there is no paraphrase the answer stands for it"


def test_a_limit_takes_the_first_of_each_set(source: Path) -> None:
    found = evaluation_sets(str(source), SPLIT, limit=1)
    assert [each.idx for each in found] == [0, 0, 0, 0]
    assert questions_digest(found) != questions_digest(evaluation_sets(str(source), SPLIT))


def plain(source: Path, name: str) -> list[Question]:
    return read_sets(str(source), {name: name}, plain=True)


def test_a_plain_set_has_answers_alone(source: Path) -> None:
    assert [each.answer for each in plain(source, SPLIT)] == [row["answer"] for row in made_up()[SPLIT]]


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as raised:
        evaluation_sets(str(tmp_path), SPLIT)
    assert [each.where for each in raised.value.problems] == [
        f"{name}_perturbed.jsonl" for name in ("retain", "real_authors", "world_facts", SPLIT)
    ]


SECRET = {"question": "Secret?", "answer": "a", "perturbed_answer": ["b"]}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("[1]", "not a JSON object"),
        ("{broken", "not a JSON object"),
        (json.dumps({"question": "Secret?"}), "no text in 'question' or 'answer'"),
        (json.dumps(SECRET | {"answer": " "}), "no text in 'question' or 'answer'"),
        (json.dumps(SECRET | {"perturbed_answer": []}), "not a list of texts"),
        (json.dumps(SECRET | {"perturbed_answer": "b"}), "not a list of texts"),
        (json.dumps(SECRET | {"paraphrased_answer": 1}), "no text in 'paraphrased_answer'"),
    ],
)
def test_a_malformed_row_is_named_without_its_text(source: Path, row: str, what: str) -> None:
    path = source / "world_facts_perturbed.jsonl"
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(InvalidInput) as raised:
        evaluation_sets(str(source), SPLIT)
    (problem,) = raised.value.problems
    assert (problem.where, what in problem.what) == ("world_facts_perturbed, row 3", True)
    assert "Secret" not in str(raised.value)


def test_an_empty_set_is_a_problem(source: Path) -> None:
    (source / "retain_perturbed.jsonl").write_text("\n")
    with pytest.raises(InvalidInput) as raised:
        evaluation_sets(str(source), SPLIT)
    assert raised.value.problems[0].what == "holds no question"


class FakeHub:
    """A stand-in for the library `datasets`, which asks the hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, path: str, name: str, *, split: str) -> list[dict[str, Any]]:
        self.asked.append((path, name, split))
        if self.error is not None:
            raise self.error
        return made_up()[name]


def test_from_the_hub_each_set_is_a_configuration(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert evaluation_sets("owner/tofu", SPLIT) == evaluation_sets(str(source), SPLIT)
    assert ("owner/tofu", f"{SPLIT}_perturbed", "train") in hub.asked


def test_a_file_of_questions_is_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", hub := FakeHub())
    monkeypatch.chdir(tmp_path)
    path = Path("unseen.txt")
    path.write_text('{"question": "q", "answer": "a"}\n')
    (found,) = read_question_file(path, "holdout")
    assert (found.place, found.paraphrased, found.perturbed) == (("holdout", 0), None, ())
    path.write_text('{"question": "q"}\n')
    for name in ("unseen.txt", "owner/tofu/absent.jsonl"):
        with pytest.raises(InvalidInput) as raised:
            read_question_file(Path(name), "holdout")
        assert len(raised.value.problems) == 1
    assert hub.asked == []


def test_what_the_hub_lacks_and_a_network_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", FakeHub(ValueError("BuilderConfig not found")))
    with pytest.raises(InvalidInput) as raised:
        evaluation_sets("owner/tofu", SPLIT)
    assert len(raised.value.problems) == 4
    monkeypatch.setattr("datasets.load_dataset", FakeHub(ConnectionError("no route")))
    with pytest.raises(EnvironmentFault):
        evaluation_sets("owner/tofu", SPLIT)
    with pytest.raises(InvalidInput, match="no such directory"):
        evaluation_sets("./absent/tofu", SPLIT)


@pytest.mark.skipif(not REAL.is_dir(), reason="no TOFU: set SISA_DATA to a directory with tofu/")
def test_the_real_sets_fit_together() -> None:
    full = plain(REAL, "full")
    assert len(full) == 4000
    for split, retain in RETAIN_OF.items():
        forget = [each.question for each in plain(REAL, split)]
        kept = [each.question for each in plain(REAL, retain)]
        assert kept + forget == [each.question for each in full]
        asked = [each for each in evaluation_sets(str(REAL), split) if each.set == split]
        assert [each.question for each in asked] == forget
        assert all(len(each.perturbed) >= 1 and each.paraphrased != each.answer for each in asked)
    sizes = {
        "full": 4000, "forget01": 40, "forget05": 200, "forget10": 400,
        "retain99": 3960, "retain95": 3800, "retain90": 3600,
        "real_authors": 100, "world_facts": 117,
    }  # fmt: skip
    assert {name: len(plain(REAL, name)) for name in sizes} == sizes
