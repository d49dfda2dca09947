"""Fluency: the entropy of a generated text's word pairs and triples, low where it repeats itself.

Formula: H_n = -sum_g f(g) log2 f(g) over the n-grams g of words, f their shares; fluency = (2/3 H_2 +
4/3 H_3) / 2. A text of fewer than n words has H_n = 0.

Source: Zhang et al. (2018, arXiv 1809.05972); the weights of Meng et al. (2022, arXiv 2202.05262), as
RWKU (Jin et al. 2024, arXiv 2406.10890) has it.

Limits: it grows with the length of a text, so texts cut after one number of tokens compare. Words are
runs of letters, digits and apostrophes, or single other characters; RWKU's code has NLTK's tokens.
Word salad has the highest value.

>>> round(ngram_entropy("a b a b a b a b"), 4), round(ngram_entropy("one two three four five"), 4)
(0.9951, 1.7233)
"""

from __future__ import annotations

import re
from collections import Counter
from math import fsum, log2

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_WORD = re.compile(r"[\w']+|[^\w\s]")


def ngram_entropy(text: str) -> float:
    """Return the weighted entropy in bits, at least 0."""
    words = _WORD.findall(text)
    return fsum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: list[str], n: int) -> float:
    counts = Counter(zip(*(words[at:] for at in range(n)), strict=False))
    total = sum(counts.values())
    return -fsum(each / total * log2(each / total) for each in counts.values())
