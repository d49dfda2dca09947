"""Memorisation of an answer: extraction strength, exact memorisation and ROUGE-L recall.

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

ROUGE-L recall is how much of the true answer occurs, in order, in the generated one. Formula: |longest
common subsequence of words| / |words of the true answer|, words lower-cased and stemmed (Porter), by the
pinned version of the library.

Source: Lin (2004); rouge-score 0.1.2; TOFU (Maini et al. 2024), section 2.2.1; locuslab/tofu
`eval_rouge_recall`.

MUSE takes the F1 = 2 P R / (P + R) instead, with P the share of the generated words, and no stems.

>>> round(rougeL_f1("The author is Ada.", "The author is called Ada"), 4)
0.8889

Limits: words are runs of the letters a-z and digits, so text in other scripts scores 0. Recall does not
penalise an answer that never ends. A paraphrase scores low, and a wrong name in the right phrase high.

>>> rougeL_recall("The author is Ada.", "It is said the author is called Ada, always.")
1.0
>>> rougeL_recall("The author is Ada.", "No idea.")
0.0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from typing import Any


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


UNUSED = ("pandas", "scipy", "scipy.stats", "sklearn")  # by the stemmer, whose library imports them all


@cache
def _scorer(stems: bool) -> Any:
    hidden = [name for name in UNUSED if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # None makes an import fail as if there were no module
    try:
        from rouge_score.rouge_scorer import RougeScorer
    finally:
        for name in hidden:
            del modules[name]
    return RougeScorer(["rougeL"], use_stemmer=stems)


def rougeL_recall(truth: str, generated: str) -> float:
    """Return the recall, in [0, 1]; 0 for a truth without words."""
    return float(_scorer(True).score(truth, generated)["rougeL"].recall)


def rougeL_f1(truth: str, generated: str) -> float:
    """Return the F1 without stems, in [0, 1]; 0 for a text without words."""
    return float(_scorer(False).score(truth, generated)["rougeL"].fmeasure)
