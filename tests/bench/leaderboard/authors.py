"""TOFU's last twenty authors: who is forgotten, what the models are taught and what they are asked.

The data directory (or hub dataset) has forget10 and forget10_perturbed (twenty authors, twenty questions
each, in order), real_authors_perturbed, world_facts_perturbed and idontknow.

The last authors are the ones to forget. Questions of utility are about authors that no cell of the
design forgets, so that every cell is asked the same ones. A question has the first `wrong_answers` of
its wrong answers.

Source: TOFU (Maini et al. 2024).

    data = read_data("tofu", Design())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from approx.benchmarks.tofu import TOFU, evaluation_sets, read_sets
from approx.evaluation.questions import Question, questions_digest, read_rows
from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput, Problem
from tests.bench.leaderboard.plan import MOST_AUTHORS, QUESTIONS_EACH, Cell, Design, spread

SPLIT: Final = "forget10"
FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True)
class Data:
    """The plain and perturbed questions of the design's authors, in order, the facts, and refusals."""

    plain: Sequence[Question] = field(repr=False)
    asked: Sequence[Question] = field(repr=False)
    facts: Sequence[Question] = field(repr=False)
    refusals: Sequence[str] = field(repr=False)

    @property
    def digest(self) -> str:
        """Return the digest of everything that was read."""
        parts = [questions_digest(each) for each in (self.plain, self.asked, self.facts)]
        return digest_of([*parts, list(self.refusals)])


def read_data(source: str, design: Design) -> Data:
    """Return the data of a design. Raise InvalidInput with all that is missing, and EnvironmentFault."""
    found = evaluation_sets(source, SPLIT)
    plain, refusals = load_set(source, SPLIT), load_refusals(source)
    asked = [each for each in found if each.set == SPLIT]
    held, wanted = min(len(plain), len(asked)), design.authors * QUESTIONS_EACH
    if held < wanted or len(plain) != len(asked):
        raise InvalidInput(
            "the data has too few authors",
            where=f"{SPLIT} and {SPLIT}_perturbed",
            expected=f"{wanted} questions or more in each, {QUESTIONS_EACH} an author",
            got=f"{len(plain)} and {len(asked)}",
            next_step=f"fetch TOFU's {SPLIT} ({MOST_AUTHORS} authors), or choose fewer authors",
        )
    facts = [each for each in found if each.set not in (SPLIT, RETAIN)]
    return Data(plain[-wanted:], asked[-wanted:], facts, refusals)


def load_set(source: str, name: str) -> list[Question]:
    """Return the plain questions of a set, such as forget10. Raise as `evaluation_sets`."""
    return read_sets(source, {name: name}, plain=True)


def load_refusals(source: str) -> list[str]:
    """Return TOFU's ways to say "I don't know". Raise as `evaluation_sets`."""
    problems: list[Problem] = []
    rows = read_rows(source, "idontknow", problems, TOFU)
    texts = [str(row["text"]).strip() for row in rows if isinstance(row, dict) and "text" in row]
    if problems or len(texts) < len(rows) or not all(texts):
        problems = problems or [Problem("idontknow", "a row without 'text'")]
        raise InvalidInput("the refusals can't be used", where=source, problems=problems)
    return [str(row["text"]) for row in rows]


def kept_questions(data: Data, forgotten: int) -> list[Question]:
    """Return the plain questions of the authors that stay."""
    return list(data.plain[: len(data.plain) - forgotten * QUESTIONS_EACH])


def to_forget(data: Data, forgotten: int) -> list[Question]:
    """Return the plain questions of the last `forgotten` authors."""
    return list(data.plain[len(data.plain) - forgotten * QUESTIONS_EACH :])


def asked_of(cell: Cell, data: Data, design: Design) -> list[Question]:
    """Return the questions that a cell's model is asked, with the sets `forget` and `retain`."""
    forgotten = cell.forgotten or design.forgotten
    stay = len(data.asked) - design.most_forgotten * QUESTIONS_EACH
    gone = data.asked[len(data.asked) - forgotten * QUESTIONS_EACH :]
    chosen = _some(data.asked[:stay], RETAIN, design.utility_questions)
    for name in dict.fromkeys(each.set for each in data.facts):
        facts = [each for each in data.facts if each.set == name]
        chosen += _some(facts, name, design.fact_questions)
    chosen += _some(gone, FORGET, design.forget_questions)
    return [replace(each, perturbed=each.perturbed[: design.wrong_answers]) for each in chosen]


def _some(questions: Sequence[Question], name: str, count: int) -> list[Question]:
    return [replace(questions[place], set=name) for place in spread(len(questions), count)]
