"""TOFU's measures of a log: aggregates (model utility, forget quality and others), and the headline.

A value that cannot be computed (no reference, no holdout) is None, never 0. The forget set is the one
whose name begins with "forget"; the model and its reference must have been asked the same questions.

Forget quality compares truth ratios on the forget questions as they are asked. A model that redirects
these questions to another author has the ratios of one that never saw them, and p = 1. The headline
stands beside it: the same questions in other words (TOFU's `paraphrased_question`), relearning and the
hidden states show what is still there.

Source: TOFU (Maini et al. 2024); locuslab/tofu `aggregate_eval_stat.py`, whose published numbers the
golden test reproduces from their logs.

>>> rows = [LogRow("forget01", n, 1.0, 3, "a", 1.0 + n, (1.5,), 0.5, "b") for n in range(4)]
>>> quality(rows, rows).p_value
1.0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

from approx.benchmarks.headline import Finding, Headline, finding, headline, membership_finding
from approx.benchmarks.measures import attacks_on, privleak_of
from approx.benchmarks.tofu import REWORDED
from approx.evaluation.question_log import LogRow
from approx.evaluation.questions import HOLDOUT
from approx.metrics.auc import Auc
from approx.metrics.forget_quality import ForgetQuality, forget_quality
from approx.metrics.memorisation import floor
from approx.metrics.model_utility import UTILITY_SETS, aggregate, harmonic_mean, model_utility
from approx.metrics.privleak import PrivLeak
from approx.metrics.probability import probability, probability_among
from approx.metrics.truth_ratio import VARIANTS, Variant, towards_one, towards_truth
from sisa.core.errors import InvalidInput


@dataclass(frozen=True)
class ForgetSet:
    """Means over the forget set. `extraction_floor` is mean(1/L), the score of no knowledge at all."""

    probability: float
    rouge: float
    truth_ratio: float
    extraction_strength: float | None
    extraction_floor: float | None
    exact_memorisation: float | None


@dataclass(frozen=True)
class Aggregates:
    """Everything that a log and its references give.

    `attacks` are AUCs of forget against holdout questions, None without a holdout: of ATTACK_SCORES,
    with a reference also `reference`, and with two also `lira`. `privleak` needs both and compares with
    the first reference. `attacks_against_reference` are AUCs of the forget questions' scores under the
    model against those under the reference: at 0.5 no attack distinguishes the two models.
    """

    num_questions: dict[str, int]
    truth_ratio: Variant
    nine: dict[str, float]
    model_utility: float
    forget: ForgetSet
    forget_quality: ForgetQuality | None
    aggregate: float | None
    attacks: dict[str, Auc] | None
    attacks_against_reference: dict[str, Auc] | None
    privleak: PrivLeak | None = None


def aggregates(
    rows: Sequence[LogRow],
    references: Sequence[Sequence[LogRow]] = (),
    variant: Variant = "geometric",
) -> Aggregates:
    """Return the aggregates of a finished log.

    Raise InvalidInput for a missing set, and for references of other questions.
    """
    nine: dict[str, float] = {}
    for name in UTILITY_SETS:
        scores = utility_scores(name, _of_set(rows, name), variant)
        nine |= {measure: fmean(each) for measure, each in scores.items()}
    useful = model_utility(nine)
    judged = quality(rows, *references, variant=variant) if references else None
    forget, holdout = forget_rows(rows), [row for row in rows if row.set == HOLDOUT]
    return Aggregates(
        num_questions=dict(Counter(row.set for row in rows)),
        truth_ratio=variant,
        nine=nine,
        model_utility=useful,
        forget=_forget_means(forget, variant),
        forget_quality=judged,
        aggregate=aggregate(judged.p_value, useful) if judged else None,
        attacks=attacks_on(forget, holdout, references=references),
        attacks_against_reference=attacks_on(
            forget, forget_rows(references[0]) if references else [], paired=True
        ),
        privleak=privleak_of(forget, holdout, references[0]) if references else None,
    )


def quality(
    rows: Sequence[LogRow], *references: Sequence[LogRow], variant: Variant = "geometric"
) -> ForgetQuality:
    """Return the forget quality of a log against a reference; a second one gives the noise floor."""
    own = forget_rows(rows)
    asked = {row.idx: row.ground_truth for row in own}  # published logs don't name their forget set
    others = list(map(forget_rows, references))
    for other in others:
        if {row.idx: row.ground_truth for row in other} != asked:
            raise InvalidInput(
                "the reference was asked other forget questions than the model",
                expected=f"the same {len(asked)} questions",
                got=f"{len(other)} questions",
                next_step="evaluate both with the same data, split and number of questions",
            )
    return forget_quality(*(_ratios(each, variant) for each in (own, *others)))


def forget_rows(rows: Sequence[LogRow]) -> list[LogRow]:
    """Return the rows of the forget set, in order. Raise InvalidInput if there are none."""
    found = [row for row in rows if row.set.startswith("forget")]
    if not found:
        raise _missing("forget01, forget05 or forget10")
    return sorted(found, key=lambda row: row.place)


def _of_set(rows: Sequence[LogRow], name: str) -> list[LogRow]:
    found = [row for row in rows if row.set == name]
    if not found:
        raise _missing(name)
    return found


def _missing(name: str) -> InvalidInput:
    return InvalidInput(
        "the log lacks a set",
        expected=f"questions of {name}",
        got="none",
        next_step="finish the evaluation: run the same command again",
    )


def _ratios(rows: Sequence[LogRow], variant: Variant) -> list[float]:
    found = []
    for row in rows:
        if row.avg_paraphrased_loss is None:
            raise _missing(f"{row.set} with a paraphrased answer")
        found.append(VARIANTS[variant](row.avg_paraphrased_loss, row.average_perturb_loss))
    return found


def utility_scores(name: str, rows: Sequence[LogRow], variant: Variant) -> dict[str, list[float]]:
    """Return each question's scores of a utility set, by the names of the nine that are their means."""
    if name == "retain":
        likely = [_probability(row) for row in rows]
    else:
        likely = [probability_among(row.avg_gt_loss, row.average_perturb_loss) for row in rows]
    return {
        f"probability {name}": likely,
        f"rouge {name}": [row.rougeL_recall or 0.0 for row in rows],
        f"truth_ratio {name}": [towards_truth(each) for each in _ratios(rows, variant)],
    }


def forget_scores(rows: Sequence[LogRow]) -> dict[str, list[float]]:
    """Return each question's scores of the forget set, by measure, without those that a log lacks."""
    measures: dict[str, list[float | None]] = {
        "probability": [_probability(row) for row in rows],
        "rouge": [row.rougeL_recall or 0.0 for row in rows],
        "extraction_strength": [row.extraction_strength for row in rows],
        "exact_memorisation": [row.exact_memorisation for row in rows],
    }
    known = {name: [each for each in of if each is not None] for name, of in measures.items()}
    return {name: of for name, of in known.items() if len(of) == len(rows)}


def _forget_means(rows: Sequence[LogRow], variant: Variant) -> ForgetSet:
    lengths = [row.num_token_said or max(1, row.num_token_gt - 1) for row in rows]
    means = {name: fmean(of) for name, of in forget_scores(rows).items()}
    return ForgetSet(
        probability=means["probability"],
        rouge=means["rouge"],
        truth_ratio=fmean(towards_one(each) for each in _ratios(rows, variant)),
        extraction_strength=means.get("extraction_strength"),
        extraction_floor=fmean(map(floor, lengths)) if "extraction_strength" in means else None,
        exact_memorisation=means.get("exact_memorisation"),
    )


def _probability(row: LogRow) -> float:
    return probability(row.avg_gt_loss)


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
            "extraction_strength": _finding(
                "extraction strength", forget, theirs, attrgetter("extraction_strength")
            ),
            "membership": membership_finding(found.attacks, found.attacks_against_reference),
            "comes_back": _finding("probability in other words", reworded, other, _probability),
            "utility": finding(
                "model utility",
                [list(each.values()) for each in own],
                [list(each.values()) for each in judged] if alike else None,
                "below",
                harmonic_mean,
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
