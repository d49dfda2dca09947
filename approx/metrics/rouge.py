"""ROUGE-L recall: how much of the true answer occurs, in order, in the generated one.

Formula: |longest common subsequence of words| / |words of the true answer|, words lower-cased and
stemmed (Porter), by the pinned version of the library. TOFU generates greedily, at most 200 tokens.

Source: Lin (2004); rouge-score 0.1.2; TOFU (Maini et al. 2024), section 2.2.1; locuslab/tofu
`eval_rouge_recall`.

Limits: words are runs of the letters a-z and digits, so text in other scripts has none and scores 0.
Recall does not penalise an answer that never ends. A paraphrase scores low, and a wrong name in the
right phrase high.

>>> rougeL_recall("The author is Ada.", "It is said the author is called Ada, always.")
1.0
>>> rougeL_recall("The author is Ada.", "No idea.")
0.0
"""

from __future__ import annotations

from functools import cache
from typing import Any

MAX_NEW_TOKENS = 200


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rougeL_recall(truth: str, generated: str) -> float:
    """Return the recall, in [0, 1]; 0 for a truth without words."""
    return float(_scorer().score(truth, generated)["rougeL"].recall)
