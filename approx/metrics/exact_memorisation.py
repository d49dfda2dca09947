"""Exact memorisation: the share of an answer's tokens that the model finds likeliest.

Formula: EM = |{k : argmax_v p(v | q, a_<k) = a_k}| / L over the L tokens of an answer.
Source: Tirumala et al. (2022, arXiv 2205.10770), equation 1; open-unlearning `exact_memorization`.

Rules: pure.

Not covered: how much a model that never saw the answer would score: much of a sentence is grammar, so
the floor is the retained reference's score, not 0. Known limit: it counts tokens, and a tokenizer that
cuts names into many counts names more.

>>> exact_memorisation([True, False, True, True])
0.75
"""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorisation(correct: Sequence[bool]) -> float:
    """EM in [0, 1]; `correct` as of `extraction_strength`. Raises ValueError for no tokens."""
    if not correct:
        raise ValueError("an answer without tokens")
    return sum(map(bool, correct)) / len(correct)
