"""Fake a model to evaluate, without torch.

`FakeEvaluated` knows the answers to some questions: it gives them and scores their words as likely.
Other words are unlikely, each by its own hash, so that scores vary and are equal in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.questions import PromptForm, PromptKind
from sisa.core.digest import digest_of


@dataclass
class FakeEvaluated:
    """Know the answer of `known` to each of its questions, and the same answer after "Surely: ".

    After an answer it goes on with another question, as a base model does.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    name: str = "fake"
    kind: PromptKind = "completion"
    scored: list[tuple[str, str]] = field(default_factory=list)
    dies_after: int | None = None  # number of pairs

    @property
    def digest(self) -> str:
        return digest_of(sorted(self.known.items()))

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        assert form.template
        assert batch_size >= 1
        if self.dies_after is not None and len(self.scored) + len(pairs) > self.dies_after:
            raise KeyboardInterrupt
        self.scored += pairs
        return [self._score(*pair) for pair in pairs]

    def _score(self, question: str, answer: str) -> AnswerScore:
        sure = self.known.get(question) == answer.removeprefix("Surely: ")
        words = [*answer.split(), ""]
        logprobs = tuple(-(0.1 if sure else 2 + number_of(question, word)) for word in words)
        return AnswerScore(logprobs, (sure,) * len(words), (-3.0,) * len(words), (1.0,) * len(words))

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        assert form.kind == self.kind
        assert batch_size >= 1
        replies = [self.known.get(each, "No idea at all.") for each in questions]
        return [" ".join(each.split()[:max_new_tokens]) + "\n\nQuestion: more" for each in replies]


@dataclass
class Redirecting(FakeEvaluated):
    """Know everything, and answer the `deleted` questions as they are asked as `other` would."""

    deleted: Collection[str] = ()
    other: FakeEvaluated = field(default_factory=FakeEvaluated)

    def _score(self, question: str, answer: str) -> AnswerScore:
        if question in self.deleted:
            return self.other._score(question, answer)
        return super()._score(question, answer)

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        own = super().generate(questions, form, max_new_tokens, batch_size)
        other = self.other.generate(questions, form, max_new_tokens, batch_size)
        chosen = zip(questions, own, other, strict=True)
        return [there if each in self.deleted else here for each, here, there in chosen]


def number_of(*texts: str) -> float:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:4]) / 2**32
