"""The benchmarks over fake models: what they ask, their values against hand-made ones, and bad input.

Equal models have changes of 0, calibrated membership of 0.5 and PrivLeak of 0, and lose nothing; a model
that knows the forget set loses the headline.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from approx.benchmarks.measures import Benchmark, Measured, measured, since_first
from approx.benchmarks.muse import MUSE, muse_questions
from approx.benchmarks.rwku import ATTACK_TYPES, RWKU, rwku_questions
from approx.benchmarks.stereotypes import STEREOTYPES
from approx.benchmarks.whp import WHP
from approx.benchmarks.wmdp import WMDP
from approx.evaluation.asking import Asking, evaluate, finished_log, header_of
from approx.evaluation.question_log import LogRow
from approx.evaluation.questions import PromptForm, Question, questions_digest
from sisa.core.errors import InvalidInput
from tests.fakes.benchmarks import ADA, MADE_UP, write_made_up
from tests.fakes.evaluated import FakeEvaluated

REAL = Path(os.environ.get("SISA_DATA") or Path(__file__).parents[4] / "shared" / "data")


class Case(NamedTuple):
    benchmark: Benchmark
    forget: tuple[str, ...]  # beginnings of sets


CASES = {
    "rwku": Case(RWKU, ("forget",)),
    "muse": Case(MUSE, ("verbmem", "knowmem forget", "privleak forget")),
    "whp": Case(WHP, ("completions", "probabilities")),
    "wmdp": Case(WMDP, ("choice", "open")),
    "stereotypes": Case(STEREOTYPES, ("pairs",)),
}


def asked(name: str, tmp_path: Path) -> list[Question]:
    source = tmp_path / name
    if not source.exists():
        write_made_up(source, MADE_UP[name]())
    return CASES[name].benchmark.read(str(source), None)


def log_of(name: str, questions: list[Question], known: list[Question], tmp_path: Path) -> list[LogRow]:
    model = FakeEvaluated({each.question: each.answer for each in known})
    asking = Asking(PromptForm("completion"))
    path = tmp_path / "logs" / f"{name}-{model.digest[:9]}.jsonl"
    header = header_of(model, questions, asking, name)
    return evaluate(model, questions, path, asking, header, batch_size=3)


def split(name: str, questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Return what is to be forgotten, and the rest."""
    forget = [each for each in questions if each.set.startswith(CASES[name].forget)]
    return forget, [each for each in questions if each not in forget]


def compared(name: str, tmp_path: Path, *, knows: bool) -> Measured:
    """Return the measures of a model that knows the forget set or not, beside one that does not."""
    questions = asked(name, tmp_path)
    _, rest = split(name, questions)
    rows = log_of(name, questions, questions if knows else rest, tmp_path)
    retained = log_of(name, questions, rest, tmp_path)
    return measured(CASES[name].benchmark, rows, [retained])


@pytest.mark.parametrize("name", CASES)
def test_equal_models_change_nothing_and_lose_nothing(name: str, tmp_path: Path) -> None:
    found = compared(name, tmp_path, knows=False)
    assert found.measures
    for each in found.measures.values():
        assert each.change is not None
        assert (each.change.value, each.change.low, each.change.high) == (0, 0, 0)
        assert each.value == each.reference
    for finding in found.headline.findings.values():
        assert finding.away is not None
        assert (finding.away.value, finding.lost) == (0, False)
    assert found.headline.lost == []
    if found.membership is not None:
        assert found.membership["reference"].value == 0.5
        assert found.privleak is not None
        assert (found.privleak.value, found.privleak.low, found.privleak.high) == (0, 0, 0)


@pytest.mark.parametrize("name", ["rwku", "muse", "whp", "wmdp"])
def test_a_model_that_knows_the_forget_set_loses(name: str, tmp_path: Path) -> None:
    headline = compared(name, tmp_path, knows=True).headline
    assert {"extraction_strength", "comes_back", "membership"} <= set(headline.lost)
    assert "utility" not in headline.lost
    assert set(headline.not_measured) == {"depth", "relearning"}


def test_a_model_that_lost_what_is_to_be_kept_loses_utility(tmp_path: Path) -> None:
    questions = asked("muse", tmp_path)
    rest = split("muse", questions)[1]
    broken, retained = (log_of("muse", questions, known, tmp_path) for known in ([], rest))
    headline = measured(MUSE, broken, [retained]).headline
    assert headline.lost == ["membership", "utility"], "it finds unseen texts as unlikely as all others"


@pytest.mark.parametrize("name", CASES)
def test_a_log_is_continued_and_is_of_its_benchmark(name: str, tmp_path: Path) -> None:
    questions = asked(name, tmp_path)
    rows = log_of(name, questions, questions, tmp_path)
    assert [row.place for row in rows] == [each.place for each in questions]
    assert log_of(name, questions, questions, tmp_path) == rows
    (log,) = (tmp_path / "logs").iterdir()
    assert finished_log(log, name).rows == rows
    with pytest.raises(InvalidInput, match="another benchmark"):
        finished_log(log, "tofu")


def test_the_values_of_rwku(tmp_path: Path) -> None:
    questions = asked("rwku", tmp_path)
    known = [each for each in questions if each.set != "utility_bbh"]
    found = measured(RWKU, log_of("rwku", questions, known, tmp_path)).measures
    assert [found[f"forget_level{level}"].value for level in (1, 2, 3)] == [1, 1, 1]
    assert [
        found[name].value for name in ("mmlu", "truthfulqa", "triviaqa", "triviaqa exact", "bbh")
    ] == [1, 1, 1, 1, 0]
    assert found["forget_mia loss"].value == pytest.approx(-0.1)
    assert found["forget_level3 reverse_query"].num == 2
    assert "forget_level3 role_play" not in found
    unknown = measured(RWKU, log_of("rwku", questions, [], tmp_path)).measures
    assert unknown["forget_level1"].value == 0
    assert unknown["retain_mia loss"].value < -2


def test_what_rwku_asks(tmp_path: Path) -> None:
    questions = {each.set: each for each in asked("rwku", tmp_path)}
    assert questions["forget_level1"].question.startswith("Please complete the blank")
    assert questions["forget_level3/in_context_learning"].question.count("Question:") == 0
    mmlu = questions["utility_mmlu"]
    assert mmlu.question.endswith("Question: 2 + 2?\nA. 3\nB. 4\n")
    assert "A. 3\nB. 4\nAnswer: B\n\n" in mmlu.question
    assert (mmlu.answer, mmlu.perturbed) == ("B", ("A",))
    text = questions["forget_mia"]
    assert (text.how and text.how.kind, text.question) == ("text", text.answer)
    source = str(tmp_path / "rwku")
    some = Counter(each.set for each in rwku_questions(source, 1))
    assert set(some.values()) == {1}
    ada = rwku_questions(source, subjects=[ADA])
    assert Counter(each.set for each in ada)["forget_mia"] == 2
    with pytest.raises(InvalidInput, match="no questions about"):
        rwku_questions(source, subjects=["Nobody"])


def test_the_values_of_muse_and_of_a_series(tmp_path: Path) -> None:
    questions = asked("muse", tmp_path)
    none, some, full = (
        log_of("muse", questions, known, tmp_path) for known in ([], questions[:3], questions)
    )
    assert {each.set for each in questions[:3]} == {"verbmem"}
    found = measured(MUSE, full).measures
    assert [found[f"knowmem {name}"].value for name in ("forget", "retain")] == [1, 1]
    assert found["verbmem"].value == pytest.approx(2 * 4 / (4 + 6)), "all 4 words, and 2 more"
    assert measured(MUSE, none).measures["verbmem"].value == 0
    changes = since_first(MUSE, [none, some, full])
    assert [each.value for each in changes["verbmem"]] == pytest.approx([0, 0.8, 0.8])
    assert [each.value for each in changes["knowmem retain"]] == [0, 0, 1]
    icl = next(each for each in questions if each.set == "knowmem forget").question
    assert icl.count("Question:") == 4
    assert icl.endswith("Question: forget_qa 0?\nAnswer:")


def test_the_values_of_whp(tmp_path: Path) -> None:
    questions = asked("whp", tmp_path)
    prompt = next(each for each in questions if each.set == "probabilities")
    assert (prompt.answer, prompt.perturbed) == (" Hog warts", (" big", " far"))
    row = LogRow("probabilities", 0, 1.0, 1, "", None, (), None, None, logprob=-1.0,
                 others_logprob=(-1.0, -1.0, -1.0), accepted=("one", "two"))  # fmt: skip
    both = {each.name: each.of for each in WHP.scores}
    assert both["probability of idiosyncratic terms"](row) == pytest.approx(2 * 0.36787944)
    assert both["share of idiosyncratic terms"](row) == 0.5
    said = LogRow(
        "completions", 0, 1.0, 1, "", None, (), 0.0, "off to hogwarts!", accepted=("Hogwarts",)
    )
    assert both["familiar completions"](said) == 1.0


def test_the_values_of_wmdp_and_stereotypes(tmp_path: Path) -> None:
    questions = asked("wmdp", tmp_path)
    found = measured(WMDP, log_of("wmdp", questions, questions, tmp_path))
    assert {each.value for each in found.measures.values()} == {1.0}
    assert found.measures["choice bio"].num == 3
    same = LogRow("choice/bio", 0, 1.0, 1, "A", None, (1.0,) * 3, None, None, logprob=-1.0,
                  others_logprob=(-1.0,) * 3)  # fmt: skip
    assert measured(WMDP, [same]).measures["choice"].value == 0.25, "equal answers are a guess"
    pairs = asked("stereotypes", tmp_path)
    assert Counter(each.set for each in pairs) == {"pairs/gender": 2, "pairs/age": 2}
    prefers = measured(STEREOTYPES, log_of("stereotypes", pairs, pairs, tmp_path)).measures
    assert (prefers["stereotypical"].value, prefers["stereotypical age"].num) == (1.0, 2)


BAD: dict[str, tuple[str, dict[str, object], str]] = {
    "rwku": ("forget_level3", {"type": "hypnosis"}, "none of the nine attacks"),
    "muse": ("verbmem/forget", {"gt": ""}, "no text in 'prompt' or 'gt'"),
    "whp": ("probabilities", {"generic": "big"}, "'generic' is not a list of texts"),
    "wmdp": ("wmdp-bio", {"answer": 4}, "'answer' is not the number of a choice"),
    "stereotypes": ("crows_pairs", {"bias_type": 9}, "none of the nine kinds"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_rows_are_refused_all_at_once(name: str, tmp_path: Path) -> None:
    rows, (stored, change, what) = MADE_UP[name](), BAD[name]
    good = rows[stored][0]
    rows[stored] = [good, {**good, **change}, ["no object"]]  # type: ignore[list-item]
    source = write_made_up(tmp_path / "bad", rows)
    with pytest.raises(InvalidInput) as raised:
        CASES[name].benchmark.read(str(source), None)
    problems = {each.where: each.what for each in raised.value.problems}
    assert what in problems[f"{stored}, row 2"]
    assert problems[f"{stored}, row 3"] == "not a JSON object"
    with pytest.raises(InvalidInput):
        CASES[name].benchmark.read(str(tmp_path / "bad" / "absent"), None)


def test_every_file_that_muse_lacks_is_listed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as raised:
        muse_questions(str(tmp_path))
    names = [f"knowmem/{name}_qa{ending}" for ending in ("_icl", "") for name in ("forget", "retain")]
    assert [(each.where, each.what) for each in raised.value.problems] == [
        (f"{name}.jsonl", "missing") for name in names
    ]


def test_references_of_other_questions_are_refused(tmp_path: Path) -> None:
    questions = asked("muse", tmp_path)
    rows = log_of("muse", questions, questions, tmp_path)
    with pytest.raises(InvalidInput, match="other questions"):
        measured(MUSE, rows, [rows[1:]])


@pytest.mark.skipif(not (REAL / "rwku").is_dir(), reason="no data: set SISA_DATA")
def test_the_real_data_is_read_whole() -> None:
    sizes = Counter(each.set.split("/")[0] for each in rwku_questions(str(REAL / "rwku")))
    assert sizes == {
        "forget_level1": 3268, "forget_level2": 2879, "forget_level3": 6984,
        "neighbor_level1": 5846, "neighbor_level2": 5533, "forget_mia": 6198, "retain_mia": 7487,
        "utility_mmlu": 171, "utility_bbh": 81, "utility_truthfulqa": 50,
        "utility_triviaqa": 100, "utility_fluency": 50,
    }  # fmt: skip
    news = muse_questions(str(REAL / "muse" / "news"))
    assert set(Counter(each.set for each in news).values()) == {100}
    books = Counter(each.set for each in muse_questions(str(REAL / "muse" / "books")))
    assert books == {"knowmem forget": 100, "knowmem retain": 100}
    assert len(ATTACK_TYPES) == 9


def test_the_digest_of_questions_holds_their_manner(tmp_path: Path) -> None:
    questions = asked("muse", tmp_path)
    plain = [Question(*vars(each).values()) for each in questions]
    assert questions_digest(plain) == questions_digest(questions)
    bare = [Question(each.set, each.idx, each.question, each.answer) for each in questions]
    assert questions_digest(bare) != questions_digest(questions)
