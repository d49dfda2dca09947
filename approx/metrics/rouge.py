"""ROUGE-L recall: how much of the true answer occurs, in order, in the generated one.

Formula: |longest common subsequence of words| / |words of the true answer|, words lower-cased and
stemmed (Porter), by the pinned version of the library.

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
from functools import cache
from typing import Any

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
