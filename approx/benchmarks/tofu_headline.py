"""TOFU's headline: the set of findings that stands beside forget quality.

Forget quality compares truth ratios on the forget questions as they are asked. A model that redirects
these questions to another author has the ratios of one that never saw them, and p = 1. The same
questions in other words (TOFU's `paraphrased_question`), relearning and the hidden states show what is
still there.

Utility is the harmonic mean of the nine of `tofu_aggregates.py`; its interval draws the questions of
each utility set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from approx.benchmarks.headline import Finding, Headline, finding, headline, membership_finding
from approx.benchmarks.tofu import REWORDED
from approx.benchmarks.tofu_aggregates import Aggregates, forget_rows, utility_scores
from approx.evaluation.question_log import LogRow
from approx.metrics.estimate import harmonic_mean_of_means
from approx.metrics.model_utility import UTILITY_SETS
from approx.metrics.probability import probability


def tofu_headline(
    rows: Sequence[LogRow],
    references: Sequence[Sequence[LogRow]],
    found: Aggregates,
    attacked: Mapping[str, Finding | None] | None = None,
) -> Headline:
    """Return the headline of a finished log beside the first reference, with the findings of attacks.

    A reference that was asked other questions of a set is left out there.
    """
    judge = references[0] if references else ()
    forget, theirs = forget_rows(rows), forget_rows(judge) if judge else []
    reworded, other = _of(rows, REWORDED), _of(judge, REWORDED)
    own, judged = (
        [utility_scores(name, _of(log, name), found.truth_ratio) for name in UTILITY_SETS]
        for log in (rows, judge)
    )
    alike = all(_same(_of(rows, name), _of(judge, name)) for name in UTILITY_SETS)
    return headline(
        {
            "extraction_strength": _finding("extraction strength", forget, theirs, _strength),
            "membership": membership_finding(found.attacks, found.attacks_against_reference),
            "comes_back": _finding("probability in other words", reworded, other, _probability),
            "utility": finding(
                "model utility",
                [list(each.values()) for each in own],
                [list(each.values()) for each in judged] if alike else None,
                "below",
                harmonic_mean_of_means,
            ),
            **(attacked or {}),
        }
    )


def _finding(
    measure: str,
    rows: Sequence[LogRow],
    judge: Sequence[LogRow],
    of: Callable[[LogRow], float | None],
) -> Finding | None:
    own, other = ([each for row in side if (each := of(row)) is not None] for side in (rows, judge))
    if len(own) < len(rows):
        return None
    alike = _same(rows, judge) and len(other) == len(own)
    return finding(measure, [[own]], [[other]] if alike else None, "above")


def _of(rows: Sequence[LogRow], name: str) -> list[LogRow]:
    return sorted((row for row in rows if row.set == name), key=lambda row: row.idx)


def _same(rows: Sequence[LogRow], others: Sequence[LogRow]) -> bool:
    """Return whether both are about the same questions; published logs do not name their forget set."""
    return [(row.idx, row.ground_truth) for row in rows] == [
        (row.idx, row.ground_truth) for row in others
    ]


def _strength(row: LogRow) -> float | None:
    return row.extraction_strength


def _probability(row: LogRow) -> float:
    return probability(row.avg_gt_loss)
