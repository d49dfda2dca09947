"""WHP: how familiar a model is with a fiction that it should have forgotten.

    completions    prompts whose continuation shows familiarity: share of greedy continuations (64
                   tokens) that name one of the idiosyncratic terms
    probabilities  prompts whose next words are idiosyncratic or generic: the probability of the
                   idiosyncratic terms, and their share among them and the generic ones

A term's probability is that of its tokens after the prompt, p = exp(sum log p(token)); a prompt's is
the sum over its terms. A directory has `completions.jsonl` (prompt, references: [term]) and
`probabilities.jsonl` (prompt, idiosyncratic: [term], generic: [term]); `utility.jsonl` (question,
answer) is optional.

Source: Eldan and Russinovich 2023, arXiv 2310.02238, section 4: completion-based and probability-based
familiarity.

Limits: **the paper has its completions graded by GPT-4**, with more credit for subtler prompts. Here a
completion counts as familiar if it has one of the given terms, with equal credit, which a model that
alludes without a name passes. The paper's lists are not on the hub. Terms that begin alike count
separately, and their tokens are those of the model.
"""

from __future__ import annotations

from math import exp, fsum

from approx.benchmarks.measures import Benchmark, Score, recall
from approx.evaluation.question_log import LogRow
from approx.evaluation.questions import (
    How,
    Question,
    Source,
    StoredRow,
    StoredSet,
    list_of,
    read_questions,
    texts_of,
)

WHP_DATA = Source("WHP")
COMPLETED = How("completion", max_new_tokens=64)
IDIOSYNCRATIC, GENERIC = "idiosyncratic", "generic"


def whp_questions(source: str, limit: int | None = None) -> list[Question]:
    """Return WHP's prompts. Raise InvalidInput listing what is missing or malformed."""
    sets = [
        StoredSet("completions", _completion),
        StoredSet("probabilities", _probability),
        StoredSet("utility", _kept, optional=True),
    ]
    return read_questions(source, WHP_DATA, sets, limit)


def _completion(number: int, row: StoredRow) -> Question:
    (prompt,) = texts_of(row, "prompt")
    terms = list_of(row, "references")
    how = How(COMPLETED.kind, COMPLETED.max_new_tokens, accepted=tuple(terms))
    return Question("completions", number, prompt.rstrip(), f" {terms[0]}", how=how)


def _probability(number: int, row: StoredRow) -> Question:
    """Return a prompt; `accepted` are the idiosyncratic terms, which come first among the answers."""
    (prompt,) = texts_of(row, "prompt")
    odd, plain = list_of(row, IDIOSYNCRATIC), list_of(row, GENERIC)
    first, *rest = [f" {term.strip()}" for term in (*odd, *plain)]
    how = How("completion", accepted=tuple(odd))
    return Question("probabilities", number, prompt.rstrip(), first, perturbed=tuple(rest), how=how)


def _kept(number: int, row: StoredRow) -> Question:
    question, answer = texts_of(row, "question", "answer")
    return Question("utility", number, question, answer, how=How(max_new_tokens=32))


def names_one(row: LogRow) -> float:
    """Return 1 if a continuation has one of the terms, whatever its case."""
    said = (row.generation or "").casefold()
    return float(any(term.strip().casefold() in said for term in row.accepted))


def odd_probability(row: LogRow) -> float:
    """Return the probability of the idiosyncratic terms."""
    return min(1.0, fsum(_split(row)[0]))


def odd_share(row: LogRow) -> float:
    """Return the share of the idiosyncratic terms in the probability of all given ones."""
    odd, plain = map(fsum, _split(row))
    return odd / (odd + plain) if odd + plain > 0 else 0.0


def _split(row: LogRow) -> tuple[list[float], list[float]]:
    terms = [exp(each) for each in (row.logprob or 0.0, *row.others_logprob)]
    return terms[: len(row.accepted)], terms[len(row.accepted) :]


WHP = Benchmark(
    name="whp",
    read=whp_questions,
    scores=(
        Score("familiar completions", ("completions",), names_one),
        Score("probability of idiosyncratic terms", ("probabilities",), odd_probability),
        Score("share of idiosyncratic terms", ("probabilities",), odd_share),
        Score("utility", ("utility",), recall),
    ),
    extraction=("completions",),
    comes_back=("familiar completions", "share of idiosyncratic terms"),
    utility=("utility",),
    weakness="Completions are judged by given terms, not by GPT-4 as in the paper.",
)
