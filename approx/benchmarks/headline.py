"""The headline of a table: a set of findings, because any one of them can be won without forgetting.

    extraction_strength   of the forget answers, given their beginnings
    depth                 unlearning depth score: how deep in the layers the knowledge is gone
    membership            AUC of the forget texts' losses, calibrated by the reference
    comes_back            what other questions than the plain ones bring back
    relearning            probability of the forget answers after some steps on others like them
    utility               what is to be kept

A finding compares a model with its target: what a model that never saw the forget set gives. It is lost
where the interval of the difference lies wholly on the wrong side. A model that answers the forget
questions from another author has TOFU's forget quality, and loses what comes back.

What was not measured is named with what it needs. It is no success.

>>> close = finding("ES", [[[0.1, 0.2]]], [[[0.1, 0.2]]], "above")
>>> close.away.value, close.lost
(0.0, False)
>>> finding("ES", [[[0.9, 1.0]]], [[[0.1, 0.2]]], "above").lost
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from approx.metrics.auc import Auc
from approx.metrics.estimate import Combine, Estimate, Groups, change, estimate

if TYPE_CHECKING:
    from approx.attacks.attack_run import AttackRow

Wrong = Literal["above", "below", "both"]
NEEDS = {
    "extraction_strength": "questions with answers to forget",
    "depth": "--before and --reference, and one set of weights",
    "membership": "--reference",
    "comes_back": "questions in other words",
    "relearning": "--before and --reference, and one set of weights",
    "utility": "questions about what is to be kept",
}
FROM_ATTACKS = ("relearning", "depth")  # the findings that attacks of this name give
ROUNDING = 1e-6  # of models that are equal up to the order of additions


@dataclass(frozen=True)
class Finding:
    """A value beside its target; `away` is value - target with its interval.

    Without a reference there may be no target: then it is neither lost nor won.
    """

    measure: str
    value: float
    target: float | None
    away: Estimate | None
    lost: bool | None


@dataclass(frozen=True)
class Headline:
    """The findings by name, the lost ones, and what the missing ones need."""

    findings: Mapping[str, Finding]
    lost: Sequence[str]
    not_measured: Mapping[str, str]


def headline(found: Mapping[str, Finding | None]) -> Headline:
    """Return the headline of findings by the names in NEEDS; missing or None: not measured."""
    findings = {name: each for name in NEEDS if (each := found.get(name)) is not None}
    return Headline(
        findings,
        lost=[name for name, each in findings.items() if each.lost],
        not_measured={name: needs for name, needs in NEEDS.items() if name not in findings},
    )


def finding(
    measure: str,
    groups: Groups,
    reference: Groups | None,
    wrong: Wrong,
    combine: Combine = np.mean,
) -> Finding | None:
    """Return the finding of scores beside a reference's, or None without a question."""
    if not groups or not all(group and group[0] for group in groups):
        return None
    value = estimate(groups, combine).value
    if reference is None:
        return Finding(measure, value, None, None, None)
    away = change(groups, reference, combine)
    return Finding(measure, value, value - away.value, away, _lost(away, wrong))


def membership_finding(
    attacks: Mapping[str, Auc] | None, paired: Mapping[str, Auc] | None
) -> Finding | None:
    """Return the finding of the calibrated attack, or of losses against the reference's, or None.

    `attacks` are those on forget and unseen texts, and `paired` those on the forget texts under the
    model and under the reference.
    """
    for found, name, measure in (
        (attacks, "lira", "AUC of LiRA"),
        (attacks, "reference", "AUC of losses calibrated by the reference"),
        (paired, "loss", "AUC of losses against the reference's"),
    ):
        if found and name in found:
            auc = found[name]
            away = Estimate(auc.value - 0.5, auc.low - 0.5, auc.high - 0.5, auc.num_members)
            return Finding(measure, auc.value, 0.5, away, _lost(away, "both"))
    return None


def attack_findings(
    rows: Mapping[str, AttackRow],
    reference: Mapping[str, AttackRow] | None,
    known_before: float | None = None,
) -> dict[str, Finding | None]:
    """Return the findings of FROM_ATTACKS in a model's log, beside those in its reference's log.

    `known_before` is the mean probability of the asked answers before unlearning.
    """
    found: dict[str, Finding | None] = {}
    if "relearning" in rows and (curve := rows["relearning"].curve):
        steps = list(curve.values)[-1]
        judged = (reference or {}).get("relearning")
        other = judged.curve if judged else None
        judge = None if other is None else [[list(other.values[steps])]]
        half_after = None if known_before is None else curve.steps_until_half(known_before)
        back = "not back" if half_after is None else f"back after {half_after:.1f} steps"
        measure = f"probability after {steps} steps; half of it is {back}"
        found["relearning"] = finding(measure, [[list(curve.values[steps])]], judge, "above")
    if "depth" in rows and (curve := rows["depth"].curve) and curve.values.get("all"):
        scores = [[list(curve.values["all"])]]
        erased = [[[1.0] * len(scores[0][0])]]
        found["depth"] = finding("unlearning depth score", scores, erased, "below")
    return found


def _lost(away: Estimate, wrong: Wrong) -> bool:
    above, below = away.low > ROUNDING, away.high < -ROUNDING
    return {"above": above, "below": below, "both": above or below}[wrong]
