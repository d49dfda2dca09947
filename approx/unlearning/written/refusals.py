"""Refusals: a few ways to say "I don't know", one of them for each example to forget.

They are phrases, not what the base writes. The seed and a record's place among those of its form choose.
"""

from __future__ import annotations

import hashlib
from collections import Counter
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


def refuse_all(
    records: Sequence[Record], tokens: Sequence[Tokens], tokenizer: Any, seed: int, sequence_len: int
) -> list[Tokens]:
    """Return a refusal for each forget record, as its preferred answer, cut to `sequence_len` tokens.

    It takes the place of the first answer and all that follows, is closed as that answer is, and begins
    with a space where the record's answer does. Raise InvalidInput for records without a prompt.
    """
    problems = [
        Problem(f"forget record {number}", "has no prompt that could be refused")
        for number, each in enumerate(tokens, 1)
        if not first_prompt(each)
    ]
    if problems:
        raise InvalidInput(
            "no refusals can be made",
            expected="records with a prompt and an answer",
            next_step="correct the forget set, or use a method without preferred answers",
            problems=problems,
        )
    refusals: dict[tuple[Kind, bool], list[list[int]]] = {}
    num_drawn: Counter[tuple[Kind, bool]] = Counter()
    found = []
    for record, each in zip(records, tokens, strict=True):
        form = record.kind, begins_with_space(record)
        if form not in refusals:
            spaced = " " * form[1]
            refusals[form] = [closed(spaced + one, record.kind, tokenizer) for one in REFUSALS]
        chosen = refusals[form][_draw(seed, num_drawn[form]) % len(REFUSALS)]
        num_drawn[form] += 1
        prompt = first_prompt(each)
        found.append(answered(prompt, chosen[: max(0, sequence_len - len(prompt))]))
    return found


def _draw(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|refusal|{number}".encode()).digest()[:8], "big")
