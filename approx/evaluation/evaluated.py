"""What an evaluation knows of a model: a Protocol, scores of answers, and the form of prompts.

The models are in `evaluated_models.py`; this module does not import torch. `PromptForm` belongs to the
settings of an evaluation, because the same model scores differently under another form.

>>> form = PromptForm("completion", "Question: {question}\\nAnswer: {answer}")
>>> form.fill("Who?", "Ada.")
('Question: Who?\\nAnswer:', ' Ada.')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal, Protocol

from sisa.core.errors import InvalidInput

PromptKind = Literal["completion", "chat", "text"]
QUESTION, ANSWER = "{question}", "{answer}"
PLAIN = QUESTION + ANSWER


@dataclass(frozen=True)
class AnswerScore:
    """The score of one answer under one model, with one value per token, the end token last.

    `correct` is whether the model's likeliest token was the true one, given the true tokens before it.
    `means` and `variances` are those of log p(v) over the next token v ~ p, and `likeliest` its largest
    values. `num_closing` is the number of tokens at the end that close the answer (end token, white
    space); metrics of the wording leave them out.
    """

    logprobs: tuple[float, ...]
    correct: tuple[bool, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]
    likeliest: tuple[float, ...] = ()
    num_closing: int = 1

    @property
    def loss(self) -> float:
        """Return the mean negative log-probability over all tokens including the end token, in nats."""
        return -sum(self.logprobs) / len(self.logprobs)

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs)

    def without_closing(self) -> AnswerScore:
        """Return the score without the tokens that close the answer, but of at least one token."""
        said = max(1, self.num_tokens - self.num_closing)
        return self.only([at < said for at in range(self.num_tokens)])

    def only(self, kept: Sequence[bool]) -> AnswerScore:
        """Return the score of some of its tokens."""
        parts = (self.logprobs, self.correct, self.means, self.variances, self.likeliest)
        logprobs, correct, means, variances, likeliest = (tuple(compress(part, kept)) for part in parts)
        return AnswerScore(logprobs, correct, means, variances, likeliest, 0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PromptForm:
    """The way a question becomes a prompt, and its answer the continuation.

    `chat` is one turn of the user and one of the assistant by the tokenizer's template. `completion`
    fills `template`; white space before {answer} belongs to the answer, as tokenizers expect. `text` is
    the answer alone, scored from its second token on if the tokenizer has no beginning token.
    """

    kind: PromptKind
    template: str = PLAIN

    def __post_init__(self) -> None:
        before, found, after = self.template.partition(ANSWER)
        if before.count(QUESTION) != 1 or not found or after:
            raise InvalidInput(
                "the template can't be used",
                expected="{question} once, and {answer} at the end",
                got=self.template,
            )

    def fill(self, question: str, answer: str) -> tuple[str, str]:
        """Return the prompt and the answer as texts; together they are the filled template."""
        if self.kind == "chat":
            return question, answer
        if self.kind == "text":
            return "", answer
        before = self.template.removesuffix(ANSWER)
        stem = before.rstrip()
        return stem.replace(QUESTION, question), before[len(stem) :] + answer


class EvaluatedModel(Protocol):
    """A model that scores and gives answers.

    `digest` names the weights and how they are used, and `kind` the form of prompts that suits them.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def kind(self) -> PromptKind: ...

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        """Return the scores of (question, answer) pairs, in order. Raise InvalidInput for unfit ones."""
        ...

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """Return greedy answers, in order, without surrounding white space."""
        ...
