"""MUSE: six properties of a model after unlearning news or books, four of one model and two of several.

    C1 verbmem          mean ROUGE-L F1 of the greedy continuation (128 tokens) of forget passages
    C2 knowmem forget   mean ROUGE-L F1 of answers (32 tokens) about them, after ten given examples
    C3 privleak         Min-K% (k = 0.4) of forget texts against unseen ones, beside the retrained model
    C4 knowmem retain   as C2, about what is to be kept: utility
    C5 scalability      C1 to C4 over models that forgot nested sets of growing size, in order
    C6 sustainability   C1 to C4 over models after one request, two, ... in order

A directory has `verbmem/forget.jsonl` (prompt, gt), `knowmem/forget_qa.jsonl`, `retain_qa.jsonl` and
their `_icl` examples (question, answer), `privleak/forget.jsonl` and `holdout.jsonl` (text). On the hub
(`muse-bench/MUSE-News`, `muse-bench/MUSE-Books`) folders are configurations and files splits. Passages
and texts may be missing; questions and their examples may not.

Prompts are raw text, without a chat template, as in the published code: "Question: ... Answer: ...",
examples first. Answers end before an empty line or another question.

Source: Shi et al. 2024, arXiv 2407.06460; code `jaechan-repo/muse_bench`, `swj0419/muse_bench`. ROUGE
without stems. `approx/metrics/privleak.py` has C3.

Limits: continuations are compared with the whole published text, which has 128 tokens of Llama-2;
another tokenizer's 128 tokens may be more or less text. Privacy texts of 2,000 tokens need a model with
such a context. The forget texts are real news, which a base may have seen. MUSE's own folds of C5 and
C6 are of its news; other folds do as well, if the report names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from approx.benchmarks.measures import Benchmark, Score
from approx.evaluation.question_log import LogRow
from approx.evaluation.questions import (
    How,
    Question,
    Source,
    StoredRow,
    StoredSet,
    plain_text,
    read_questions,
    texts_of,
)
from approx.metrics.word_overlap import rougeL_f1

MUSE_DATA = Source("MUSE", "muse-bench/MUSE-News")
CONTINUED = How("completion", max_new_tokens=128)
ANSWERED = How("completion", max_new_tokens=32, stops=("\n\n", "\nQuestion", "Question:"))


def muse_questions(source: str, limit: int | None = None) -> list[Question]:
    """Return MUSE's questions. Raise as `read_questions`."""
    shown: dict[str, list[str]] = {"forget": [], "retain": []}  # filled before a question needs them
    sets = [
        *(StoredSet(f"knowmem/{name}_qa_icl", partial(_show, shown[name])) for name in shown),
        StoredSet("verbmem/forget", _passage, optional=True),
        *(StoredSet(f"knowmem/{name}_qa", partial(_asked, name, shown[name])) for name in shown),
        *(
            StoredSet(f"privleak/{name}", partial(_text, f"privleak {name}"), optional=True)
            for name in ("forget", "holdout")
        ),
    ]
    return read_questions(source, MUSE_DATA, sets, limit)


def _show(shown: list[str], _number: int, row: StoredRow) -> None:
    """Add an example to those that stand before each question; it is none itself."""
    question, answer = texts_of(row, "question", "answer")
    shown.append(f"Question: {question}\nAnswer: {answer}\n\n")


def _passage(number: int, row: StoredRow) -> Question:
    prompt, truth = texts_of(row, "prompt", "gt")
    return Question("verbmem", number, prompt, f" {truth}", how=CONTINUED)  # cut between words


def _asked(name: str, shown: Sequence[str], number: int, row: StoredRow) -> Question:
    question, answer = texts_of(row, "question", "answer")
    prompt = f"{''.join(shown)}Question: {question}\nAnswer:"
    return Question(f"knowmem {name}", number, prompt, f" {answer}", how=ANSWERED)


def _text(name: str, number: int, row: StoredRow) -> Question:
    (text,) = texts_of(row, "text")
    return plain_text(name, number, text)


def _f1(row: LogRow) -> float:
    return rougeL_f1(row.ground_truth, row.generation or "")


MUSE = Benchmark(
    name="muse",
    read=muse_questions,
    scores=(
        Score("verbmem", ("verbmem",), _f1),
        Score("knowmem forget", ("knowmem forget",), _f1),
        Score("knowmem retain", ("knowmem retain",), _f1),
    ),
    extraction=("verbmem",),
    comes_back=("knowmem forget",),
    utility=("knowmem retain",),
    members="privleak forget",
    unseen="privleak holdout",
)
