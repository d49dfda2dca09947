"""How the words of a generated answer match those of the true one: ROUGE-L, exact match and F1.

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

Exact match and word F1 compare a short answer with several accepted ones. Formula: words are
lower-cased, without punctuation and articles. Exact match is 1 if the words are those of an accepted
answer. F1 is 2 P R / (P + R) of the words in common, each as often as it occurs, with P their share of
the generated and R of the accepted ones; the largest over the accepted answers.

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
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

UNUSED = ("pandas", "scipy", "scipy.stats", "sklearn")  # by the stemmer, whose library imports them all
_DROPPED = str.maketrans("", "", string.punctuation)


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
