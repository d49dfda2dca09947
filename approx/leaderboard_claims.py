"""What is said of unlearning methods, and what was found on our own runs.

Rules: pure. A claim is split into parts, each of which holds or does not for one method and seed, by a
threshold that stands in it. A claim is *borne out* when all of its parts hold, *not borne out* when none
does, else *mixed*; without runs to judge by it is *not measured*. Nothing is left out and no threshold
depends on a result. For a model with forget probability p and utility u:

    left  = (p - p_retained) / (p_full - p_retained)    of what there was to forget, what is left
    kept  = u / u_full

    forgets: left <= 0.25      keeps: kept >= 0.9      ruins: kept <= 0.5

Not covered: other models, data, budgets or settings than those of the runs; requests one after another
(`tests/bench/sequential.json`).

>>> verdict([Part("a", True), Part("b", False)]), verdict([])
('mixed', 'not measured')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from approx.leaderboard_plan import Cell, Result
from approx.leaderboard_table import Results, sizes

Verdict = Literal["borne out", "not borne out", "mixed", "not measured"]
FORGETS, KEEPS, RUINS = 0.25, 0.9, 0.5
HARDER = 0.05  # of utility lost, or of probability left, from the fewest authors to the most
CHEAP, ROUNDING = 0.05, 1.1  # share of a full fine-tuning, and what the nearest step may exceed it by


@dataclass(frozen=True)
class Part:
    """One thing that a claim implies, and whether it was found."""

    what: str
    held: bool


@dataclass(frozen=True)
class Claim:
    """A claim, the threshold it is judged by, and what was found."""

    claim: str
    judged_by: str
    verdict: Verdict
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Found:
    """One run as the claims see it."""

    left: float
    kept: float
    share: float

    def text(self) -> str:
        return f"left {self.left:.2f}, kept {self.kept:.2f}"


def verdict(parts: Sequence[Part]) -> Verdict:
    """All, none or some."""
    if not parts:
        return "not measured"
    held = sum(part.held for part in parts)
    return "borne out" if held == len(parts) else "mixed" if held else "not borne out"


def claims(results: Results) -> list[Claim]:
    """Every claim with its verdict."""
    return [
        _of_method(
            results,
            "gradient_ascent",
            "Gradient ascent forgets, and ruins utility",
            (_forgets, _ruins),
        ),
        _of_method(results, "graddiff", "GradDiff balances forgetting and utility", (_forgets, _keeps)),
        _of_method(
            results,
            "kl_minimisation",
            "KL minimisation keeps utility and leaves residue",
            (_keeps, _leaves),
        ),
        _larger_is_harder(results),
        Claim(
            "Requests one after another accumulate damage",
            "measured elsewhere: tests/bench/sequential.json",
            "not measured",
            (),
        ),
        _cheap(results),
    ]


def found_of(results: Results, result: Result) -> Found | None:
    """A run beside the models before and without; None where those are missing or do not differ."""
    full = [each for cell, each in results if cell.kind == "full"]
    retained = [each["forget"]["probability"] for cell, each in results if cell.kind == "retained"]
    if not full or not retained:
        return None
    without, before = sum(retained) / len(retained), full[0]["forget"]["probability"]
    if before <= without or not full[0]["model_utility"]:
        return None
    return Found(
        (result["forget"]["probability"] - without) / (before - without),
        result["model_utility"] / full[0]["model_utility"],
        result["compute"]["share_of_full_finetuning"],
    )


Test = Callable[[Found], tuple[str, bool]]


def _forgets(found: Found) -> tuple[str, bool]:
    return f"forgets (left <= {FORGETS})", found.left <= FORGETS


def _leaves(found: Found) -> tuple[str, bool]:
    return f"leaves residue (left > {FORGETS})", found.left > FORGETS


def _keeps(found: Found) -> tuple[str, bool]:
    return f"keeps utility (kept >= {KEEPS})", found.kept >= KEEPS


def _ruins(found: Found) -> tuple[str, bool]:
    return f"ruins utility (kept <= {RUINS})", found.kept <= RUINS


def _runs(results: Results, method: str) -> list[tuple[Cell, Found]]:
    runs = [each for each in results if each[0].kind == "run" and each[0].method == method]
    judged = [(cell, found_of(results, result)) for cell, result in runs]
    return [(cell, found) for cell, found in judged if found is not None]


def _of_method(results: Results, method: str, claim: str, tests: Sequence[Test]) -> Claim:
    parts = []
    for cell, found in _runs(results, method):
        for test in tests:
            said, held = test(found)
            rate = f"rate {cell.learning_rate:g}, seed {cell.seed}"
            parts.append(Part(f"{method}, {rate}: {said}: {found.text()}", held))
    judged_by = "; ".join(test(Found(0, 0, 0))[0] for test in tests) + ", each seed"
    return Claim(claim, judged_by, verdict(parts), tuple(parts))


def _larger_is_harder(results: Results) -> Claim:
    rows = sizes(results)
    parts = []
    for name in dict.fromkeys(row.name for _, row in rows):
        own = [(number, row.values) for number, row in rows if row.name == name]
        (few, fewest), (many, most) = own[0], own[-1]
        lost = (fewest["model_utility"].mean or 0.0) - (most["model_utility"].mean or 0.0)
        more = (most["probability"].mean or 0.0) - (fewest["probability"].mean or 0.0)
        what = f"{name}, {few} to {many} authors: utility lost {lost:.3f}, probability left {more:+.3f}"
        parts.append(Part(what, lost > HARDER or more > HARDER))
    judged_by = f"from the fewest authors to the most, utility falls or probability rises by > {HARDER}"
    return Claim("Larger forget sets are harder", judged_by, verdict(parts), tuple(parts))


def _cheap(results: Results) -> Claim:
    parts = []
    for name in dict.fromkeys(cell.method for cell, _ in results if cell.kind == "run"):
        for cell, found in _runs(results, str(name)):
            held = found.share <= CHEAP * ROUNDING and found.left <= FORGETS and found.kept >= KEEPS
            what = f"{name}, seed {cell.seed}: {found.share:.1%} of the fine-tuning, {found.text()}"
            parts.append(Part(what, held))
    judged_by = (
        f"within {CHEAP:.0%} of the fine-tuning's operations, forgets (left <= {FORGETS}) and keeps "
        f"utility (kept >= {KEEPS}), each method and seed"
    )
    return Claim("Unlearning costs 1 to 5% of training", judged_by, verdict(parts), tuple(parts))


def words(found: Sequence[Claim]) -> str:
    """The claims as Markdown."""
    lines = []
    for each in found:
        lines.append(f"- **{each.claim}: {each.verdict}.** Judged by: {each.judged_by}.")
        lines += [f"  - {'yes' if part.held else 'no'}: {part.what}" for part in each.parts]
    return "\n".join(lines) + "\n"
