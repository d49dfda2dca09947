"""Invent data in the layouts of the benchmarks, and fake a model that gives some of the answers.

`FakeAnswering` knows some questions: it gives their answers and finds them likely. Any other answer is
unlikely, by its own hash, so that scores vary and are equal in every run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from approx.evaluation.evaluated import AnswerScore, PromptForm, PromptKind
from approx.evaluation.questions import Question
from sisa.core.digest import digest_of
from tests.fakes.evaluated import Rows, number_of

ADA, BOB = "Ada Test", "Bob Test"


@dataclass
class FakeAnswering:
    """Know the questions of `known`: give their answers, and find these likely."""

    known: Collection[Question] = ()
    name: str = "fake"
    kind: PromptKind = "completion"
    scored: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._answers = {each.question: each.answer for each in self.known}

    @property
    def digest(self) -> str:
        return digest_of(sorted(self._answers))

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        assert form.template
        assert batch_size >= 1
        self.scored += pairs
        return [self._score(*pair) for pair in pairs]

    def _score(self, question: str, answer: str) -> AnswerScore:
        sure = self._answers.get(question) == answer
        words = [*answer.split(), ""]
        logprobs = tuple(-(0.1 if sure else 2 + number_of(question, word)) for word in words)
        return AnswerScore(logprobs, (sure,) * len(words), (-3.0,) * len(words), (1.0,) * len(words))

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        assert form.kind != "text"
        assert batch_size >= 1
        replies = [self._answers.get(each, "No idea at all.") for each in questions]
        return [" ".join(each.split()[:max_new_tokens]) + "\n\nQuestion: more" for each in replies]


def rwku_rows() -> dict[str, Rows]:
    """Return sets in RWKU's layout, about two people."""
    probes = [
        {
            "subject": subject,
            "query": f"{subject} number {n} is ___",
            "answer": f"thing {n}",
            "type": kind,
        }
        for subject in (ADA, BOB)
        for n, kind in enumerate(["reverse query", "cross lingual (French)", "incontext learning"])
    ]
    texts = [
        {"subject": subject, "text": f"{subject} did {n} things"}
        for subject in (ADA, BOB)
        for n in (1, 2)
    ]
    mmlu = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "task": "some_sums"}
    truthful = {"choices": ["It is round.", "It is flat."], "labels": [1, 0]}
    return {
        **{
            f"forget_level{level}": [{**each, "level": str(level)} for each in probes]
            for level in (1, 2, 3)
        },
        **{
            f"neighbor_level{level}": [{**each, "query": f"near {each['query']}"} for each in probes]
            for level in (1, 2)
        },
        "forget_mia": texts,
        "retain_mia": [{**each, "text": f"Elsewhere {each['text']}"} for each in texts],
        "utility_mmlu": [{**mmlu, "examples": [mmlu]}],
        "utility_retain_bbh": [{"cot": "Think.", "question": "not True is", "answer": "False"}],
        "utility_truthful": [{"question": "What is the Earth?", "mc1_targets": truthful}],
        "utility_triviaqa": [{"question": "Who sang?", "answers": ["The Beatles", "Fab Four"]}],
        "utility_fluency": [{"instruction": "Write a line."}],
    }


def muse_rows() -> dict[str, Rows]:
    """Return sets in MUSE's layout."""
    questions = {
        name: [{"question": f"{name} {n}?", "answer": f"answer {n}"} for n in range(3)]
        for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")
    }
    texts = {
        name: [{"text": f"the {name} text {n}"} for n in range(3)] for name in ("forget", "holdout")
    }
    passages = [{"prompt": f"passage {n} begins", "gt": f"and then ends {n}"} for n in range(3)]
    return {
        **{f"knowmem/{name}": rows for name, rows in questions.items()},
        **{f"privleak/{name}": rows for name, rows in texts.items()},
        "verbmem/forget": passages,
    }


def whp_rows() -> dict[str, Rows]:
    """Return prompts in the layout of `sisa eval whp`."""
    odd: dict[str, Any] = {
        "prompt": "The school was",
        "idiosyncratic": ["Hog warts"],
        "generic": ["big", "far"],
    }
    return {
        "completions": [
            {"prompt": f"Prompt {n} of", "references": ["Hog warts", "Ron"]} for n in range(3)
        ],
        "probabilities": [{**odd, "prompt": f"{odd['prompt']} {n}"} for n in range(3)],
        "utility": [{"question": "1 + 1?", "answer": "2"}],
    }


def wmdp_rows() -> dict[str, Rows]:
    """Return sets in WMDP's layout, of harmless questions."""
    rows = [
        {
            "question": f"What comes after {n}?",
            "choices": ["not it", f"number {n + 1}", "x", "y"],
            "answer": 1,
        }
        for n in range(3)
    ]
    return {"wmdp-bio": rows, "mmlu": rows[:1]}


def stereotype_rows() -> dict[str, Rows]:
    """Return pairs in the layout of CrowS-Pairs, about nobody."""
    return {
        "crows_pairs": [
            {
                "sent_more": f"Greens are late {n}.",
                "sent_less": f"Blues are late {n}.",
                "bias_type": kind,
            }
            for n, kind in enumerate(["gender", 2, "age", "age"])
        ]
    }
