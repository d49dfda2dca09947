"""Multiple choice by log-probability: whether the right answer is the likeliest of those given.

Formula: 1 / t if the right answer's log-probability is the largest, with t answers that share it, else
0. A model that finds all n answers equally likely has 1/n, as a guess has. With two answers it is a
preference: 1, 1/2 or 0.

Source: MMLU (Hendrycks et al. 2021, arXiv 2009.03300) over the letters; TruthfulQA's MC1 (Lin et al.
2022, arXiv 2109.07958) over whole answers; WMDP (Li et al. 2024, arXiv 2403.03218); CrowS-Pairs
(Nangia et al. 2020, arXiv 2010.00133) over two sentences.

Limits: **a choice among given answers is easier to lose, and to keep, than the knowledge.** A model
that has forgotten nothing falls to 1/n if it prefers one letter, and a model without the knowledge may
exclude absurd answers. Whole answers of different length are compared by their sums, which favours
short ones.

>>> chosen(-1.0, [-2.0, -3.0]), chosen(-1.0, [-1.0, -1.0, -1.0]), chosen(-2.0, [-1.0])
(1.0, 0.25, 0.0)
"""

from __future__ import annotations

from collections.abc import Sequence


def chosen(logprob: float, others: Sequence[float]) -> float:
    """Return the credit for the right answer, in [0, 1]. Raise ValueError without other answers."""
    if not len(others):
        raise ValueError("a choice needs other answers")
    if max(others) > logprob:
        return 0.0
    return 1 / (1 + sum(each == logprob for each in others))
