"""The texts of a patch as token examples, and everything that is wrong with them.

A text that is longer than `sequence_len`, or than the base can read, is refused, or cut as records are
that are trained on with `overlength: truncate`. What is to be forgotten is forgotten: a record that
stands in both sets of a job is left out of the retain set. DPO's preferred answers are refusals
(`refusals.py`), closed as the record's own answer is. Problems name positions, never text or ids.

Not covered: the retain set that the base writes (`generated_retain.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from approx.methods.method import Method
from approx.unlearning.refusals import REFUSALS, refusing
from approx.unlearning.sets import check_disjoint
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Overlength, Tokens, tokenize, tokenize_all
from sisa.planning.assign import normalised


@dataclass(frozen=True)
class Limits:
    """Most tokens of a text, what is done with longer ones, and how many words the base has."""

    sequence_len: int
    overlength: Overlength
    vocabulary: int


def limits_of(config: Any, sequence_len: int, overlength: Overlength) -> Limits:
    """Of a base's configuration."""
    most = getattr(config, "max_position_embeddings", None) or sequence_len
    return Limits(min(sequence_len, most), overlength, config.vocab_size)


def tokenized(records: Sequence[Record], role: str, tokenizer: Any, limits: Limits) -> list[Tokens]:
    """Raises InvalidInput with every record that no patch can be made with."""
    return tokenize_all(
        records,
        tokenizer,
        sequence_len=limits.sequence_len,
        overlength=limits.overlength,
        train_on_inputs=False,
        positions=[f"{role} record {number}" for number in range(1, len(records) + 1)],
    )


def text_problems(
    forget: Sequence[Record],
    retain: Sequence[Record] | None,
    method: Method | None,
    tokenizer: Any,
    limits: Limits,
) -> Iterator[Problem]:
    """All that is wrong with given sets; a retain set of None is the base's own."""
    if len(tokenizer) > limits.vocabulary:
        yield Problem(
            "tokenizer", f"has {len(tokenizer)} words, and the base embeddings for {limits.vocabulary}"
        )
    for role, records in (("forget", forget), ("retain", retain)):
        if records is not None and not records:
            yield Problem(role, "no records")
        elif records:
            yield from _of(partial(tokenized, records, role, tokenizer, limits))
    if retain:
        yield from _of(partial(check_disjoint, forget, retain))
    if method is not None and "preferred" in method.reads:
        yield from (
            Problem(f"forget record {number}", f"is a plain text: {method.name} needs a prompt")
            for number, each in enumerate(forget, 1)
            if each.kind == "text"
        )


def _of(check: Any) -> tuple[Problem, ...]:
    try:
        check()
    except InvalidInput as error:
        return error.as_problems("texts")
    return ()


def distinct(records: Sequence[Record]) -> list[Record]:
    """Each once, in order."""
    return list(dict.fromkeys(records))


def kept(retain: Sequence[Record], forget: Sequence[Record]) -> list[Record]:
    """A retain set without what is to be forgotten, by id or by text.

    >>> one, other = (Record(i, None, "text", (Part("text", i),)) for i in ("a", "b"))
    >>> kept([one, other], [other]) == [one]
    True
    """
    ids, texts = {each.id for each in forget}, {normalised(each.text) for each in forget}
    return [each for each in retain if each.id not in ids and normalised(each.text) not in texts]


def preferred(
    records: Sequence[Record], tokens: Sequence[Tokens], tokenizer: Any, seed: int, sequence_len: int
) -> list[Tokens]:
    """A refusal for each forget example, no longer than texts may be."""
    found: dict[int, Tokens] = {}
    groups: dict[tuple[Any, bool], list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault((record.kind, record.parts[-1].text[:1].isspace()), []).append(number)
    for (kind, spaced), numbers in groups.items():
        refusals = [_closed(" " * spaced + each, kind, tokenizer) for each in REFUSALS]
        made = refusing([tokens[number] for number in numbers], refusals, seed)
        found |= dict(zip(numbers, made, strict=True))
    return [
        Tokens(found[number].input_ids[:sequence_len], found[number].labels[:sequence_len])
        for number in range(len(records))
    ]


def _closed(answer: str, kind: Any, tokenizer: Any) -> list[int]:
    """An answer's ids with what ends it."""
    roles = ("user", "assistant") if kind == "chat" else ("prompt", "completion")
    record = Record("", None, kind, (Part(roles[0], "?"), Part(roles[1], answer)))
    labels = tokenize(record, tokenizer, train_on_inputs=False).labels
    return [each for each in labels if each != NO_LOSS]
