"""The score of an answer under a model: one value per token. This module does not import torch.

>>> score = AnswerScore((-0.5, -1.5), (True, False), (-2.0, -2.0), (1.0, 1.0))
>>> score.loss, score.without_closing().logprobs
(1.0, (-0.5,))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress

from sisa.core.errors import InvalidInput


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
    num_closing: int = field(default=1, kw_only=True)

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
        columns = {name: value for name, value in vars(self).items() if name != "num_closing"}
        left = {name: tuple(compress(each, kept)) for name, each in columns.items()}
        return AnswerScore(**left, num_closing=0)


def check_finite(values: Iterable[float], where: str) -> None:
    """Raise InvalidInput if what is measured of a model is not a finite number."""
    if not all(map(math.isfinite, values)):
        raise InvalidInput(
            "a model's scores are not finite numbers",
            where=where,
            next_step="check its weights; in half precision, try --dtype float32",
        )
