"""Short generated answers against several accepted ones: exact match and F1 of their words.

Formula: words are lower-cased, without punctuation and articles. Exact match is 1 if the words are
those of an accepted answer. F1 is 2 P R / (P + R) of the words in common, each as often as it occurs,
with P their share of the generated and R of the accepted ones; the largest over the accepted answers.

Source: SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), its evaluation script; TriviaQA (Joshi et al.
2017, arXiv 1705.03551).

Limits: a right answer within a sentence is no exact match, and its F1 is low. Alone, the letter "a" is
taken for an article.

>>> exact_match("The Beatles!", ["beatles", "Fab Four"]), exact_match("a beetle", ["beatles"])
(1.0, 0.0)
>>> round(word_f1("John Lennon of the Beatles", ["the Beatles"]), 4)
0.4
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_DROPPED = str.maketrans("", "", string.punctuation)


def exact_match(generated: str, accepted: Sequence[str]) -> float:
    """Return 1 if an accepted answer has the same words, else 0."""
    return float(any(words_of(generated) == words_of(each) for each in accepted))


def word_f1(generated: str, accepted: Sequence[str]) -> float:
    """Return the best F1 in [0, 1] over accepted answers. Raise ValueError for none."""
    return max(_f1(words_of(generated), words_of(each)) for each in accepted)


def words_of(text: str) -> list[str]:
    """Return the words of a text that count."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DROPPED)).split()


def _f1(some: list[str], others: list[str]) -> float:
    if not some or not others:
        return float(some == others)
    shared = sum((Counter(some) & Counter(others)).values())
    return 2 * shared / (len(some) + len(others))
