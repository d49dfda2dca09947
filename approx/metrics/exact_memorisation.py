"""Exact memorisation: the share of an answer's tokens that the model finds likeliest.

Formula: EM = |{k : argmax_v p(v | q, a_<k) = a_k}| / L over the L tokens of an answer.

Source: Tirumala et al. (2022, arXiv 2205.10770), equation 1; open-unlearning `exact_memorization`.

Limits: much of a sentence is grammar, so the floor is the score of a retained reference, not 0. Tokens
are counted, so a tokenizer that cuts names into many tokens gives names more weight.

>>> exact_memorisation([True, False, True, True])
0.75
"""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorisation(correct: Sequence[bool]) -> float:
    """Return EM in [0, 1], from the same argument as `extraction_strength`.

    Raise ValueError for no tokens.
    """
    if not correct:
        raise ValueError("an answer without tokens")
    return sum(map(bool, correct)) / len(correct)
