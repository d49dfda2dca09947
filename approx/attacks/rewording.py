"""Rewording: the same questions in other words.

Curve: the probability of the asked answers, by wording. A wording is put around the first question of a
record. Plain texts have no other wording.

Source: the paraphrase probes of TOFU (Maini et al. 2024, arXiv 2401.06121) and of Patil et al. (2024,
arXiv 2309.17410).

Limits: the words of the question itself stay. These wordings show that forgetting hangs on a prompt's
form; a paraphrase by another model shows more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

from approx.attacks.attack import Attack, AttackSets, Curve, Strength, probabilities
from sisa.core.domain import Part, Record
from sisa.lm.base.tokens import Tokens

WORDINGS = {
    "request": "Please tell me: {}",
    "announcement": "I have a question. {}",
    "brevity": "{} Answer briefly.",
}


@dataclass(frozen=True)
class Rewording(Attack):
    """The questions in each of the wordings, whose {} is the question."""

    name: ClassVar[str] = "rewording"
    wordings: Mapping[str, str] = field(default_factory=lambda: WORDINGS)

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve:  # noqa: ARG002
        return worded_curve(
            model,
            [
                (name, sets.tokens([other]))
                for record in sets.asked
                for name, wording in self.wordings.items()
                if (other := in_other_words(record, wording)) is not None
            ],
        )


def worded_curve(model: Any, worded: Sequence[tuple[str, Sequence[Tokens]]]) -> Curve:
    """Return the probabilities of examples, by the name of their wording; all are scored at once."""
    names = [name for name, examples in worded for _ in examples]
    found = probabilities(model, list(chain.from_iterable(examples for _, examples in worded)))
    values: dict[Strength, list[float]] = {}
    for name, each in zip(names, found, strict=True):
        values.setdefault(name, []).append(each)
    return Curve("probability", values)


def in_other_words(record: Record, wording: str) -> Record | None:
    """Return a record with its first question in a wording, or None if it has no question."""
    for at, part in enumerate(record.parts):
        if part.role in ("prompt", "user"):
            asked = Part(part.role, _worded(wording, part.text))
            return replace(record, parts=(*record.parts[:at], asked, *record.parts[at + 1 :]))
    return None


def _worded(wording: str, text: str) -> str:
    """Return a wording of a text that keeps the white space at its end.

    >>> _worded("{} Answer briefly.", "Who? ")
    'Who? Answer briefly. '
    """
    stem = text.rstrip()
    return wording.replace("{}", stem) + text[len(stem) :]
