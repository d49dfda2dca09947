"""Refusals as preferred answers, for IdkDPO.

Rules: a refusal takes the prompt of its forget example, all tokens before the first answer token, and
which refusal it is depends on the seed and the example's position alone. The caller tokenizes the
refusals and closes them as answers of the model are closed.

Not covered: later turns of a chat: a refusal ends the example.

>>> refusing([Tokens([5, 6, 7], [-100, 6, 7])], [[8, 9]], seed=0)
[Tokens(input_ids=[5, 8, 9], labels=[-100, 8, 9])]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens

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


def refusing(forget: Sequence[Tokens], refusals: Sequence[Sequence[int]], seed: int) -> list[Tokens]:
    """One refusal for each forget example. Raises InvalidInput for examples without a prompt."""
    starts = [next((n for n, x in enumerate(each.labels) if x != NO_LOSS), 0) for each in forget]
    problems = [
        Problem(f"forget example {number}", "has no prompt that could be refused")
        for number, start in enumerate(starts, 1)
        if start == 0
    ]
    if not refusals or not all(refusals):
        problems.append(Problem("refusals", "none, or an empty one"))
    if problems:
        raise InvalidInput(
            "no refusals can be made",
            expected="examples with a prompt and an answer, and refusals of at least one token",
            next_step="mend the forget set, or use a method without preferred answers",
            problems=problems,
        )
    made = []
    for number, (each, start) in enumerate(zip(forget, starts, strict=True)):
        chosen = list(refusals[_draw(seed, number) % len(refusals)])
        made.append(Tokens(each.input_ids[:start] + chosen, [NO_LOSS] * start + chosen))
    return made


def _draw(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|refusal|{number}".encode()).digest()[:8], "big")
