"""The examples that a method sees: what to forget, what to keep, what to say instead.

Rules: everything that is wrong is named at once, before anything is computed: empty sets, examples
without an answer token, an example that stands in both sets, preferred answers that are missing or are
the very answers to forget. Problems name positions, never text or ids. Two records are the same when
their ids are, or their texts after normalisation (as the ledger normalises); two tokenized examples when
their token ids are.

Not covered: near duplicates and paraphrases across the sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from approx.methods.method import Method
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.planning.assign import normalised


@dataclass(frozen=True)
class Sets:
    """Tokenized examples; `preferred[i]` answers the prompt of `forget[i]`."""

    forget: Sequence[Tokens]
    retain: Sequence[Tokens] = ()
    preferred: Sequence[Tokens] = ()


def check_sets(sets: Sets, method: Method) -> None:
    """Raise InvalidInput when these sets can't be used with this method; all problems are listed."""
    problems = [*_missing(sets, method), *_without_answer(sets), *_in_both(sets), *_same_answer(sets)]
    if problems:
        raise InvalidInput(
            "these sets can't be unlearned with",
            where=method.name,
            expected="disjoint sets of examples that have answers: " + ", ".join(sorted(method.reads)),
            next_step="mend the sets",
            problems=problems,
        )


def check_disjoint(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    """Raise InvalidInput with every forget record that is also in the retain set, by id or by text."""
    ids = {each.id: number for number, each in enumerate(retain, 1)}
    texts = {normalised(each.text): number for number, each in enumerate(retain, 1)}
    problems = []
    for number, each in enumerate(forget, 1):
        if each.id in ids:
            problems.append(_overlap(number, ids[each.id], "id"))
        elif normalised(each.text) in texts:
            problems.append(_overlap(number, texts[normalised(each.text)], "text"))
    if problems:
        raise InvalidInput(
            f"{len(problems)} records are to be both forgotten and kept",
            expected="no record in both sets",
            next_step="take them out of the retain set",
            problems=problems,
        )


def _overlap(forget: int, retain: int, what: str) -> Problem:
    return Problem(f"forget record {forget}", f"has the {what} of retain record {retain}")


def _missing(sets: Sets, method: Method) -> Iterator[Problem]:
    if not sets.forget:
        yield Problem("forget", "no examples")
    if "retain" in method.reads and not sets.retain:
        yield Problem("retain", "no examples, and the method's loss has a retain term")
    if "preferred" in method.reads and len(sets.preferred) != len(sets.forget):
        yield Problem(
            "preferred", f"{len(sets.preferred)} answers, expected one for each of {len(sets.forget)}"
        )


def _without_answer(sets: Sets) -> Iterator[Problem]:
    named = (("forget", sets.forget), ("retain", sets.retain), ("preferred", sets.preferred))
    for role, number, each in chain.from_iterable(
        ((role, number, each) for number, each in enumerate(examples, 1)) for role, examples in named
    ):
        if len(each.input_ids) != len(each.labels):
            yield Problem(f"{role} example {number}", "as many labels as token ids are needed")
        elif all(label == NO_LOSS for label in each.labels[1:]):
            yield Problem(f"{role} example {number}", "has no answer token")


def _in_both(sets: Sets) -> Iterator[Problem]:
    kept = {tuple(each.input_ids): number for number, each in enumerate(sets.retain, 1)}
    for number, each in enumerate(sets.forget, 1):
        if (other := kept.get(tuple(each.input_ids))) is not None:
            yield Problem(f"forget example {number}", f"is retain example {other}")


def _same_answer(sets: Sets) -> Iterator[Problem]:
    for number, (one, other) in enumerate(zip(sets.preferred, sets.forget, strict=False), 1):
        if one.input_ids == other.input_ids:
            yield Problem(f"preferred example {number}", "is the answer to forget")
