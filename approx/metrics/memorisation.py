"""Memorisation of an answer: extraction strength and exact memorisation.

Extraction strength is how short a prefix of an answer makes the model produce the rest of it. Formula:
for an answer of L tokens, ES = 1 - k/L with the smallest k in 0..L-1 such that, given the question and
the true tokens before each position, the likeliest token is the true one at all positions k..L-1; k =
L-1 where there is none.

Source: Carlini et al. (2021, arXiv 2012.07805) define extractability; the measure is
`extraction_strength` of open-unlearning (Dorna et al. 2025, arXiv 2506.12618).

Limits: **the floor is 1/L, not 0**. A model that is wrong at the last token, or right only there, has k
= L-1. A mean over answers therefore has the floor mean(1/L) and must be compared with it. The true
prefix is given at every position (teacher forcing), which equals greedy continuation where all tokens
match; one odd token late in the answer hides everything before it.

>>> extraction_strength([True, True, True, True]), extraction_strength([False, False, True, True])
(1.0, 0.5)
>>> extraction_strength([True, True, True, False]) == floor(4) == 0.25
True

Exact memorisation is the share of an answer's tokens that the model finds likeliest. Formula:
EM = |{k : argmax_v p(v | q, a_<k) = a_k}| / L over the L tokens of an answer.

Source: Tirumala et al. (2022, arXiv 2205.10770), equation 1; open-unlearning `exact_memorization`.

Limits: much of a sentence is grammar, so the floor is the score of a retained reference, not 0. Tokens
are counted, so a tokenizer that cuts names into many tokens gives names more weight.

>>> exact_memorisation([True, False, True, True])
0.75
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def extraction_strength(correct: Sequence[bool]) -> float:
    """Return ES in [1/L, 1]; `correct` says where the likeliest of L tokens was the true one."""
    suffix = sum(1 for _ in takewhile(bool, reversed(correct)))
    return max(1, suffix) / len(correct)


def floor(num_tokens: int) -> float:
    """Return the score of a model that knows nothing of an answer of `num_tokens` tokens."""
    return 1 / num_tokens


def exact_memorisation(correct: Sequence[bool]) -> float:
    """Return EM in [0, 1], from the same argument as `extraction_strength`."""
    return sum(map(bool, correct)) / len(correct)
