"""The examples of a method: what to forget, what to keep and what to say instead.

Problems of sets are reported all at once, by position and never with text. Two examples are the same
when their token ids are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens

if TYPE_CHECKING:
    from approx.methods.method import Method


@dataclass(frozen=True)
class Sets:
    """Tokenized examples.

    `preferred[i]` answers the prompt of `forget[i]`, or has the same tokens with other labels.
    `subjects[i]` is the position of its subject's last token, for methods that edit `at_subjects`.
    """

    forget: Sequence[Tokens]
    retain: Sequence[Tokens] = ()
    preferred: Sequence[Tokens] = ()
    subjects: Sequence[int] = ()


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
    expected = f"expected one for each of {len(sets.forget)}"
    if "preferred" in method.reads and len(sets.preferred) != len(sets.forget):
        yield Problem("preferred", f"{len(sets.preferred)} answers, {expected}")
    if method.at_subjects and len(sets.subjects) != len(sets.forget):
        yield Problem("subjects", f"{len(sets.subjects)} positions, {expected}")
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


def first_prompt(tokens: Tokens) -> list[int]:
    """Return all token ids before the first answer."""
    start = next((at for at, label in enumerate(tokens.labels) if label != NO_LOSS), 0)
    return list(tokens.input_ids[:start])


def token_starts(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """Return the text of some tokens, and where in it each of them begins."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(ids[:at], **options) for at in range(len(ids) + 1)]
    return texts[-1], [len(each) for each in texts[:-1]]
