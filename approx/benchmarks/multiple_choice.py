"""Questions of multiple choice, answered by a letter: RWKU's MMLU and WMDP ask them alike.

>>> print(lettered("2 + 2?", ["4", "5"]))
Question: 2 + 2?
A. 4
B. 5
"""

from __future__ import annotations

from collections.abc import Sequence

from approx.evaluation.questions import How, Malformed, Question, StoredRow, list_of, texts_of

LETTERS = "ABCDEFGHIJ"


def lettered(question: str, choices: Sequence[str]) -> str:
    """Return a question with its choices, one a line."""
    lines = [f"{letter}. {each}" for letter, each in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"Question: {question}", *lines])


def choice_question(name: str, number: int, row: StoredRow, before: str = "") -> Question:
    """Return a question of multiple choice that is answered by a letter. Raise Malformed."""
    asked, choices, right = choices_of(row)
    letters = LETTERS[: len(choices)]
    wrong = tuple(each for each in letters if each != letters[right])
    return Question(
        name,
        number,
        f"{before}{lettered(asked, choices)}\n",
        letters[right],
        perturbed=wrong,
        how=How(),
    )


def choices_of(row: StoredRow) -> tuple[str, list[str], int]:
    """Return a question, its choices, and the number of the right one. Raise Malformed."""
    (asked,) = texts_of(row, "question")
    choices, right = list_of(row, "choices", 2), row.get("answer")
    if not isinstance(right, int) or not 0 <= right < min(len(choices), len(LETTERS)):
        raise Malformed("'answer' is not the number of a choice")
    return asked, choices, right
