"""A benchmark's measures of a log: means of scores over its sets, beside the reference's, and AUCs.

A benchmark says which scores it has, and which of them make the headline. Its reference must have been
asked the same questions. Membership attacks compare scores in the log of members with those of unseen
texts; `approx/metrics/membership.py` has their formulas, sources and limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from approx.benchmarks.headline import Finding, Headline, Wrong, finding, headline, membership_finding
from approx.evaluation.question_log import LogRow
from approx.evaluation.questions import Question
from approx.metrics.auc import Auc, auc
from approx.metrics.choice import chosen
from approx.metrics.estimate import Estimate, change, estimate
from approx.metrics.membership import calibrated_scores
from approx.metrics.privleak import PrivLeak, privleak_or_none
from sisa.core.errors import InvalidInput

ATTACK_SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus")


@dataclass(frozen=True)
class Score:
    """A measure by name: the mean of `of` over the questions of `sets`. A set "a/b" is one of "a"."""

    name: str
    sets: tuple[str, ...]
    of: Callable[[LogRow], float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its questions are read, and what is measured of a log of their answers.

    `read(place, limit)` returns the questions of a directory or hub name, at most `limit` of each set,
    and raises as `read_questions`. `extraction` are the sets of what is to be forgotten; `comes_back`
    and `utility` name scores; `members` and `unseen` are the sets of membership attacks. `weakness` is
    what a reader of its numbers must know.
    """

    name: str
    read: Callable[[str, int | None], list[Question]]
    scores: tuple[Score, ...]
    extraction: tuple[str, ...] = ()
    comes_back: tuple[str, ...] = ()
    utility: tuple[str, ...] = ()
    members: str = ""
    unseen: str = ""
    weakness: str = ""


@dataclass(frozen=True)
class Measure:
    """An estimate, the reference's value, and the change beside it (None without a reference)."""

    value: float
    low: float
    high: float
    num: int
    reference: float | None
    change: Estimate | None


@dataclass(frozen=True)
class Measured:
    """Everything that a log and its references give; measures without a question are left out.

    `membership` is None without members and unseen texts, and `privleak` without a reference as well.
    """

    num_questions: dict[str, int]
    measures: dict[str, Measure]
    membership: dict[str, Auc] | None
    privleak: PrivLeak | None
    headline: Headline


def measured(
    benchmark: Benchmark,
    rows: Sequence[LogRow],
    references: Sequence[Sequence[LogRow]] = (),
    attacked: Mapping[str, Finding | None] | None = None,
) -> Measured:
    """Return the measures of a finished log; the first reference judges, and all calibrate attacks.

    `attacked` are the findings of attacks. Raise InvalidInput for references of other questions.
    """
    judges = [same_questions(rows, each) for each in references]
    judge = judges[0] if judges else None
    members = [row for row in rows if in_sets(row.set, (benchmark.members,))]
    unseen = [row for row in rows if in_sets(row.set, (benchmark.unseen,))]
    attacks = attacks_on(members, unseen, references=judges)
    extraction = [row for row in rows if in_sets(row.set, benchmark.extraction)]
    strength = Score("extraction strength", benchmark.extraction, _strength)
    known = {row.place: row for row in judge} if judge else {}
    against = [known[row.place] for row in members or extraction] if judge else []
    return Measured(
        num_questions=dict(Counter(row.set for row in rows)),
        measures={
            each.name: found
            for each in benchmark.scores
            if (found := _measure(each, rows, judge)) is not None
        },
        membership=attacks,
        privleak=privleak_of(members, unseen, judge) if judge else None,
        headline=headline(
            {
                "extraction_strength": _finding([strength], rows, judge, "above"),
                "membership": membership_finding(
                    attacks, attacks_on(members or extraction, against, paired=True)
                ),
                "comes_back": _finding(_named(benchmark, benchmark.comes_back), rows, judge, "above"),
                "utility": _finding(_named(benchmark, benchmark.utility), rows, judge, "below"),
                **(attacked or {}),
            }
        ),
    )


def since_first(benchmark: Benchmark, logs: Sequence[Sequence[LogRow]]) -> dict[str, list[Estimate]]:
    """Return the change of each measure since the first of several models, in their order.

    Raise InvalidInput for logs of other questions.
    """
    held = [same_questions(logs[0], each) for each in logs]
    return {
        score.name: [change([[_scores(score, each)]], [[first]]) for each in held]
        for score in benchmark.scores
        if (first := _scores(score, held[0]))
    }


def same_questions(rows: Sequence[LogRow], reference: Sequence[LogRow]) -> list[LogRow]:
    """Return the reference's rows of a model's questions. Raise InvalidInput if one is another."""
    held = {row.place: row for row in reference}
    found = [held[row.place] for row in rows if row.place in held]
    same = sum(row.ground_truth == held[row.place].ground_truth for row in rows if row.place in held)
    if not same == len(found) == len(rows):
        raise InvalidInput(
            "the reference was asked other questions than the model",
            expected=f"the same {len(rows)} questions",
            got=f"{same} of them",
            next_step="evaluate both with the same data and number of questions",
        )
    return found


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
    losses = [[-each for each in _column(asked, log, "loss")] for log in (asked, *references)]
    own, *others = [each for each in losses if each]
    num = len(sides[0])
    return {name: [each[:num], each[num:]] for name, each in calibrated_scores(own, others).items()}


def privleak_of(
    forget: Sequence[LogRow], holdout: Sequence[LogRow], retrained: Sequence[LogRow]
) -> PrivLeak | None:
    """Return PrivLeak, or None with fewer than two texts on a side, without scores, or undefined."""
    own, other = (
        (_column(forget, log, "min_40"), _column(holdout, log, "min_40"))
        for log in ([*forget, *holdout], retrained)
    )
    return privleak_or_none(own, other)


def _column(asked: Sequence[LogRow], log: Sequence[LogRow], name: str) -> list[float]:
    """Return a log's scores of the asked questions, or none if one has no score in it."""
    held = {row.place: getattr(row, name) for row in log}
    found = [each for row in asked if (each := held.get(row.place)) is not None]
    return found if len(found) == len(asked) else []


def _measure(score: Score, rows: Sequence[LogRow], judge: Sequence[LogRow] | None) -> Measure | None:
    values = _scores(score, rows)
    if not values:
        return None
    found = estimate([[values]])
    if judge is None:
        return Measure(found.value, found.low, found.high, found.num, None, None)
    away = change([[values]], [[_scores(score, judge)]])
    return Measure(found.value, found.low, found.high, found.num, found.value - away.value, away)


def _finding(
    scores: Sequence[Score],
    rows: Sequence[LogRow],
    judge: Sequence[LogRow] | None,
    wrong: Wrong,
) -> Finding | None:
    """Return the finding of the mean of some scores; those without a question do not count."""
    held = [each for each in scores if _scores(each, rows)]
    groups = [[_scores(each, rows)] for each in held]
    others = None if judge is None else [[_scores(each, judge)] for each in held]
    return finding(", ".join(each.name for each in held), groups, others, wrong)


def _scores(score: Score, rows: Sequence[LogRow]) -> list[float]:
    return [score.of(row) for row in rows if in_sets(row.set, score.sets)]


def _named(benchmark: Benchmark, names: Sequence[str]) -> list[Score]:
    return [each for each in benchmark.scores if each.name in names]


def in_sets(name: str, sets: Sequence[str]) -> bool:
    """Return whether a set is one of some, or a part of one."""
    return any(each and (name == each or name.startswith(f"{each}/")) for each in sets)


def _strength(row: LogRow) -> float:
    return row.extraction_strength or 0.0


def recall(row: LogRow) -> float:
    """Return the ROUGE-L recall of the generated answer, 0 if there is none."""
    return row.rougeL_recall or 0.0


def right_choice(row: LogRow) -> float:
    """Return the credit for the right one of the given answers."""
    return chosen(row.logprob or 0.0, row.others_logprob)
