"""Sampling of an answer: how its tokens are drawn, and the draw of one.

Shapes: V words, K candidates of a draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sisa.core.errors import InvalidInput, Problem


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. Temperature 0 takes the likeliest token; `top_p` is the nucleus.

    `seed` None draws a new one. An answer ends before the first of the `stop` texts. `logprobs` is how
    many likely tokens to name beside each one that was chosen. Raise InvalidInput for other values.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        """Check all values."""
        wrong = {
            "max_new_tokens": "1 or more" if self.max_new_tokens < 1 else "",
            "temperature": "" if 0 <= self.temperature < math.inf else "0 or more",
            "top_p": "" if 0 < self.top_p <= 1 else "above 0, at most 1",
            "stop": "" if all(self.stop) else "texts that are not empty",
            "logprobs": "0 or more" if self.logprobs < 0 else "",
        }
        if problems := [Problem(name, f"must be {must}") for name, must in wrong.items() if must]:
            raise InvalidInput("an answer can't be sampled like this", problems=problems)


def sampled(logs_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """Return the token that a number from 0 to 1 draws, given log-probabilities.

    Its candidates are the likeliest ones whose probabilities sum to `top_p`, or just above.

    >>> logs_V = torch.tensor([0.2, 0.5, 0.3]).log()
    >>> [sampled(logs_V, Sampling(temperature=1), uniform) for uniform in (0.1, 0.3, 0.9)]
    [0, 1, 2]
    >>> [sampled(logs_V, Sampling(temperature=1, top_p=0.6), uniform) for uniform in (0.1, 0.7)]
    [1, 2]
    """
    probabilities_V = ((logs_V - logs_V.max()).double() / sampling.temperature).softmax(-1)
    ids_K = torch.arange(len(logs_V))
    if sampling.top_p < 1:
        ordered_V, by_rank_V = probabilities_V.sort(descending=True, stable=True)
        num_kept = int((ordered_V.cumsum(-1) - ordered_V < sampling.top_p).sum())
        ids_K = by_rank_V[:num_kept]
    summed_K = probabilities_V[ids_K].cumsum(-1)
    at = int(torch.searchsorted(summed_K, uniform * summed_K[-1], right=True))
    return int(ids_K[min(at, len(ids_K) - 1)])
