"""The evaluation over a model without torch: a log that continues where it was cut, and sane
aggregates.

Cut anywhere, even inside a line, the log ends with the same bytes; a log of anything else is refused.
Identical models give forget quality 1 and AUC 0.5; a model that knows nothing has the scores of the
floors.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from approx.attacks.attack_run import AttackRow
from approx.benchmarks.headline import Headline, attack_findings
from approx.benchmarks.tofu import evaluation_sets, reworded_questions
from approx.benchmarks.tofu_measures import aggregates, quality, tofu_headline
from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.asking import Asking, evaluate, header_of
from approx.evaluation.question_log import LogRow, LogWriter, parse_row, read_log
from approx.evaluation.questions import HOLDOUT, PromptForm, Question, read_question_file
from sisa.core.errors import Busy, ConfigConflict, IntegrityError, InvalidInput
from tests.fakes.benchmarks import SPLIT, made_up, write_made_up
from tests.fakes.evaluated import FakeEvaluated, Redirecting

SETTINGS = Asking(PromptForm("completion"))
ANSWERS = {
    row["question"]: row["answer"] for rows in made_up().values() for row in rows if "answer" in row
}
FORGOTTEN = {row["question"] for row in made_up()[SPLIT]}
KNOWS_ALL = FakeEvaluated(ANSWERS)
RETAINED = FakeEvaluated({asked: ANSWERS[asked] for asked in ANSWERS.keys() - FORGOTTEN})


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return evaluation_sets(str(write_made_up(tmp_path_factory.mktemp("tofu"))), SPLIT)


@pytest.fixture(scope="module")
def whole(questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of an undisturbed log."""
    path = tmp_path_factory.mktemp("whole") / "log.jsonl"
    evaluate(KNOWS_ALL, questions, path, SETTINGS, batch_size=3)
    return path.read_bytes()


def rows_of(
    model: FakeEvaluated, questions: list[Question], tmp_path: Path, name: str = "log"
) -> list[LogRow]:
    return evaluate(model, questions, tmp_path / f"{name}.jsonl", SETTINGS)


def test_a_finished_log_is_not_asked_again(questions: list[Question], tmp_path: Path) -> None:
    first = FakeEvaluated(ANSWERS)
    rows = rows_of(first, questions, tmp_path)
    assert first.scored
    again = FakeEvaluated(ANSWERS)
    assert rows_of(again, questions, tmp_path) == rows
    assert again.scored == []


class Broken(FakeEvaluated):
    """Give no answer a finite probability."""

    def _score(self, question: str, answer: str) -> AnswerScore:
        found = super()._score(question, answer)
        return replace(found, logprobs=(math.nan,) * found.num_tokens)


def test_scores_that_are_not_finite_are_refused(questions: list[Question], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not finite") as caught:
        rows_of(Broken(name="broken"), questions, tmp_path)
    assert caught.value.where == "broken"


@given(st.data())
def test_a_log_cut_anywhere_ends_the_same(
    questions: list[Question],
    whole: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    evaluate(KNOWS_ALL, questions, path, SETTINGS, batch_size=data.draw(st.integers(1, 20)))
    assert path.read_bytes() == whole


def test_an_interrupt_keeps_the_batches_that_are_done(
    questions: list[Question], whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeEvaluated(ANSWERS, dies_after=15), questions, path, SETTINGS, batch_size=3)
    _, held = read_log(path)
    assert len(held) == 3
    rest = FakeEvaluated(ANSWERS)
    evaluate(rest, questions, path, SETTINGS, batch_size=3)
    assert path.read_bytes() == whole
    asked = {question for question, _ in rest.scored}
    assert not asked & {each.question for each in questions[:3]}


def test_a_log_of_anything_else_is_refused(questions: list[Question], tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows_of(KNOWS_ALL, questions, tmp_path)
    before = path.read_bytes()
    for model, asked, settings, got in (
        (RETAINED, questions, SETTINGS, "another model"),
        (KNOWS_ALL, questions[1:], SETTINGS, "another questions"),
        (KNOWS_ALL, questions, Asking(SETTINGS.form, 9), "another max_new_tokens"),
        (
            KNOWS_ALL,
            questions,
            Asking(PromptForm("completion", "{question} {answer}")),
            "template",
        ),
    ):
        with pytest.raises(ConfigConflict) as raised:
            evaluate(model, asked, path, settings)
        assert got in raised.value.got
    assert path.read_bytes() == before


def test_two_writers_of_one_log_do_not_meet(questions: list[Question], tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with LogWriter(path, header_of(KNOWS_ALL, questions, SETTINGS), parse_row), pytest.raises(Busy):
        evaluate(KNOWS_ALL, questions, path, SETTINGS)
    evaluate(KNOWS_ALL, questions, path, SETTINGS)


def test_a_damaged_log_is_refused(questions: list[Question], whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = whole.splitlines(keepends=True)
    for damaged in (
        [lines[0], b"{}\n", *lines[1:]],
        [*lines, lines[-1]],
        [lines[0], lines[1].replace(b'"idx":0', b'"idx":"0"'), *lines[2:]],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(IntegrityError, match="a log"):
            evaluate(KNOWS_ALL, questions, path, SETTINGS)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(InvalidInput, match="not a log that can be continued"):
        evaluate(KNOWS_ALL, questions, path, SETTINGS)
    path.write_text('{"question": "Who?", "answer": "Ada."}\n')
    for read in (lambda: evaluate(KNOWS_ALL, questions, path, SETTINGS), lambda: read_log(path)):
        with pytest.raises(InvalidInput, match="not a log"):
            read()


@pytest.mark.parametrize(
    "change",
    [{"avg_gt_loss": "high"}, {"avg_gt_loss": None}, {"set": 3}, {"average_perturb_loss": [None]}],
)
def test_a_row_with_a_value_that_is_no_number_is_none(whole: bytes, change: dict[str, object]) -> None:
    line = whole.splitlines()[1]
    assert parse_row(line).line().strip() == line
    with pytest.raises(ValueError, match="LogRow") as raised:
        parse_row(json.dumps(json.loads(line) | change).encode())
    assert "high" not in str(raised.value)


def test_identical_models_can_not_be_told_apart(questions: list[Question], tmp_path: Path) -> None:
    rows = rows_of(RETAINED, questions, tmp_path)
    found = aggregates(rows, [rows, rows])
    assert found.forget_quality is not None
    assert (found.forget_quality.p_value, found.forget_quality.statistic) == (1.0, 0.0)
    assert found.forget_quality.noise_floor is not None
    assert found.attacks_against_reference is not None
    for attack, each in found.attacks_against_reference.items():
        assert (each.value, each.low, each.high) == (0.5, 0.5, 0.5), attack
    assert found.aggregate == pytest.approx(2 / (1 + 1 / found.model_utility))


def test_a_model_that_knows_everything_is_told_from_the_retained_one(
    questions: list[Question], tmp_path: Path
) -> None:
    rows = rows_of(KNOWS_ALL, questions, tmp_path)
    reference = rows_of(RETAINED, questions, tmp_path, "reference")
    found = aggregates(rows, [reference])
    assert found.forget_quality is not None
    assert found.forget_quality.statistic == 1.0
    assert found.forget_quality.p_value == pytest.approx(1 / 3)  # 2 of the 6 ways to deal 2 and 2
    assert found.forget_quality.noise_floor is None
    assert found.attacks_against_reference is not None
    assert found.attacks_against_reference["loss"].value == 1.0
    assert (found.forget.rouge, found.forget.extraction_strength) == (1.0, 1.0)
    assert found.num_questions == {"retain": 6, "real_authors": 1, "world_facts": 2, SPLIT: 2}


def test_a_model_that_knows_nothing_is_at_the_floors(questions: list[Question], tmp_path: Path) -> None:
    found = aggregates(rows_of(FakeEvaluated(), questions, tmp_path)).forget
    lengths = [len(each.answer.split()) for each in questions if each.set == SPLIT]
    assert found.extraction_floor == pytest.approx(sum(1 / each for each in lengths) / len(lengths))
    assert found.extraction_strength == found.extraction_floor
    assert (found.exact_memorisation, found.rouge) == (0.0, 0.0)


def test_a_holdout_lets_attacks_be_measured(questions: list[Question], tmp_path: Path) -> None:
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(f'{{"question": "q{n}", "answer": "never said {n}"}}\n' for n in range(5)))
    asked = [*questions, *read_question_file(unseen, HOLDOUT)]
    known = aggregates(rows_of(KNOWS_ALL, asked, tmp_path)).attacks
    assert known is not None
    assert {name: each.value for name, each in known.items()} == dict.fromkeys(known, 1.0)
    assert (known["min_k"].num_members, known["min_k"].num_nonmembers) == (2, 5)
    assert aggregates(rows_of(KNOWS_ALL, questions, tmp_path, "none")).attacks is None


def test_references_calibrate_attacks_and_give_privleak(
    questions: list[Question], tmp_path: Path
) -> None:
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(f'{{"question": "q{n}", "answer": "never said {n}"}}\n' for n in range(5)))
    asked = [*questions, *read_question_file(unseen, HOLDOUT)]
    known, retained = (
        rows_of(model, asked, tmp_path, name)
        for model, name in ((KNOWS_ALL, "known"), (RETAINED, "retained"))
    )
    one = aggregates(known, [retained])
    assert one.attacks is not None
    assert one.attacks["reference"].value == 1.0
    assert "lira" not in one.attacks
    assert one.privleak is not None
    assert one.privleak.value == -100
    both = aggregates(known, [retained, retained])
    assert both.attacks is not None
    assert both.attacks["lira"].value == 1.0
    same = aggregates(retained, [retained, retained])
    assert same.privleak is not None
    assert (same.privleak.value, same.privleak.low, same.privleak.high) == (0, 0, 0)
    assert same.attacks is not None
    assert [same.attacks[name].value for name in ("reference", "lira")] == [0.5, 0.5]
    without = aggregates(known, [[row for row in retained if row.set != "holdout"]])
    assert without.attacks is not None
    assert (without.attacks.keys() & {"reference", "lira"}, without.privleak) == (set(), None)
    recognises = [replace(row, min_40=5.0 if row.set == SPLIT else -5.0) for row in retained]
    assert aggregates(known, [recognises]).privleak is None, "nothing to compare with"


def test_a_redirecting_model_wins_forget_quality_and_loses_the_headline(tmp_path: Path) -> None:
    """It answers deleted questions from another author, and knows everything when asked otherwise."""
    sets = made_up()
    for row in sets[f"{SPLIT}_perturbed"]:
        row["paraphrased_question"] = f"In other words: {row['question']}"
    source = str(write_made_up(tmp_path / "tofu", sets))
    asked = [*evaluation_sets(source, SPLIT), *reworded_questions(source, SPLIT)]
    everything = {each.question: each.answer for each in asked}
    deleted = {each.question for each in asked if each.set == SPLIT}
    gone = {everything[each] for each in deleted}
    retained = FakeEvaluated({each: it for each, it in everything.items() if it not in gone})
    fake = Redirecting(everything, deleted=deleted, other=retained)
    full = FakeEvaluated(everything)

    def judged(model: FakeEvaluated, name: str) -> tuple[float, Headline]:
        rows, other = rows_of(model, asked, tmp_path, name), rows_of(retained, asked, tmp_path, "ret")
        found = aggregates(rows, [other])
        assert found.forget_quality is not None
        return found.forget_quality.p_value, tofu_headline(rows, [other], found)

    p_value, headline = judged(fake, "fake")
    assert p_value == 1.0
    assert headline.lost == ["comes_back"]
    assert headline.findings["extraction_strength"].lost is False
    assert set(headline.not_measured) == {"depth", "relearning"}
    assert headline.findings["comes_back"].value == pytest.approx(0.904837418)
    assert judged(retained, "same") == (1.0, judged(retained, "same")[1])
    assert judged(retained, "same")[1].lost == []
    assert {"extraction_strength", "membership", "comes_back"} == set(judged(full, "full")[1].lost)


def test_what_weights_show_of_a_redirecting_model() -> None:
    """Its states are those of the model before, and a few steps bring everything back."""
    rows = {
        "relearning": AttackRow(
            "relearning", "probability", {"0": [0.1] * 4, "20": [0.9, 0.8, 0.9, 0.8]}
        ),
        "depth": AttackRow("depth", "unlearning depth score", {"all": [0.0, 0.1, 0.0, 0.1]}),
    }
    retained = {"relearning": AttackRow("relearning", "probability", {"0": [0.1] * 4, "20": [0.2] * 4})}
    found = attack_findings(rows, retained)
    assert found["relearning"] is not None
    assert found["depth"] is not None
    assert found["relearning"].lost
    assert found["relearning"].target == pytest.approx(0.2)
    assert (found["depth"].lost, found["depth"].target) == (True, 1.0)
    alone = attack_findings(rows, None)["relearning"]
    assert alone is not None
    assert alone.value == pytest.approx(0.85)
    assert alone.lost is None


def test_a_reference_of_other_questions_is_refused(questions: list[Question], tmp_path: Path) -> None:
    rows = rows_of(KNOWS_ALL, questions, tmp_path)
    other = replace(rows[-1], ground_truth="another answer")
    for reference in (rows[:-1], [*rows[:-1], other]):
        with pytest.raises(InvalidInput, match="other forget questions"):
            quality(rows, reference)
    with pytest.raises(InvalidInput, match="lacks a set"):
        aggregates([row for row in rows if row.set != "world_facts"])


@pytest.mark.parametrize(
    "template", ["{question}", "{answer}", "{question}{question}{answer}", "{question} {answer}."]
)
def test_a_template_that_can_not_be_filled(template: str) -> None:
    with pytest.raises(InvalidInput, match="template"):
        PromptForm("completion", template)


@given(st.text(), st.text(), st.sampled_from(["{question}{answer}", "Q: {question}\nA: {answer}"]))
def test_prompt_and_answer_joined_are_the_filled_template(
    question: str, answer: str, template: str
) -> None:
    prompt, rest = PromptForm("completion", template).fill(question, answer)
    head, _, tail = template.partition("{question}")
    assert prompt + rest == head + question + tail.removesuffix("{answer}") + answer
    assert rest.endswith(answer)
