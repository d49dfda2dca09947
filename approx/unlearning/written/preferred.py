"""The sets that a method trains on, with the preferred answers that it reads: three kinds of them.

    refusals         one of a few ways to say "I don't know", for each example to forget
    alternates       each example once with every other answer that the model writes to its question
    generic labels   the examples themselves, with labels from which their own words are removed

The method chooses among them (`write_preferred`). The model writes alternates and labels itself, before
the run. What that costs is part of the run's cost.

    sets, cost = with_preferred(method, Writing(model, tokenizer, records, sets, pace, 512, fresh))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from approx.unlearning.compute import Compute
from approx.unlearning.examples import Sets
from approx.unlearning.schedule import Pace
from sisa.core.domain import Kind, Part, Record
from sisa.lm.base.tokens import NO_LOSS, tokenize

if TYPE_CHECKING:
    from approx.methods.method import Method


class Writing(NamedTuple):
    """What preferred answers are written from.

    `sets.forget` are the records to forget, as tokens. `fresh` returns a new patch over a copy of the
    model; to write generic labels it learns the records by heart, at this pace.
    """

    model: Any
    tokenizer: Any
    records: Sequence[Record]
    sets: Sets
    pace: Pace
    sequence_len: int
    fresh: Callable[[], Any]


class Prepared(NamedTuple):
    """Sets, and what preparing them cost; None where the model wrote nothing."""

    sets: Sets
    cost: Compute | None


def with_preferred(method: Method, writing: Writing) -> Prepared:
    """Return the sets with preferred answers, if the method reads any.

    Raise InvalidInput for records to which the model can write nothing else.
    """
    reads = "preferred" in method.reads
    return method.write_preferred(writing) if reads else Prepared(writing.sets, None)


def begins_with_space(record: Record) -> bool:
    """Return whether the last part of a record, its answer, begins with white space."""
    return record.parts[-1].text[:1].isspace()


def closed(answer: str, kind: Kind, tokenizer: Any) -> list[int]:
    """Return the token ids of an answer with the tokens that close it."""
    roles = ("user", "assistant") if kind == "chat" else ("prompt", "completion")
    record = Record("", None, kind, (Part(roles[0], "?"), Part(roles[1], answer)))
    labels = tokenize(record, tokenizer, train_on_inputs=False).labels
    return [each for each in labels if each != NO_LOSS]
