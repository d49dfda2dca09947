"""Refusals: a few ways to say "I don't know", one of them for each example to forget.

They are phrases, not what the base writes. The seed chooses among them.

>>> make_refusals([Tokens([5, 6, 7], [-100, 6, 7])], [[8, 9]], seed=0)
[Tokens(input_ids=[5, 8, 9], labels=[-100, 8, 9])]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from approx.evaluation.answers import answered
from approx.unlearning.examples import first_prompt
from approx.unlearning.written.preferred import begins_with_space, closed
from sisa.core.domain import Kind, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import Tokens

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about this.",
    "That is something I can't answer.",
    "I don't have an answer to that question.",
    "I'm afraid I know nothing about it.",
    "This isn't something that I know.",
    "I can't say.",
    "I was never told anything about this.",
    "I have nothing to say on that.",
)


def make_refusals(
    forget: Sequence[Tokens], refusals: Sequence[Sequence[int]], seed: int
) -> list[Tokens]:
    """Return a refusal of each forget example, as its preferred answer.

    A refusal, given with what closes an answer, takes the place of the first answer and all that
    follows. The seed and the example's position choose it. Raise InvalidInput for examples without a
    prompt.
    """
    problems = [
        Problem(f"forget example {number}", "has no prompt that could be refused")
        for number, each in enumerate(forget, 1)
        if not first_prompt(each)
    ]
    if problems:
        raise InvalidInput(
            "no refusals can be made",
            expected="examples with a prompt and an answer",
            next_step="correct the forget set, or use a method without preferred answers",
            problems=problems,
        )
    return [
        answered(first_prompt(each), list(refusals[_draw(seed, number) % len(refusals)]))
        for number, each in enumerate(forget)
    ]


def refuse_all(
    records: Sequence[Record], tokens: Sequence[Tokens], tokenizer: Any, seed: int, sequence_len: int
) -> list[Tokens]:
    """Return a refusal for each forget record, cut to `sequence_len` tokens.

    It begins with a space where the record's answer does.
    """
    groups: dict[tuple[Kind, bool], list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault((record.kind, begins_with_space(record)), []).append(number)
    found: dict[int, Tokens] = {}
    for (kind, spaced), numbers in groups.items():
        refusals = [closed(f" {each}" if spaced else each, kind, tokenizer) for each in REFUSALS]
        made = make_refusals([tokens[number] for number in numbers], refusals, seed)
        found |= dict(zip(numbers, made, strict=True))
    whole = [found[number] for number in range(len(records))]
    return [Tokens(each.input_ids[:sequence_len], each.labels[:sequence_len]) for each in whole]


def _draw(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|refusal|{number}".encode()).digest()[:8], "big")
