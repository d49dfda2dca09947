"""Membership attacks from the rows of a log: scores of members against those of unseen texts.

`approx/metrics/membership.py` has formulas, sources and limits of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from approx.evaluation.question_log import LogRow
from approx.metrics.auc import Auc, auc
from approx.metrics.membership import calibrated_scores
from approx.metrics.privleak import PrivLeak, privleak_or_none

ATTACK_SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus")


def attacks_on(
    members: Sequence[LogRow],
    others: Sequence[LogRow],
    *,
    paired: bool = False,
    references: Sequence[Sequence[LogRow]] = (),
) -> dict[str, Auc] | None:
    """Return the AUC of each attack, or None with fewer than two texts on a side or without scores."""
    sides = (members, others)
    scores = {name: [[getattr(row, name) for row in side] for side in sides] for name in ATTACK_SCORES}
    if any(len(side) < 2 or None in side for both in scores.values() for side in both):
        return None
    scores |= _calibrated(sides, references)
    return {name: auc(*both, paired=paired) for name, both in scores.items()}


def _calibrated(
    sides: Sequence[Sequence[LogRow]], references: Sequence[Sequence[LogRow]]
) -> dict[str, list[list[float]]]:
    """Return the scores of attacks that need references; only those asked the same questions count."""
    asked = [row for side in sides for row in side]
    losses = [[-each for each in _scores(asked, log, "loss")] for log in (asked, *references)]
    own, *others = [each for each in losses if each]
    num = len(sides[0])
    return {name: [each[:num], each[num:]] for name, each in calibrated_scores(own, others).items()}


def privleak_of(
    forget: Sequence[LogRow], holdout: Sequence[LogRow], retrained: Sequence[LogRow]
) -> PrivLeak | None:
    """Return PrivLeak, or None with fewer than two texts on a side, without scores, or undefined."""
    own, other = (
        (_scores(forget, log, "min_40"), _scores(holdout, log, "min_40"))
        for log in ([*forget, *holdout], retrained)
    )
    return privleak_or_none(own, other)


def _scores(asked: Sequence[LogRow], log: Sequence[LogRow], name: str) -> list[float]:
    """Return a log's scores of the asked questions, or none if one has no score in it."""
    held = {row.place: getattr(row, name) for row in log}
    found = [each for row in asked if (each := held.get(row.place)) is not None]
    return found if len(found) == len(asked) else []
