"""TOFU's data from a local directory or from the hub, as questions.

    DIR/forget10_perturbed.jsonl    question, answer, paraphrased_answer, perturbed_answer: [text]
                                    and, optional, paraphrased_question
    DIR/retain_perturbed.jsonl      the same
    DIR/real_authors_perturbed.jsonl and world_facts_perturbed.jsonl     without paraphrased_answer
    DIR/forget10.jsonl, retain90.jsonl, full.jsonl ...                   question, answer

On the hub these are configurations of one dataset, split `train`. On real authors and world facts the
answer is its own paraphrase. Rows are identified by their order.

TOFU's holdout sets are not in its first release, so membership attacks need a file of questions that no
model has seen (`read_question_file`).

Source: TOFU (Maini et al. 2024), `locuslab/TOFU`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from approx.evaluation.questions import (
    Question,
    Source,
    StoredRow,
    StoredSet,
    list_of,
    plain_question,
    read_questions,
    texts_of,
)
from approx.metrics.model_utility import UTILITY_SETS

ForgetSplit = Literal["forget01", "forget05", "forget10"]
REWORDED = "reworded"
TOFU = Source("TOFU", "locuslab/TOFU")


def evaluation_sets(source: str, split: ForgetSplit, limit: int | None = None) -> list[Question]:
    """Return the questions of an evaluation: retain, real authors, world facts, then the forget set.

    `source` is a directory or a hub name. `limit` takes the first questions of each set (the published
    logs have 300). Raise InvalidInput listing what is missing or malformed, or EnvironmentFault.
    """
    return read_sets(source, {name: f"{name}_perturbed" for name in (*UTILITY_SETS, split)}, limit)


def reworded_questions(source: str, split: ForgetSplit, limit: int | None = None) -> list[Question]:
    """Return the forget questions in other words, if the data has them. Raise as `evaluation_sets`."""

    def make(number: int, row: StoredRow) -> Question | None:
        if "paraphrased_question" not in row:
            return None
        question, answer = texts_of(row, "paraphrased_question", "answer")
        return Question(REWORDED, number, question, answer)

    stored = StoredSet(f"{split}_perturbed", make)
    return read_questions(source, TOFU, [stored], limit, may_be_empty=True)


def read_sets(
    source: str, sets: Mapping[str, str], limit: int | None = None, *, plain: bool = False
) -> list[Question]:
    """Return the questions of sets, given with the names they are stored under.

    Plain sets hold questions and answers alone. Raise as `evaluation_sets`.
    """
    made = [
        StoredSet(stored, partial(plain_question if plain else _question, name))
        for name, stored in sets.items()
    ]
    return read_questions(source, TOFU, made, limit)


def _question(name: str, number: int, row: StoredRow) -> Question:
    question, answer = texts_of(row, "question", "answer")
    perturbed = tuple(list_of(row, "perturbed_answer"))
    (paraphrased,) = texts_of({"paraphrased_answer": answer, **row}, "paraphrased_answer")
    return Question(name, number, question, answer, paraphrased, perturbed)
