"""The records of a patch: checked together, and made into examples.

Every problem is reported at once, before anything is computed. Problems name positions, never text or
ids. Two records are the same when their ids or their texts, normalised as in the ledger, are equal. Near
duplicates and paraphrases are not found. A text longer than `sequence_len`, or than the base can read,
is refused, or cut with `overlength: truncate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from approx.methods.method import Method
from approx.unlearning.examples import too_short
from sisa.core.domain import Record, normalised
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import Overlength, Tokens, tokenize_all


@dataclass(frozen=True)
class Limits:
    """The longest text in tokens, the treatment of longer ones, and the base's vocabulary size."""

    sequence_len: int
    overlength: Overlength
    vocabulary: int


def limits_of(config: Any, sequence_len: int, overlength: Overlength) -> Limits:
    """Return the limits of a base's configuration."""
    most = getattr(config, "max_position_embeddings", None) or sequence_len
    return Limits(min(sequence_len, most), overlength, config.vocab_size)


def tokenize_records(
    records: Sequence[Record], role: str, tokenizer: Any, limits: Limits
) -> list[Tokens]:
    """Return records as token examples. Raise InvalidInput with every record that cannot be used."""
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
    """Yield every problem of the given sets. A retain set of None is the one that the base writes."""
    if len(tokenizer) > limits.vocabulary:
        yield Problem(
            "tokenizer", f"has {len(tokenizer)} words, and the base embeddings for {limits.vocabulary}"
        )
    for role, records in (("forget", forget), ("retain", retain)):
        if records is not None and not records:
            yield Problem(role, "no records")
        elif records:
            least = method.min_answer_tokens if method is not None and role == "forget" else 1
            yield from _record_problems(records, role, tokenizer, limits, least)
    yield from overlaps(forget, retain or ())
    if method is not None and "preferred" in method.reads and method.prefers != "generic labels":
        yield from (
            Problem(f"forget record {number}", f"is a plain text: {method.name} needs a prompt")
            for number, each in enumerate(forget, 1)
            if each.kind == "text"
        )


def _record_problems(
    records: Sequence[Record], role: str, tokenizer: Any, limits: Limits, least: int
) -> Iterator[Problem]:
    try:
        tokens = tokenize_records(records, role, tokenizer, limits)
    except InvalidInput as error:
        yield from error.problems
        return
    for number, each in enumerate(tokens, 1):
        if each.num_labels < least:
            yield Problem(f"{role} record {number}", too_short(each.num_labels, least))


def overlaps(forget: Sequence[Record], retain: Sequence[Record]) -> Iterator[Problem]:
    """Yield a problem for each forget record that is also in the retain set, by id or by text."""
    ids = {each.id: number for number, each in enumerate(retain, 1)}
    texts = {normalised(each.text): number for number, each in enumerate(retain, 1)}
    for number, each in enumerate(forget, 1):
        if (other := ids.get(each.id)) is not None:
            yield Problem(f"forget record {number}", f"has the id of retain record {other}")
        elif (other := texts.get(normalised(each.text))) is not None:
            yield Problem(f"forget record {number}", f"has the text of retain record {other}")


def without_forgotten(retain: Sequence[Record], forget: Sequence[Record]) -> list[Record]:
    """Return the retain records that are not to be forgotten, by id or by text.

    >>> from sisa.core.domain import Part
    >>> one, other = (Record(i, None, "text", (Part("text", i),)) for i in ("a", "b"))
    >>> without_forgotten([one, other], [other]) == [one]
    True
    """
    ids, texts = {each.id for each in forget}, {normalised(each.text) for each in forget}
    return [each for each in retain if each.id not in ids and normalised(each.text) not in texts]
