"""The examples of a method: what to forget, what to keep and what to say instead.

Problems of sets are reported all at once, by position and never with text. Two examples are the same
when their token ids are.

>>> make_refusals([Tokens([5, 6, 7], [-100, 6, 7])], [[8, 9]], seed=0)
[Tokens(input_ids=[5, 8, 9], labels=[-100, 8, 9])]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from approx.evaluation.answers import answered
from sisa.core.domain import Kind, Part, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens, tokenize

if TYPE_CHECKING:
    from approx.methods.method import Method


@dataclass(frozen=True)
class Sets:
    """Tokenized examples.

    `preferred[i]` answers the prompt of `forget[i]`, or has the same tokens with other labels.
    `subjects[i]` is the position of its subject's last token, for methods that edit there.
    """

    forget: Sequence[Tokens]
    retain: Sequence[Tokens] = ()
    preferred: Sequence[Tokens] = ()
    subjects: Sequence[int] = ()

    @property
    def subject_positions(self) -> Sequence[int]:
        """Return the subjects, or the last positions of the prompts."""
        return self.subjects or [max(0, len(first_prompt(each)) - 1) for each in self.forget]


def check_sets(sets: Sets, method: Method) -> None:
    """Raise InvalidInput with every reason why the sets cannot be used with the method."""
    problems = list(_set_problems(sets, method))
    if problems:
        raise InvalidInput(
            "these sets can't be used with this method",
            where=method.name,
            expected="disjoint sets of examples that have answers: " + ", ".join(sorted(method.reads)),
            next_step="correct the sets",
            problems=problems,
        )


def _set_problems(sets: Sets, method: Method) -> Iterator[Problem]:
    if not sets.forget:
        yield Problem("forget", "no examples")
    if "retain" in method.reads and not sets.retain:
        yield Problem("retain", "no examples, and the method's loss has a retain term")
    if "preferred" in method.reads and len(sets.preferred) != len(sets.forget):
        expected = f"expected one for each of {len(sets.forget)}"
        yield Problem("preferred", f"{len(sets.preferred)} answers, {expected}")
    roles = {"forget": sets.forget, "retain": sets.retain, "preferred": sets.preferred}
    for role, examples in roles.items():
        for number, each in enumerate(examples, 1):
            count, least = each.num_labels, method.min_answer_tokens if role == "forget" else 1
            if count < least:
                yield Problem(f"{role} example {number}", too_short(count, least))
    kept = {tuple(each.input_ids): number for number, each in enumerate(sets.retain, 1)}
    for number, each in enumerate(sets.forget, 1):
        if (other := kept.get(tuple(each.input_ids))) is not None:
            yield Problem(f"forget example {number}", f"is retain example {other}")
    for number, (one, unwanted) in enumerate(zip(sets.preferred, sets.forget, strict=False), 1):
        if one == unwanted:
            yield Problem(f"preferred example {number}", "is the answer to forget")


def too_short(count: int, least: int) -> str:
    """Return the problem of an example with too few answer tokens."""
    return f"has {count} answer tokens, expected {least} or more" if count else "has no answer token"


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


def first_prompt(tokens: Tokens) -> list[int]:
    """Return all token ids before the first answer."""
    start = next((at for at, label in enumerate(tokens.labels) if label != NO_LOSS), 0)
    return list(tokens.input_ids[:start])


def _draw(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|refusal|{number}".encode()).digest()[:8], "big")


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


def begins_with_space(record: Record) -> bool:
    """Return whether the last part of a record, its answer, begins with white space."""
    return record.parts[-1].text[:1].isspace()


def closed(answer: str, kind: Kind, tokenizer: Any) -> list[int]:
    """Return the token ids of an answer with the tokens that close it."""
    roles = ("user", "assistant") if kind == "chat" else ("prompt", "completion")
    record = Record("", None, kind, (Part(roles[0], "?"), Part(roles[1], answer)))
    labels = tokenize(record, tokenizer, train_on_inputs=False).labels
    return [each for each in labels if each != NO_LOSS]
