"""What is evaluated, as the evaluation sees it: something that scores answers and gives answers.

`EvaluatedModel` is a Protocol; a Hugging Face model and a deletion-ready one implement it
(`evaluated_models.py`), and a fake in the tests. A score is per answer token, the answer's end token
last. `PromptForm` says how a question is put; it belongs to the settings of an evaluation, for the same
model scores otherwise under another form. Torch is not imported here.

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

PromptKind = Literal["completion", "chat"]
QUESTION, ANSWER = "{question}", "{answer}"
PLAIN = QUESTION + ANSWER


@dataclass(frozen=True)
class AnswerScore:
    """One answer under one model, per token, [L] each.

    `correct`: whether the model's likeliest token was the true one, given the true tokens before it.
    `means` and `variances`: of log p(v) over the next token v ~ p. `num_closing`: tokens at the end that
    close the answer (end token, white space), which metrics of what is said leave out.
    """

    logprobs: tuple[float, ...]
    correct: tuple[bool, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]
    num_closing: int = 1

    @property
    def loss(self) -> float:
        """Mean negative log-probability over all tokens, the end token among them, in nats."""
        return -sum(self.logprobs) / len(self.logprobs)

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs)

    def without_closing(self) -> AnswerScore:
        """Return the same without the tokens that close the answer, down to one token."""
        said = max(1, self.num_tokens - self.num_closing)
        return self.only([at < said for at in range(self.num_tokens)])

    def only(self, kept: Sequence[bool]) -> AnswerScore:
        """The same with some of its tokens alone."""
        parts = (self.logprobs, self.correct, self.means, self.variances)
        logprobs, correct, means, variances = (tuple(compress(part, kept)) for part in parts)
        return AnswerScore(logprobs, correct, means, variances, 0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PromptForm:
    """How a question becomes a prompt, and how its answer follows.

    `chat`: one user turn and the assistant's, by the tokenizer's template; `template` is not used.
    `completion`: by `template`, which holds {question} and ends with {answer}; white space before
    {answer} goes to the answer, as tokenizers want it.
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
        """Prompt and answer as texts; joined, they are the filled template."""
        if self.kind == "chat":
            return question, answer
        before = self.template.removesuffix(ANSWER)
        stem = before.rstrip()
        return stem.replace(QUESTION, question), before[len(stem) :] + answer


class EvaluatedModel(Protocol):
    """A model that answers. `name` is for people, `digest` names its weights and how they are used.

    `kind`: how questions are best put to it: in the form of a deletion-ready model's shards, else by its
    chat template if it has one.
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
        """Scores of (question, answer), in order. `batch_size` changes time and memory alone.

        Raises InvalidInput for a pair that the tokenizer can't express.
        """
        ...

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """Greedy answers, in order, without white space around them."""
        ...
