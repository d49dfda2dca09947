"""The alternates that the base writes itself: other answers to the questions to forget.

AltPO prefers them to the forget answers (`methods/preference/altpo.py`). An alternate is drawn from the
base's own distribution: what it says to the same question about an invented person, with the names put
back. So it has the form of the forgotten answer, and its facts are made up. A question that names nobody
is asked as it is. A draw that repeats the answer to forget is drawn again, up to four times and at last
at higher temperatures; a base that still says nothing else is refused. The same fact in other words may
pass.

The paper's authors ask an instruction-tuned model for another version of the given answer. A base here
need not follow instructions, and its prompt would hold the answer to forget.

Nothing is stored: the same base, records and seed give the same alternates on one machine, and a
continued run writes them again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from approx.evaluation.answers import answered
from approx.evaluation.continuations import continue_sampled
from approx.unlearning.compute import Compute
from approx.unlearning.written.invented_names import rename_record, restore_names
from approx.unlearning.written.preferred import begins_with_space, closed
from approx.unlearning.written.retain_set import first_answer, repeats
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.numerics import seed_from
from sisa.lm.base.tokens import Tokens, end_tokens

MAX_ALTERNATE_TOKENS = 48
TEMPERATURES = (1.0, 1.0, 1.5, 2.0, 4.0)


class Written(NamedTuple):
    """The alternates of each record, as examples, and what drawing them cost."""

    alternates: list[list[Tokens]]
    cost: Compute


def write_alternates(
    model: Any, tokenizer: Any, forget: Sequence[Record], num: int, seed: int, sequence_len: int
) -> Written:
    """Return `num` other answers to each record's first question.

    Raise InvalidInput with every record for which the base writes too few.
    """
    began, num_tokens = time.monotonic(), 0
    asked = [_Question(record, tokenizer, sequence_len) for record in forget]
    written: list[list[Tokens]] = [[] for _ in forget]
    for attempt, temperature in enumerate(TEMPERATURES):
        places = [at for at, found in enumerate(written) for _ in range(num - len(found))]
        numbers = range(attempt * num * len(forget), attempt * num * len(forget) + len(places))
        prompts = [asked[at].about(number) for at, number in zip(places, numbers, strict=True)]
        ends, drawn_by = end_tokens(model, tokenizer), seed_from(seed, "alternates", attempt)
        drawn = continue_sampled(model, prompts, ends, MAX_ALTERNATE_TOKENS, temperature, drawn_by)
        num_tokens += sum(map(len, (*prompts, *drawn)))
        for at, number, ids in zip(places, numbers, drawn, strict=True):
            if (found := asked[at].example(ids, number)) is not None:
                written[at].append(found)
    problems = [
        Problem(f"forget record {number}", "the base writes nothing else than the answer to forget")
        for number, found in enumerate(written, 1)
        if len(found) < num
    ]
    if problems:
        raise InvalidInput(
            "no alternates can be written",
            expected=f"{num} other answers to each question",
            next_step="use another method",
            problems=problems,
        )
    size = sum(each.numel() for each in model.parameters())
    return Written(written, Compute(size, 0, 0, num_tokens, time.monotonic() - began))


class _Question:
    """A record's first question, asked about somebody else."""

    def __init__(self, record: Record, tokenizer: Any, sequence_len: int) -> None:
        self._record, self._tokenizer, self._sequence_len = record, tokenizer, sequence_len
        self._words = partial(tokenizer.decode, skip_special_tokens=True)
        self._prompt, answer = first_answer(record, tokenizer)
        self._forgotten = self._words(answer)

    def about(self, number: int) -> Sequence[int]:
        """Return the prompt with the invented names of a number, if it has names and fits."""
        other = rename_record(self._record, number)
        prompt = self._prompt if other is None else first_answer(other, self._tokenizer)[0]
        return prompt if len(prompt) < self._sequence_len else self._prompt

    def example(self, ids: Sequence[int], number: int) -> Tokens | None:
        """Return what was drawn as an answer to the question, or None if it repeats the answer."""
        text = restore_names(self._words(ids).strip(), self._record, number)
        if not text or repeats(self._forgotten, text):
            return None
        spaced = f" {text}" if begins_with_space(self._record) else text
        answer = closed(spaced, self._record.kind, self._tokenizer)
        return answered(self._prompt, answer[: self._sequence_len - len(self._prompt)])
